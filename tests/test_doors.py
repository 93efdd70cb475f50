"""Ways in and out of a model that torch's cell passes: torch.fx, TorchScript, dynamic quantization
and those who count its operations. torch's own cell is the oracle."""

import copy
import io
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from cases import check_gradient, check_output, random_arguments, run_python
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import lstmfused
from lstmfused.functional import lstm_cell

# torch's own deprecations.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]*. is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:The TorchScript type system"),  # of fx.GraphModule
]

B, I, H, STEPS = 4, 5, 7, 3
STEP = torch.ops.lstmfused.lstm_cell


class Loop(nn.Module):
    """Over (batch, time, features): two layers, the second from the whole state of the first, one
    from no state and one without biases; a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTMCell(I, H)
        self.second = nn.LSTMCell(I, H, bias=False)
        self.head = nn.Linear(H, 2)

    def forward(self, sequence: Tensor) -> Tensor:
        state = self.first(sequence[:, 0])
        for t in range(1, STEPS):
            h, c = self.first(sequence[:, t], state)
            state = self.second(sequence[:, t], (h, c))
        output: Tensor = self.head(state[0])
        return output


class Once(nn.Module):
    """One step, with a state or without."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(I, H, bias)

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        state: tuple[Tensor, Tensor] = self.cell(x, hx)
        return state


def pair(make: Callable[[], nn.Module]) -> tuple[Any, Any]:
    """A model of torch's cells, and a fused one of the same weights."""
    plain = make()
    return plain, lstmfused.fuse_(copy.deepcopy(plain))


def inputs(rows: int | None = B, state: bool = True) -> tuple[Any, ...]:
    arguments = random_arguments(rows, I, H)
    return (arguments.input, arguments.hx) if state else (arguments.input,)


def check(actual: Any, plain: nn.Module, given: tuple[Any, ...], case: object = None) -> None:
    wide = copy.deepcopy(plain).double()
    expected = wide(*torch.utils._pytree.tree_map(Tensor.double, given))
    for name, found, want in zip("hc", actual, expected, strict=True):
        check_output(name, found, want, case)


# --------------------------------------------------------------------------------------------------
# torch.fx


def targets(graph: fx.Graph) -> list[Any]:
    """What is called, but for the parts of tuples."""
    calls = [n.target for n in graph.nodes if n.op.startswith("call")]
    return [target for target in calls if getattr(target, "__name__", "") != "getitem"]


def test_symbolic_trace() -> None:
    """One call a step, as there is of torch's cell; the traced model trains the same parameters."""
    plain, fused = pair(Loop)
    traced, oracle = fx.symbolic_trace(fused), fx.symbolic_trace(plain)
    assert len(targets(traced.graph)) == len(targets(oracle.graph))
    assert targets(traced.graph).count(STEP) == 2 * STEPS - 1
    assert dict(traced.named_parameters()).keys() == dict(fused.named_parameters()).keys()
    for rows in (1, B):
        x = torch.randn(rows, STEPS, I)
        assert torch.equal(traced(x), fused(x))
        assert (traced(x) - plain(x)).abs().max() <= 1e-6
    traced(x).sum().backward()
    plain(x).sum().backward()
    for name, parameter in plain.named_parameters():
        check_gradient(name, fused.get_parameter(name).grad, parameter.grad, "traced")


@pytest.mark.parametrize("state", [True, False])
def test_symbolic_trace_of_one_step(state: bool) -> None:
    """Where the state itself is a Proxy, no one knows its length before it is there."""
    for bias in (True, False):
        plain, fused = pair(partial(Once, bias))
        kept = None if state else {"hx": None}
        traced = fx.symbolic_trace(fused, concrete_args=kept)
        assert targets(traced.graph)[-1:] == [STEP]  # before it, torch's assertion that hx is None
        for rows in (None, 1, B):
            given = inputs(rows, state)
            check(traced(*given, *(() if state else (None,))), plain, given, rows)


def test_symbolic_trace_of_the_function_and_of_a_packed_cell() -> None:
    arguments = random_arguments(B, I, H)
    traced = fx.symbolic_trace(lambda x, hx, w, v: lstm_cell(x, hx, w, v)[0])
    assert targets(traced.graph) == [STEP]
    given = arguments.input, arguments.hx, arguments.weight_ih, arguments.weight_hh
    assert torch.equal(traced(*given), lstm_cell(*given)[0])
    cell = lstmfused.LSTMCell(I, H)  # a model of its own
    assert all(map(torch.equal, fx.symbolic_trace(cell)(*inputs()), cell(*inputs())))
    packed = lstmfused.pack(Once())
    traced = fx.symbolic_trace(packed)
    assert targets(traced.graph) == [torch.ops.lstmfused.lstm_cell_packed]
    for found, want in zip(traced(*inputs()), packed(*inputs()), strict=True):
        assert torch.equal(found, want)


def test_what_is_no_tensor_is_refused_as_before() -> None:
    arguments = random_arguments(B, I, H)
    for wrong in (3, "x", [1.0], object()):
        with pytest.raises(TypeError, match="argument 'input' must be Tensor, not"):
            lstm_cell(wrong, None, *arguments[3:])  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------
# TorchScript


def script(module: nn.Module) -> Any:
    return torch.jit.script(module)


def through_a_file(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module), file)
    file.seek(0)
    return torch.jit.load(file)


def frozen(module: nn.Module) -> Any:
    return torch.jit.freeze(torch.jit.script(module.eval()))


@pytest.mark.parametrize("way", [script, through_a_file, frozen])
@pytest.mark.parametrize("bias", [True, False])
def test_script(bias: bool, way: Callable[[nn.Module], Any]) -> None:
    plain, fused = pair(lambda: Once(bias))
    cell = fused.cell
    scripted = way(fused)
    assert fused.cell is cell and type(cell) is lstmfused.LSTMCell  # scripting changes no model
    assert "lstmfused::lstm_cell" in str(scripted.inlined_graph)
    for rows in (None, 0, 1, B):
        for state in (True, False):
            given = inputs(rows, state)
            for _ in range(2):  # the second time, optimized
                found = scripted(*given)
                check(found, plain, given, (rows, state))
            for eager, other in zip(fused(*given), found, strict=True):
                assert torch.equal(eager, other)


def test_script_of_a_loop_trains() -> None:
    class Recurrent(nn.Module):
        """TorchScript's own loop, of an unknown number of steps."""

        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(I, H)

        def forward(self, sequence: Tensor) -> Tensor:
            h, c = self.cell(sequence[:, 0])
            for t in range(1, sequence.shape[1]):
                h, c = self.cell(sequence[:, t], (h, c))
            total: Tensor = h + c
            return total

    plain, fused = pair(Recurrent)
    scripted = torch.jit.script(fused)
    for steps in (1, 2, 5):
        x = torch.randn(B, steps, I)
        found, want = scripted(x), plain.double()(x.double())
        assert (found - want).abs().max() <= 1e-6 * steps
    found.square().sum().backward()
    want.square().sum().backward()
    for name, parameter in plain.named_parameters():
        actual = dict(scripted.named_parameters())[name].grad
        assert (actual - parameter.grad).abs().max() <= 1e-5, name


def test_script_of_functions_and_of_a_traced_model() -> None:
    arguments = random_arguments(B, I, H)
    step = torch.jit.script(lstm_cell)
    for given in (arguments, arguments._replace(h=None, c=None), arguments._replace(bias_hh=None)):
        ours = step(given.input, given.hx, *given[3:])
        for found, want in zip(ours, lstm_cell(given.input, given.hx, *given[3:]), strict=True):
            assert torch.equal(found, want)
    _, fused = pair(Loop)
    x = torch.randn(B, STEPS, I)
    assert torch.equal(torch.jit.script(fx.symbolic_trace(fused))(x), fused(x))
    packed = lstmfused.pack(Once())
    for found, want in zip(torch.jit.script(packed)(*inputs()), packed(*inputs()), strict=True):
        assert torch.equal(found, want)


def test_script_raises_what_eager_raises() -> None:
    _, fused = pair(Once)
    for way in (script, through_a_file):
        with pytest.raises(RuntimeError, match=f"input_size: got {I + 1} expected {I}"):
            way(fused)(torch.randn(B, I + 1))


def test_script_of_subclasses() -> None:
    class Named(lstmfused.LSTMCell):
        pass

    class Doubled(lstmfused.LSTMCell):
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            return torch.ops.lstmfused.lstm_cell(
                2 * input, None, None, self.weight_ih, self.weight_hh
            )

    x = torch.randn(B, I)
    for kind in (Named, Doubled):
        cell = kind(I, H)
        hx = (torch.zeros(B, H),) * 2 if kind is Named else x
        assert torch.equal(torch.jit.script(cell)(x, hx)[0], cell(x, hx)[0])


# --------------------------------------------------------------------------------------------------
# Counted operations


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("wanted", ["everything", "weights", "state", "input"])
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("rows", [None, 0, 1, B])
def test_flops(rows: int | None, state: bool, wanted: str) -> None:
    """Forward and backward, for whichever gradients are wanted."""
    for plain in (nn.LSTMCell(I, H), nn.LSTMCell(I, H, bias=False)):
        fused = lstmfused.fuse_(copy.deepcopy(plain))
        counts = []
        for cell in (plain, fused):
            cell.requires_grad_(wanted in ("everything", "weights"))
            x, *hx = (t.clone() for t in torch.utils._pytree.tree_leaves(inputs(rows, state)))
            x.requires_grad_(wanted in ("everything", "input"))
            for t in hx:
                t.requires_grad_(wanted in ("everything", "state"))
            given = (x, tuple(hx)) if state else (x,)

            def forward(cell: nn.Module = cell, given: Any = given) -> Any:
                return cell(*given)

            def inference(forward: Callable[[], Any] = forward) -> None:
                with torch.no_grad():
                    forward()

            outputs = torch.cat(forward(), -1).sum()
            back = [flops(outputs.backward)] if outputs.requires_grad else []
            counts.append([flops(inference), flops(forward), *back])
        assert counts[1] == counts[0]
        assert rows == 0 or min(counts[0][:2]) > 0


def test_flops_of_a_packed_cell() -> None:
    cell, x = nn.LSTMCell(I, H), torch.randn(B, I)
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        small = lstmfused.pack(cell, dtype)
        assert flops(partial(small, x)) == flops(partial(cell, x)) > 0


# --------------------------------------------------------------------------------------------------
# Dynamic quantization


@pytest.fixture
def engine() -> Iterator[None]:
    engines = set(torch.backends.quantized.supported_engines) - {"none"}
    if not engines:
        pytest.skip("this torch has no engine for quantized operators on this processor")
    yield


def quantized(model: nn.Module, *given: Any, **named: Any) -> Any:
    made = torch.ao.quantization.quantize_dynamic(model, *given, **named)
    assert type(made.cell) is torch.ao.nn.quantized.dynamic.LSTMCell
    return made


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16], ids=str)
def test_quantize_dynamic(dtype: torch.dtype) -> None:
    """By default, by torch's cell, by ours and by name: torch's quantized cell."""
    plain, fused = pair(Once)
    want = quantized(plain, dtype=dtype)(*inputs())
    for spec in (None, {nn.LSTMCell}, {lstmfused.LSTMCell}, {"cell"}, {nn.LSTMCell, "cell"}):
        made = quantized(fused, spec, dtype=dtype)
        assert all(map(torch.equal, made(*inputs()), want)), spec
        assert type(fused.cell) is lstmfused.LSTMCell
    assert all(map(torch.equal, quantized(fused, dtype=dtype, inplace=True)(*inputs()), want))
    assert type(fused.cell) is not lstmfused.LSTMCell


@pytest.mark.usefixtures("engine")
def test_who_asks_for_other_types_gets_them_alone() -> None:
    _, fused = pair(Once)
    made = torch.ao.quantization.quantize_dynamic(fused, {nn.Linear}, dtype=torch.qint8)
    assert type(made.cell) is lstmfused.LSTMCell


@pytest.mark.usefixtures("engine")
def test_quantize_dynamic_refuses_what_torch_refuses() -> None:
    for model in pair(lambda: Once(bias=False)):
        with pytest.raises(AssertionError, match="bias"):
            torch.ao.quantization.quantize_dynamic(model, dtype=torch.qint8)
    for model in pair(Once):
        nn.utils.parametrizations.weight_norm(model.cell, "weight_hh")
        with pytest.raises(AssertionError, match="only works for"):
            torch.ao.quantization.quantize_dynamic(model, dtype=torch.qint8)


# --------------------------------------------------------------------------------------------------
# Registration

LATER = """
import sys, lstmfused
absent = [name for name in sys.argv[1:] if name in sys.modules]
print(absent)
import torch
from torch.utils.flop_counter import flop_registry
print(torch.ops.lstmfused.lstm_cell in flop_registry)
"""


def test_import_takes_none_of_them_along() -> None:
    names = (
        "torch.onnx",
        "torch.distributed.tensor",
        "torch.utils.flop_counter",
        "onnxscript",
        "thop",
    )
    assert run_python("-c", LATER, *names).split() == ["[]", "True"]


def test_another_version_of_a_package_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose tables are elsewhere: it is imported as ever, and a warning tells."""
    monkeypatch.setitem(sys.modules, "thop.profile", type(sys)("thop.profile"))
    with pytest.warns(UserWarning, match="could not register with thop.profile"):
        lstmfused._integrations._tell("thop.profile")
