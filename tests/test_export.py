"""Models that leave Python: torch.export, AOTInductor, torch.jit.trace and, unfused, ONNX.

Each is exported with one batch and held to float64 at that one and at others.
"""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import check_gradient, check_output, random_arguments
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import lstmfused

# What torch's own tracer, packager and exporter stumble over.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]*. is deprecated")
PACKAGER = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated")
TORCHSCRIPT = pytest.mark.filterwarnings(
    "ignore:You are using the legacy TorchScript-based ONNX",
    "ignore:The feature will be removed:DeprecationWarning",
)

I, H, STEPS = 5, 7, 3
EXPORTED, BATCHES = 3, (1, 2, 3, 17)


class Stack(nn.Module):
    """Two layers over (batch, time, features) from no state, then a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.LSTMCell(I, H), nn.LSTMCell(H, H, bias=False)])
        self.head = nn.Linear(H, 2)

    def forward(self, sequence: Tensor) -> Tensor:
        states: list[tuple[Tensor, Tensor] | None] = [None, None]
        for t in range(STEPS):
            x = sequence[:, t]
            for layer, cell in enumerate(self.cells):
                states[layer] = x, _ = cell(x, states[layer])
        output: Tensor = self.head(x)
        return output


class Model(NamedTuple):
    """How to make a plain torch model, and its inputs for a batch."""

    plain: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    names: tuple[str, ...]

    def fused(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return lstmfused.fuse(self.plain().eval())

    def program(self, module: nn.Module) -> torch.export.ExportedProgram:
        return torch.export.export(
            module, self.inputs(EXPORTED), dynamic_shapes=dynamic(self.inputs(EXPORTED))
        )

    def check(self, run: Callable[..., Any], module: nn.Module) -> None:
        """What `run` computes, twice at each batch, is what torch's cells compute in float64."""
        wide = lstmfused.unfuse(copy.deepcopy(module)).double()
        for B in BATCHES * 2:
            inputs = self.inputs(B)
            expected = tree_leaves(wide(*tree_map(Tensor.double, inputs)))
            for actual, want in zip(tree_leaves(run(*inputs)), expected, strict=True):
                assert actual.dtype == torch.float32
                check_output("h", actual, want, B)


def dynamic(inputs: tuple[Any, ...]) -> Any:
    batch = torch.export.Dim("batch", min=1, max=64)
    return tree_map(lambda _: {0: batch}, inputs)


def step_inputs(B: int) -> tuple[Any, ...]:
    arguments = random_arguments(B, I, H)
    return arguments.input, arguments.hx


def sequence_inputs(B: int) -> tuple[Any, ...]:
    return (torch.stack([random_arguments(B, I, H, seed=t).input for t in range(STEPS)], 1),)


MODELS = pytest.mark.parametrize(
    "model",
    [
        pytest.param(Model(lambda: nn.LSTMCell(I, H), step_inputs, ("input", "h", "c")), id="cell"),
        pytest.param(Model(Stack, sequence_inputs, ("sequence",)), id="stack"),
    ],
)


@PACKAGER
@MODELS
def test_export(model: Model) -> None:
    module = model.fused()
    program, file = model.program(module), io.BytesIO()
    assert torch.ops.lstmfused.lstm_cell.default in {node.target for node in program.graph.nodes}
    model.check(program.module(), module)
    torch.export.save(program, file)
    file.seek(0)
    model.check(torch.export.load(file).module(), module)


@PACKAGER
@MODELS
def test_aot_inductor(model: Model, tmp_path: Path) -> None:
    module, package = model.fused(), str(tmp_path / "model.pt2")
    with torch.no_grad():
        program = model.program(module)
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    model.check(torch._inductor.aoti_load_package(package), module)


@MODELS
def test_jit_trace(model: Model) -> None:
    module, file = model.fused(), io.BytesIO()
    traced = torch.jit.trace(module, model.inputs(EXPORTED))
    model.check(traced, module)
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    model.check(loaded, module)

    def gradients(run: nn.Module) -> tuple[Tensor, ...]:
        outputs = tree_leaves(run(*model.inputs(EXPORTED - 1)))
        parameters = dict(run.named_parameters())
        return torch.autograd.grad(
            [t.square().sum() for t in outputs], [parameters[name] for name in names]
        )

    names = [name for name, _ in module.named_parameters()]
    for name, actual, want in zip(names, gradients(loaded), gradients(module), strict=True):
        check_gradient(name, actual, want, "traced")


def to_onnx(model: Model, module: nn.Module, path: Path) -> None:
    torch.onnx.export(
        module,
        model.inputs(EXPORTED),
        path,
        dynamo=False,
        input_names=list(model.names),
        dynamic_axes={name: {0: "batch"} for name in model.names},
    )


@TORCHSCRIPT
@MODELS
def test_onnx_of_an_unfused_model(model: Model, tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    module, path = lstmfused.unfuse(model.fused()), tmp_path / "model.onnx"
    assert not any(isinstance(m, lstmfused.LSTMCell) for m in module.modules())
    to_onnx(model, module, path)
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(*inputs: Any) -> list[Tensor]:
        arrays = [t.numpy() for t in tree_leaves(inputs)]
        outputs = session.run(None, dict(zip(names, arrays, strict=True)))
        return [torch.from_numpy(output) for output in outputs]

    model.check(run, module)


@TORCHSCRIPT
@MODELS
def test_onnx_refuses_a_fused_model(model: Model, tmp_path: Path) -> None:
    """ONNX has no such operator: the exporter says so, and leaves no file."""
    path = tmp_path / "model.onnx"
    with pytest.raises(torch.onnx.OnnxExporterError, match="lstmfused"):
        to_onnx(model, model.fused(), path)
    assert not path.exists()
