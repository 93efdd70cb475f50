"""What torch can do with a cell, tried: nn.LSTMCell and lstmfused.LSTMCell side by side.

python -m benchmarks.abilities --readme README.md
"""

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

from .report import insert, table

V, B, I, H = 3, 4, 5, 7  # V of whatever is stacked


class Plain(nn.LSTMCell):
    """The oracle: the reference's formula."""

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Tensor]:
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        return lstmfused.reference.lstm_cell(input, hx, *weights)


Make = Callable[[], nn.LSTMCell]  # the same weights at every call


def tensor(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def joined(cell: Callable[..., Any]) -> Callable[..., Tensor]:
    """h and c in one tensor, of an input and the state"""
    return lambda x, h, c: torch.cat(cell(x, (h, c)), -1)


def state() -> tuple[Tensor, Tensor, Tensor]:
    return tensor(B, I), tensor(B, H, seed=2).tanh(), tensor(B, H, seed=3)


def stateless(cell: nn.Module) -> Callable[..., Tensor]:
    """A loss of the parameters, for one row."""

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        h, c = func.functional_call(cell, parameters, (x,))
        total: Tensor = h.square().sum() + c.sum()
        return total

    return loss


def vmap_inputs(make: Make) -> Any:
    return func.vmap(make())(tensor(V, B, I))


def vmap_weights(make: Make) -> Any:
    cells = [make() for _ in range(V)]
    for k, cell in enumerate(cells):
        cell.weight_hh.data.mul_(k)
    parameters, _ = func.stack_module_state(cells)
    x = tensor(B, I)
    return func.vmap(lambda p: func.functional_call(cells[0], p, (x,)))(parameters)


def per_sample_gradients(make: Make) -> Any:
    cell = make()
    parameters = {name: p.detach() for name, p in cell.named_parameters()}
    return func.vmap(func.grad(stateless(cell)), (None, 0))(parameters, tensor(B, I))


def jacobian(make: Make) -> Any:
    return func.jacrev(joined(make()), argnums=(0, 1, 2))(*state())


def forward_mode(make: Make) -> Any:
    given = state()
    return func.jvp(joined(make()), given, tuple(t.cos() for t in given))


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
    return [step(tensor(rows, I)) for rows in (2, 3, 5)]


def exported(make: Make) -> Any:
    rows = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(make(), (tensor(B, I),), dynamic_shapes={"input": rows})
    return [program.module()(tensor(rows, I)) for rows in (2, 3, 5)]


def traced(make: Make) -> Any:
    step = torch.jit.trace(make(), (tensor(B, I),))
    return [step(tensor(rows, I)) for rows in (2, 3, 5)]


class Step(nn.Module):
    """The cell in a model, with a state."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        h, c = self.cell(x, (h, c))
        return h, c


def batches(run: Callable[..., Any]) -> Any:
    """Of a model that was made with one batch, at others."""
    return [
        run(tensor(rows, I), tensor(rows, H, seed=2), tensor(rows, H, seed=3)) for rows in (2, 3, 5)
    ]


def left_python(make: Make, way: Callable[[Step], Callable[..., Any]]) -> Any:
    """The formula stays in Python: it is what the numbers are held to."""
    model = Step(make())
    return batches(model if isinstance(model.cell, Plain) else way(model))


def symbolically_traced(make: Make) -> Any:
    return left_python(make, torch.fx.symbolic_trace)


def scripted(make: Make) -> Any:
    def way(model: Step) -> Any:
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(model), file)
        file.seek(0)
        return torch.jit.freeze(torch.jit.load(file).eval())

    return left_python(make, way)


def onnx(make: Make, **options: Any) -> Any:
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

    return left_python(make, way)


def onnx_by_torchscript(make: Make) -> Any:
    names = ["x", "h", "c"]
    axes = {name: {0: "batch"} for name in names}
    return onnx(make, dynamo=False, input_names=names, dynamic_axes=axes)


def onnx_by_dynamo(make: Make) -> Any:
    rows = {0: torch.export.Dim("batch", min=1, max=64)}
    return onnx(make, dynamo=True, dynamic_shapes=(rows,) * 3, verbose=False)


def core_aten(make: Make) -> Any:
    def way(model: Step) -> Any:
        table = lstmfused.decompositions() if isinstance(model.cell, lstmfused.LSTMCell) else None
        rows = {0: torch.export.Dim("batch", min=1, max=64)}
        program = torch.export.export(model, state(), dynamic_shapes=(rows,) * 3)
        program = program.run_decompositions(table)
        for node in program.graph.nodes:
            if (
                isinstance(node.target, torch._ops.OpOverload)
                and torch.Tag.core not in node.target.tags
            ):
                raise TypeError(f"{node.target} is left")
        return program.module()

    return left_python(make, way)


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


def quantized(make: Make) -> Any:
    model = Step(make())
    if isinstance(model.cell, Plain):
        return batches(model)
    small = torch.ao.quantization.quantize_dynamic(model, dtype=torch.qint8)
    if type(small.cell) is type(model.cell):
        raise TypeError("left as it is")
    return batches(small)


def sharded(make: Make) -> Any:
    """In one process, which holds all rows."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    dist.init_process_group(
        "gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1
    )
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


def checkpointed(make: Make) -> Any:
    cell = make()
    outputs = checkpoint(joined(cell), *state(), use_reentrant=False)
    return torch.autograd.grad(outputs.square().sum(), list(cell.parameters()))


def weight_norm(make: Make) -> Any:
    cell = nn.utils.parametrizations.weight_norm(make(), "weight_hh")
    return torch.autograd.grad(joined(cell)(*state()).sum(), list(cell.parameters()))


ABILITIES: dict[str, Callable[[Make], Any]] = {
    "`torch.func.vmap` over inputs": vmap_inputs,
    "`torch.func.vmap` over stacked weights": vmap_weights,
    "per-sample gradients, `vmap(grad(...))`": per_sample_gradients,
    "`torch.func.jacrev`": jacobian,
    "forward mode, `torch.func.jvp`": forward_mode,
    "`torch.func.hessian`": hessian,
    "double backward": double_backward,
    "`torch.compile(fullgraph=True)`, dynamic batch": compiled,
    "`torch.export`, dynamic batch": exported,
    "`torch.jit.trace`": traced,
    "`torch.jit.script`, saved, loaded and frozen": scripted,
    "`torch.fx.symbolic_trace`": symbolically_traced,
    "`torch.onnx.export`, `dynamo=False`, in ONNX Runtime": onnx_by_torchscript,
    "`torch.onnx.export`, `dynamo=True`, in ONNX Runtime": onnx_by_dynamo,
    "core ATen, `run_decompositions(...)`": core_aten,
    "`FlopCounterMode`, forward and backward": counted,
    "the profiler's `with_flops`": profiled,
    "`torch.ao.quantization.quantize_dynamic`": quantized,
    "`DTensor`, sharded over the batch": sharded,
    "`torch.autocast` on CPU": autocast,
    "`torch.utils.checkpoint`": checkpointed,
    "`parametrizations.weight_norm`": weight_norm,
}


def maker(cell: type[nn.LSTMCell]) -> Make:
    def make() -> nn.LSTMCell:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return cell(I, H)

    return make


def tried(ability: Callable[[Make], Any], cell: type[nn.LSTMCell]) -> str:
    """ "works" if its numbers are those of the formula, or what went wrong."""
    torch.compiler.reset()
    try:
        found = tree_leaves(ability(maker(cell)))
    except Exception as error:
        sentence = " ".join(str(error).split()).split(". ")[0].split(": ")[0].replace("|", "\\|")
        return f"{type(error).__name__}: {textwrap.shorten(sentence, 60, placeholder=' …')}"
    expected = tree_leaves(ability(maker(Plain)))
    bound = 2e-2 if ability in (autocast, quantized) else 1e-5
    right = all(
        torch.allclose(actual, want, rtol=bound, atol=bound)
        for actual, want in zip(found, expected, strict=True)
    )
    return "works" if right else "wrong numbers"


def markdown() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [
            [name, tried(ability, nn.LSTMCell), tried(ability, lstmfused.LSTMCell)]
            for name, ability in ABILITIES.items()
        ]
    return table([f"torch {torch.__version__}", "nn.LSTMCell", "lstmfused.LSTMCell"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.abilities", description=__doc__)
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
