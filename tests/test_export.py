"""Models that leave Python: torch.export, AOTInductor, torch.jit.trace and ONNX.

Each is exported with one batch and held to float64 at that one and at others.
"""

import copy
import io
import operator
import zipfile
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
DYNAMO = pytest.mark.filterwarnings("ignore:# The axis name")
PACKAGER = pytest.mark.filterwarnings(
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated",
    "ignore:The given buffer is not writable",  # torch before 2.13, of any program that it loads
)
TORCHSCRIPT = pytest.mark.filterwarnings(
    "ignore:You are using the legacy TorchScript-based ONNX",
    "ignore:The feature will be removed:DeprecationWarning",
)

STEP = torch.ops.lstmfused.lstm_cell.default
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
            return lstmfused.fuse_(self.plain().eval())

    def program(self, module: nn.Module) -> torch.export.ExportedProgram:
        return torch.export.export(
            module, self.inputs(EXPORTED), dynamic_shapes=dynamic(self.inputs(EXPORTED))
        )

    def check(self, run: Callable[..., Any], module: nn.Module) -> None:
        """What `run` computes, twice at each batch, is what torch's cells compute in float64."""
        wide = lstmfused.unfuse_(copy.deepcopy(module)).double()
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
    assert STEP in {node.target for node in program.graph.nodes}
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
    with zipfile.ZipFile(package) as files:
        texts = [files.read(name) for name in files.namelist() if name.endswith((".cpp", ".json"))]
    assert any(b"lstmfused::lstm_cell" in text for text in texts)  # fused it stays


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


def by_torchscript(model: Model, module: nn.Module, path: Path) -> None:
    torch.onnx.export(
        module,
        model.inputs(EXPORTED),
        path,
        dynamo=False,
        input_names=list(model.names),
        dynamic_axes={name: {0: "batch"} for name in model.names},
    )


def by_dynamo(model: Model, module: nn.Module, path: Path) -> None:
    given = model.inputs(EXPORTED)
    torch.onnx.export(
        module, given, path, dynamo=True, dynamic_shapes=dynamic(given), verbose=False
    )


def runtime(path: Path) -> Callable[..., list[Tensor]]:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    onnx.checker.check_model(path)
    domains = {node.domain for node in onnx.load(path).graph.node}
    assert domains <= {"", "ai.onnx"}  # every operator is ONNX's own
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(*inputs: Any) -> list[Tensor]:
        arrays = [t.numpy() for t in tree_leaves(inputs)]
        outputs = session.run(None, dict(zip(names, arrays, strict=True)))
        return [torch.from_numpy(output) for output in outputs]

    return run


@TORCHSCRIPT
@DYNAMO
@PACKAGER
@MODELS
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("export", [by_torchscript, by_dynamo])
def test_onnx(model: Model, export: Callable[..., None], fused: bool, tmp_path: Path) -> None:
    if export is by_dynamo:
        pytest.importorskip("onnxscript")
    module, path = model.fused(), tmp_path / "model.onnx"
    if not fused:
        module = lstmfused.unfuse_(module)
        assert not any(isinstance(m, lstmfused.LSTMCell) for m in module.modules())
    export(model, module, path)
    model.check(runtime(path), module)


class Alone(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        state: tuple[Tensor, Tensor] = self.cell(x)
        return state


class Given(Alone):
    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        state: tuple[Tensor, Tensor] = self.cell(x, (h, c))
        return state


@TORCHSCRIPT
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("opset", [11, 13, 18, 20])
def test_onnx_by_torchscript_in_every_form(
    opset: int, state: bool, bias: bool, tmp_path: Path
) -> None:
    """Batched or not, traced or scripted, as far back as ONNX has negative axes."""
    path = tmp_path / "cell.onnx"
    for rows in (None, EXPORTED):
        arguments = random_arguments(rows, I, H)
        given = arguments.present()[: 3 if state else 1]
        cell = lstmfused.LSTMCell(I, H, bias).eval()
        model = Given(cell) if state else Alone(cell)
        with torch.no_grad():
            expected = copy.deepcopy(model).double()(*map(Tensor.double, given))
        for kind in (model, torch.jit.script(model)):
            torch.onnx.export(kind, tuple(given), path, dynamo=False, opset_version=opset)
            for name, found, want in zip("hc", runtime(path)(*given), expected, strict=True):
                check_output(name, found, want, (opset, rows, state, bias))


@PACKAGER
@MODELS
def test_core_aten(model: Model) -> None:
    """On request nothing but torch's own core operators are left, as of torch's cell."""
    module = model.fused()
    program = model.program(module)
    assert STEP in {node.target for node in program.graph.nodes}
    core = program.run_decompositions(lstmfused.decompositions())
    called = {n.target for n in core.graph.nodes if n.op == "call_function"} - {operator.getitem}
    assert not [op for op in called if torch.Tag.core not in op.tags]
    plain = model.program(lstmfused.unfuse_(copy.deepcopy(module))).run_decompositions()
    assert called <= {n.target for n in plain.graph.nodes}
    model.check(core.module(), module)
    assert STEP in {n.target for n in program.run_decompositions().graph.nodes}


def test_decompositions_raise_what_the_step_raises() -> None:
    step = lstmfused.decompositions()[STEP]
    arguments = random_arguments(EXPORTED, I, H)
    assert all(
        map(
            torch.equal,
            step(*arguments[:5]),
            lstmfused.reference.lstm_cell(arguments.input, arguments.hx, *arguments[3:5]),
        )
    )
    for wrong in (torch.zeros(EXPORTED, I + 1), torch.zeros(EXPORTED, I).double()):
        errors = []
        for run in (step, STEP):
            with pytest.raises(RuntimeError) as raised:
                run(wrong, *arguments[1:])
            errors.append(str(raised.value).splitlines()[0])
        assert errors[0] == errors[1]
