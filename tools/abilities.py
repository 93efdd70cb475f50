"""python -m tools.abilities [--readme README.md]: what torch can do with a cell, tried:
nn.LSTMCell and lstmfused.LSTMCell side by side."""

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
from typing import Any

import torch
from torch import Tensor, func, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lstmfused
from benchmarks.format import insert, table

V, B, I, H = 3, 4, 5, 7  # V of whatever is stacked
ROWS = {0: torch.export.Dim("batch", min=1, max=64)}


class Plain(nn.LSTMCell):
    """The oracle: the reference's formula."""

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Tensor]:
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        return lstmfused.reference.lstm_cell(input, hx, *weights)


class Step(nn.Module):
    """The cell in a model, with a state."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        h, c = self.cell(x, (h, c))
        return h, c


Cell = Any  # an nn.LSTMCell; whoever asks for another one calls make
Make = Callable[[], Cell]  # the same weights at every call


def tensor(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state(rows: int = B) -> tuple[Tensor, Tensor, Tensor]:
    return tensor(rows, I), tensor(rows, H, seed=2).tanh(), tensor(rows, H, seed=3)


def joined(cell: Callable[..., Any]) -> Callable[..., Tensor]:
    """h and c in one tensor, of an input and the state"""
    return lambda x, h, c: torch.cat(cell(x, (h, c)), -1)


def batches(run: Callable[..., Any], with_state: bool = True) -> Any:
    """Of a model that was made with one batch, at others."""
    return [run(*state(rows)[: 3 if with_state else 1]) for rows in (2, 3, 5)]


def left_python(make: Make, way: Callable[[Step], Callable[..., Any]]) -> Any:
    """The formula stays in Python: it is what the numbers are held to."""
    model = Step(make())
    return batches(model if isinstance(model.cell, Plain) else way(model))


def vmap_weights(make: Make) -> Any:
    cells = [make() for _ in range(V)]
    for k, cell in enumerate(cells):
        cell.weight_hh.data.mul_(k)
    parameters, _ = func.stack_module_state(cells)
    x = tensor(B, I)
    return func.vmap(lambda p: func.functional_call(cells[0], p, (x,)))(parameters)


def per_sample_gradients(make: Make) -> Any:
    cell = make()

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        h, c = func.functional_call(cell, parameters, (x,))
        total: Tensor = h.square().sum() + c.sum()
        return total

    parameters = {name: p.detach() for name, p in cell.named_parameters()}
    return func.vmap(func.grad(loss), (None, 0))(parameters, tensor(B, I))


def hessian(make: Make) -> Any:
    cell = joined(make())
    return func.hessian(lambda x, h, c: cell(x, h, c).square().sum())(*state())


def double_backward(make: Make) -> Any:
    cell = make()
    parameters = list(cell.parameters())
    loss = joined(cell)(*state()).square().sum()
    first = torch.autograd.grad(loss, parameters, create_graph=True)
    return torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), parameters)


def compiled(make: Make) -> Any:
    step = torch.compile(make(), fullgraph=True, backend="aot_eager", dynamic=True)
    return batches(step, with_state=False)


def exported(make: Make) -> Any:
    program = torch.export.export(make(), (tensor(B, I),), dynamic_shapes={"input": ROWS})
    return batches(program.module(), with_state=False)


def scripted(model: Step) -> Any:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    return torch.jit.freeze(torch.jit.load(file).eval())


def in_onnx_runtime(**options: Any) -> Callable[[Step], Any]:
    import onnxruntime  # type: ignore[import-untyped]

    def way(model: Step) -> Any:
        with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            path = Path(folder) / "model.onnx"
            torch.onnx.export(model, state(), path, **options)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]

        def run(*given: Tensor) -> list[Tensor]:
            arrays = dict(zip(names, (t.numpy() for t in given), strict=True))
            return [torch.from_numpy(output) for output in session.run(None, arrays)]

        return run

    return way


def onnx_by_torchscript(make: Make) -> Any:
    axes: Any = {name: {0: "batch"} for name in "xhc"}
    options: Any = {"dynamo": False, "input_names": list(axes), "dynamic_axes": axes}
    return left_python(make, in_onnx_runtime(**options))


def onnx_by_dynamo(make: Make) -> Any:
    options: Any = {"dynamo": True, "dynamic_shapes": (ROWS,) * 3, "verbose": False}
    return left_python(make, in_onnx_runtime(**options))


def core_aten(model: Step) -> Any:
    own = isinstance(model.cell, lstmfused.LSTMCell)
    program = torch.export.export(model, state(), dynamic_shapes=(ROWS,) * 3)
    program = program.run_decompositions(lstmfused.decompositions() if own else None)
    called = (node.target for node in program.graph.nodes)
    for operator in (op for op in called if isinstance(op, torch._ops.OpOverload)):
        if torch.Tag.core not in operator.tags:
            raise TypeError(f"{operator} is left")
    return program.module()


def counted(make: Make) -> Any:
    x, h, c = state()
    with FlopCounterMode(display=False) as counter:
        joined(make())(x, h.requires_grad_(), c).sum().backward()
    return torch.tensor(counter.get_total_flops())


def profiled(make: Make) -> Any:
    with torch.profiler.profile(with_flops=True) as profile:
        make()(tensor(B, I))
    products = [e.flops for e in profile.key_averages() if e.key == "aten::addmm"]
    return torch.tensor(sum(products))


def quantized(model: Step) -> Any:
    small = torch.ao.quantization.quantize_dynamic(model, dtype=torch.qint8)
    if type(small.cell) is type(model.cell):
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
        given = [distribute_tensor(t, mesh, [Shard(0)]) for t in state()]
        cell: Any = distribute_module(make(), mesh)
        outputs = joined(cell)(*given)
        outputs.square().sum().backward()
        return [t.full_tensor() for t in (outputs, *(p.grad for p in cell.parameters()))]
    finally:
        dist.destroy_process_group()


def autocast(make: Make) -> Any:
    cell = make()
    with torch.autocast("cpu", torch.bfloat16, enabled=not isinstance(cell, Plain)):
        h, c = cell(tensor(B, I))
    if not isinstance(cell, Plain) and h.dtype != torch.bfloat16:
        raise TypeError(f"h is {h.dtype}, c is {c.dtype}")
    return h.float(), c.float()


def gradients(outputs: Tensor, cell: Cell) -> Any:
    return torch.autograd.grad(outputs.square().sum(), list(cell.parameters()))


def checkpointed(make: Make) -> Any:
    cell = make()
    return gradients(checkpoint(joined(cell), *state(), use_reentrant=False), cell)


def weight_norm(make: Make) -> Any:
    cell = nn.utils.parametrizations.weight_norm(make(), "weight_hh")
    return gradients(joined(cell)(*state()), cell)


QUANTIZED, AUTOCAST = "`torch.ao.quantization.quantize_dynamic`", "`torch.autocast` on CPU"
ABILITIES: dict[str, Callable[[Make], Any]] = {
    "`torch.func.vmap` over inputs": lambda make: func.vmap(make())(tensor(V, B, I)),
    "`torch.func.vmap` over stacked weights": vmap_weights,
    "per-sample gradients, `vmap(grad(...))`": per_sample_gradients,
    "`torch.func.jacrev`": lambda make: func.jacrev(joined(make()), argnums=(0, 1, 2))(*state()),
    "forward mode, `torch.func.jvp`": lambda make: func.jvp(joined(make()), state(), state()),
    "`torch.func.hessian`": hessian,
    "double backward": double_backward,
    "`torch.compile(fullgraph=True)`, dynamic batch": compiled,
    "`torch.export`, dynamic batch": exported,
    "`torch.jit.trace`": lambda make: batches(torch.jit.trace(make(), (tensor(B, I),)), False),
    "`torch.jit.script`, saved, loaded and frozen": lambda make: left_python(make, scripted),
    "`torch.fx.symbolic_trace`": lambda make: left_python(make, torch.fx.symbolic_trace),
    "`torch.onnx.export`, `dynamo=False`, in ONNX Runtime": onnx_by_torchscript,
    "`torch.onnx.export`, `dynamo=True`, in ONNX Runtime": onnx_by_dynamo,
    "core ATen, `run_decompositions(...)`": lambda make: left_python(make, core_aten),
    "`FlopCounterMode`, forward and backward": counted,
    "the profiler's `with_flops`": profiled,
    QUANTIZED: lambda make: left_python(make, quantized),
    "`DTensor`, sharded over the batch": sharded,
    AUTOCAST: autocast,
    "`torch.utils.checkpoint`": checkpointed,
    "`parametrizations.weight_norm`": weight_norm,
}


def tried(name: str, cell: type[nn.LSTMCell]) -> str:
    """ "works" if its numbers are those of the formula, or what went wrong."""

    def maker(cell: type[nn.LSTMCell]) -> Make:
        def make() -> Cell:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return cell(I, H)

        return make

    torch.compiler.reset()
    try:
        found = tree_leaves(ABILITIES[name](maker(cell)))
    except Exception as error:
        sentence = " ".join(str(error).split()).split(". ")[0].split(": ")[0].replace("|", "\\|")
        return f"{type(error).__name__}: {textwrap.shorten(sentence, 60, placeholder=' …')}"
    expected = tree_leaves(ABILITIES[name](maker(Plain)))
    bound = 2e-2 if name in (AUTOCAST, QUANTIZED) else 1e-5
    pairs = zip(found, expected, strict=True)
    right = all(torch.allclose(actual, want, rtol=bound, atol=bound) for actual, want in pairs)
    return "works" if right else "wrong numbers"


def markdown() -> str:
    cells = nn.LSTMCell, lstmfused.LSTMCell
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [[name, *(tried(name, cell) for cell in cells)] for name in ABILITIES]
    return table([f"torch {torch.__version__}", "nn.LSTMCell", "lstmfused.LSTMCell"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.abilities", description=__doc__)
    parser.add_argument("--readme", type=Path, metavar="README.md", help="write the table there")
    args = parser.parse_args()
    text = markdown()
    print(text)
    if args.readme:
        old = args.readme.read_text(encoding="utf-8")
        args.readme.write_text(insert(old, text, "abilities"), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
