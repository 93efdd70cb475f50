"""python -m tools.abilities [--into docs/transforms.md]: what torch can do with a cell and with a
layer, tried: torch's own and those of lstmfused side by side."""

from __future__ import annotations

import argparse
import io
import sys
import textwrap
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, func, fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lstmfused
from benchmarks.format import insert, table

V, B, T, I, H = 3, 4, 2, 5, 7  # V of whatever is stacked
ROWS = {0: torch.export.Dim("batch", min=1, max=64)}


class PlainCell(nn.LSTMCell):
    """The oracle: the reference's formula."""

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Tensor]:
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        return lstmfused.reference.lstm_cell(input, hx, *weights)


class PlainLayer(nn.LSTM):
    """The same for a layer, over (B, T, I) or (T, I); there is no output but the last state."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        weights: Any = self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0
        state = None if hx is None else (hx[0][0], hx[1][0])
        for x in input.unbind(-2):
            state = lstmfused.reference.lstm_cell(x, state, *weights)
        return None, [t.unsqueeze(0) for t in state or ()]


class Last(nn.Module):
    """A layer that is called like a cell: by (B, T, I) and the state, for the state at the end."""

    def __init__(self, layer: nn.LSTM) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        state: tuple[Tensor, Tensor] | None = None
        if hx is not None:
            state = (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        _, (h, c) = self.layer(input, state)
        return h.squeeze(0), c.squeeze(0)


class Step(nn.Module):
    """The cell in a model, with a state."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        h, c = self.cell(x, (h, c))
        return h, c


Cell = Any  # an nn.LSTMCell, or a Last; whoever asks for another one calls make


class Make(NamedTuple):
    """Called, a cell, or a layer that is called like one: of the same weights at every call."""

    kind: type[nn.LSTMCell] | type[nn.LSTM]

    def __call__(self) -> Cell:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if issubclass(self.kind, nn.LSTM):
                return Last(self.kind(I, H, batch_first=True))
            return self.kind(I, H)

    @property
    def is_plain(self) -> bool:
        return self.kind in (PlainCell, PlainLayer)

    def input(self, *rows: int) -> Tensor:
        return tensor(*rows, *(T,) * issubclass(self.kind, nn.LSTM), I)

    def state(self, rows: int = B) -> tuple[Tensor, Tensor, Tensor]:
        """And the input."""
        return self.input(rows), tensor(rows, H, seed=2).tanh(), tensor(rows, H, seed=3)

    def weight_hh(self, cell: Cell) -> tuple[nn.Module, str]:
        """Who has it, by which name."""
        return (cell.layer, "weight_hh_l0") if isinstance(cell, Last) else (cell, "weight_hh")


def tensor(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def joined(cell: Callable[..., Any]) -> Callable[..., Tensor]:
    """h and c in one tensor, of an input and the state"""
    return lambda x, h, c: torch.cat(cell(x, (h, c)), -1)


def left_python(way: Callable[[Make, Step], Callable[..., Any]]) -> Callable[[Make], Any]:
    """A model that was made with one batch, at others. The formula stays in Python: it is what the
    numbers are held to."""

    def batches(make: Make) -> Any:
        model = Step(make())
        run = model if make.is_plain else way(make, model)
        return [run(*make.state(rows)) for rows in (2, 3, 5)]

    return batches


def vmap_weights(make: Make) -> Any:
    cells = [make() for _ in range(V)]
    for k, cell in enumerate(cells):
        owner, name = make.weight_hh(cell)
        getattr(owner, name).data.mul_(k)
    parameters, _ = func.stack_module_state(cells)
    x = make.input(B)
    return func.vmap(lambda p: func.functional_call(cells[0], p, (x,)))(parameters)


def per_sample_gradients(make: Make) -> Any:
    cell = make()

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        h, c = func.functional_call(cell, parameters, (x,))
        total: Tensor = h.square().sum() + c.sum()
        return total

    parameters = {name: p.detach() for name, p in cell.named_parameters()}
    return func.vmap(func.grad(loss), (None, 0))(parameters, make.input(B))


def jacobian(make: Make) -> Any:
    return func.jacrev(joined(make()), argnums=(0, 1, 2))(*make.state())


def forward_mode(make: Make) -> Any:
    return func.jvp(joined(make()), make.state(), make.state())


def hessian(make: Make) -> Any:
    cell = joined(make())
    return func.hessian(lambda x, h, c: cell(x, h, c).square().sum())(*make.state())


def double_backward(make: Make) -> Any:
    cell = make()
    parameters = list(cell.parameters())
    loss = joined(cell)(*make.state()).square().sum()
    first = torch.autograd.grad(loss, parameters, create_graph=True)
    return torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), parameters)


def compiled(make: Make, model: Step) -> Any:
    return torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)


def exported(make: Make, model: Step) -> Any:
    return torch.export.export(model, make.state(), dynamic_shapes=(ROWS,) * 3).module()


def traced(make: Make, model: Step) -> Any:
    return torch.jit.trace(model, make.state())


def scripted(make: Make, model: Step) -> Any:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    return torch.jit.freeze(torch.jit.load(file).eval())


def symbolic(make: Make, model: Step) -> Any:
    return fx.symbolic_trace(model)


def in_onnx_runtime(**options: Any) -> Callable[[Make, Step], Any]:
    import onnxruntime  # type: ignore[import-untyped]

    def way(make: Make, model: Step) -> Any:
        with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            path = Path(folder) / "model.onnx"
            torch.onnx.export(model, make.state(), path, **options)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]

        def run(*given: Tensor) -> list[Tensor]:
            arrays = dict(zip(names, (t.numpy() for t in given), strict=True))
            return [torch.from_numpy(output) for output in session.run(None, arrays)]

        return run

    return way


def core_aten(make: Make, model: Step) -> Any:
    own = issubclass(make.kind, (lstmfused.LSTMCell, lstmfused.LSTM))
    program = torch.export.export(model, make.state(), dynamic_shapes=(ROWS,) * 3)
    program = program.run_decompositions(lstmfused.decompositions() if own else None)
    called = (node.target for node in program.graph.nodes)
    for operator in (op for op in called if isinstance(op, torch._ops.OpOverload)):
        if torch.Tag.core not in operator.tags:
            raise TypeError(f"{operator} is left")
    return program.module()


def counted(make: Make) -> Any:
    x, h, c = make.state()
    with FlopCounterMode(display=False) as counter:
        joined(make())(x, h.requires_grad_(), c).sum().backward()
    return torch.tensor(counter.get_total_flops())


def profiled(make: Make) -> Any:
    with torch.profiler.profile(with_flops=True) as profile:
        make()(make.input(B))
    products = [e.flops for e in profile.key_averages() if e.key == "aten::addmm"]
    return torch.tensor(sum(products))


def quantized(make: Make, model: Step) -> Any:
    small: Any = torch.ao.quantization.quantize_dynamic(model, dtype=torch.qint8)
    owner, _ = make.weight_hh(small.cell)
    if type(owner) is make.kind:
        raise TypeError("left as it is")
    return small


def sharded(make: Make) -> Any:
    """In one process, which holds all rows."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    store = torch._C._distributed_c10d.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        given = [distribute_tensor(t, mesh, [Shard(0)]) for t in make.state()]
        cell: Any = distribute_module(make(), mesh)
        outputs = joined(cell)(*given)
        outputs.square().sum().backward()
        return [t.full_tensor() for t in (outputs, *(p.grad for p in cell.parameters()))]
    finally:
        dist.destroy_process_group()


def autocast(make: Make) -> Any:
    with torch.autocast("cpu", torch.bfloat16, enabled=not make.is_plain):
        h, c = make()(make.input(B))
    if not make.is_plain and h.dtype != torch.bfloat16:
        raise TypeError(f"h stays in {h.dtype}")
    return h.float(), c.float()


def gradients(outputs: Tensor, cell: Cell) -> Any:
    return torch.autograd.grad(outputs.square().sum(), list(cell.parameters()))


def checkpointed(make: Make) -> Any:
    cell = make()
    return gradients(checkpoint(joined(cell), *make.state(), use_reentrant=False), cell)


def weight_norm(make: Make) -> Any:
    cell = make()
    nn.utils.parametrizations.weight_norm(*make.weight_hh(cell))
    return gradients(joined(cell)(*make.state()), cell)


QUANTIZED, AUTOCAST = "`torch.ao.quantization.quantize_dynamic`", "`torch.autocast` on CPU"
AXES = {name: {0: "batch"} for name in "xhc"}
ABILITIES: dict[str, Callable[[Make], Any]] = {
    "`torch.func.vmap` over inputs": lambda make: func.vmap(make())(make.input(V, B)),
    "`torch.func.vmap` over stacked weights": vmap_weights,
    "per-sample gradients, `vmap(grad(...))`": per_sample_gradients,
    "`torch.func.jacrev`": jacobian,
    "forward mode, `torch.func.jvp`": forward_mode,
    "`torch.func.hessian`": hessian,
    "double backward": double_backward,
    "`torch.compile(fullgraph=True)`, dynamic batch": left_python(compiled),
    "`torch.export`, dynamic batch": left_python(exported),
    "`torch.jit.trace`": left_python(traced),
    "`torch.jit.script`, saved, loaded and frozen": left_python(scripted),
    "`torch.fx.symbolic_trace`": left_python(symbolic),
    "`torch.onnx.export`, `dynamo=False`, in ONNX Runtime": left_python(
        in_onnx_runtime(dynamo=False, input_names=list(AXES), dynamic_axes=AXES)
    ),
    "`torch.onnx.export`, `dynamo=True`, in ONNX Runtime": left_python(
        in_onnx_runtime(dynamo=True, dynamic_shapes=(ROWS,) * 3, verbose=False)
    ),
    "core ATen, `run_decompositions(...)`": left_python(core_aten),
    "`FlopCounterMode`, forward and backward": counted,
    "the profiler's `with_flops`": profiled,
    QUANTIZED: left_python(quantized),
    "`DTensor`, sharded over the batch": sharded,
    AUTOCAST: autocast,
    "`torch.utils.checkpoint`": checkpointed,
    "`parametrizations.weight_norm`": weight_norm,
}


SUBJECTS: dict[str, tuple[Make, Make]] = {  # each with its oracle
    "nn.LSTMCell": (Make(nn.LSTMCell), Make(PlainCell)),
    "lstmfused.LSTMCell": (Make(lstmfused.LSTMCell), Make(PlainCell)),
    "nn.LSTM": (Make(nn.LSTM), Make(PlainLayer)),
    "lstmfused.LSTM": (Make(lstmfused.LSTM), Make(PlainLayer)),
}


def tried(name: str, subject: str) -> tuple[str, str]:
    """ "works" if its numbers are those of the formula, or what goes wrong, and in which words."""
    make, plain = SUBJECTS[subject]
    torch.compiler.reset()
    try:
        found = tree_leaves(ABILITIES[name](make))
    except Exception as error:
        words = " ".join(str(error).split()).split(". ")[0]
        return type(error).__name__, textwrap.shorten(words, 120, placeholder=" …")
    expected = tree_leaves(ABILITIES[name](plain))
    bound = 2e-2 if name in (AUTOCAST, QUANTIZED) else 1e-5
    pairs = zip(found, expected, strict=True)
    right = all(torch.allclose(actual, want, rtol=bound, atol=bound) for actual, want in pairs)
    return "works" if right else "wrong numbers", ""


def markdown() -> str:
    """A table, and below it the words of each error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {name: {s: tried(name, s) for s in SUBJECTS} for name in ABILITIES}
    rows = [[name, *(word for word, _ in of.values())] for name, of in found.items()]
    errors = [
        f"- `{subject}`, {name}: `{text}`"
        for name, of in found.items()
        for subject, (_, text) in of.items()
        if text
    ]
    whole = table([f"torch {torch.__version__}", *SUBJECTS], rows)
    return "\n\n".join([whole, "What the errors say:", "\n".join(errors)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.abilities", description=__doc__)
    parser.add_argument("--into", type=Path, metavar="PAGE", help="write the table there")
    args = parser.parse_args()
    text = markdown()
    print(text)
    if args.into:
        old = args.into.read_text(encoding="utf-8")
        args.into.write_text(insert(old, text, "abilities"), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
