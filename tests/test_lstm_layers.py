"""The short way through layers and directions, in C++: its oracle is the long one, in Python."""

from typing import Any

import pytest
import torch
from test_lstm import OPTIONS, B, H, I, T, sequence, state
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lstmfused
from lstmfused import _C

WITH_KERNELS = [options for options in OPTIONS if "proj_size" not in options]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call took the short way."""
    calls: list[bool] = []
    short = _C.lstm_layers

    def counted(*given: Any) -> Any:
        result = short(*given)
        calls.append(result is not None)
        return result

    monkeypatch.setattr(_C, "lstm_layers", counted)
    return calls


def results(module: nn.Module, x: Tensor, hx: Any, given: dict[str, Any]) -> list[Tensor]:
    """Outputs, and the gradients of everything."""
    torch.manual_seed(5)  # of dropout
    found = tree_leaves(module(x, hx, **given))
    if not any(t.requires_grad for t in found):
        return found
    of = [x, *(hx or ()), *module.parameters()]
    weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape) for t in found]
    return [*found, *torch.autograd.grad(found, of, weights)]


def compare(
    module: Any, x: Tensor, hx: Any, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits, shapes and strides."""
    short = results(module, x, hx, given)
    with monkeypatch.context() as patch:
        patch.setattr(_C, "lstm_layers", lambda *_: None)
        long = results(module, x, hx, given)
    for found, want in zip(short, long, strict=True):
        assert torch.equal(found, want) and found.stride() == want.stride()
        assert found.dtype == want.dtype and found.requires_grad == want.requires_grad


@pytest.mark.parametrize("options", WITH_KERNELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_same_bits(
    options: dict[str, Any],
    dtype: torch.dtype,
    taken: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = lstmfused.LSTM(I, H, **options, dtype=dtype)
    for rows, steps in ((B, T), (1, 1), (2, 0)):
        x = sequence(module, steps, rows).to(dtype).requires_grad_()
        hx = tuple(t.requires_grad_() for t in state(module, rows))
        reset = torch.rand(*x.shape[:2]) < 0.3
        for start in (None, hx):
            for given in ({},) if module.bidirectional else ({}, {"reset": reset}):
                taken.clear()
                compare(module, x, start, given, monkeypatch)
                assert taken == [True]
                with torch.no_grad():
                    compare(module, x, start, given, monkeypatch)


@pytest.mark.parametrize("options", WITH_KERNELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_packed_layers(
    options: dict[str, Any],
    dtype: torch.dtype,
    taken: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = lstmfused.pack(nn.LSTM(I, H, **options), weight_dtype=dtype)
    x, hx = sequence(packed), state(packed)
    reset = torch.rand(*x.shape[:2]) < 0.3
    for given in ({},) if packed.bidirectional else ({}, {"reset": reset}):
        compare(packed, x, hx, given, monkeypatch)
        compare(packed, x, None, given, monkeypatch)
    assert all(taken)


def test_large_weights_and_threads(taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what is computed with the GIL held."""
    module = lstmfused.LSTM(150, 160, 2)
    compare(module, sequence(module, 20, 7).requires_grad_(), None, {}, monkeypatch)
    assert taken == [True]


def test_autocast(taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    module = lstmfused.LSTM(I, H, 2)
    with torch.autocast("cpu", torch.bfloat16):
        compare(module, sequence(module).requires_grad_(), None, {}, monkeypatch)
    assert taken == [True]


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Heard(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(function)
        return function(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_where_python_is_asked(taken: list[bool]) -> None:
    """For what is masked in another way, wants kernels that are not there, or is followed."""
    module = lstmfused.LSTM(I, H)
    x, both = sequence(module), lstmfused.LSTM(I, H, bidirectional=True)
    module(x, lengths=torch.tensor([2, 5, 0]))
    module(x, return_cell_states=True)
    assert taken == []  # it is not asked at all
    both(x, reset=torch.zeros(T, B, dtype=torch.bool))
    module(pack_sequence([x[:, 0]]))
    module(x[:, 0])
    lstmfused.LSTM(I, H, proj_size=2)(x)
    lstmfused.LSTM(I, H, dtype=torch.complex64)(x.to(torch.complex64))
    module(x.as_subclass(Subclass))
    module(x, [t.as_subclass(Subclass) for t in state(module)])
    with Seen():  # type: ignore[no-untyped-call]
        module(x)
    torch.func.vmap(module)(x[None])
    assert taken == [False] * 9
    with Heard() as mode:
        module(x)
    assert mode.functions == [lstmfused.functional.lstm]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((torch.randn(T, B, I + 1),), RuntimeError, "input"),
        ((torch.randn(B),), ValueError, "Expected input to be 2D or 3D, got 1D"),
        ((None,), AttributeError, "dim"),
        ((torch.randn(T, B, I), torch.zeros(1, B, H)), TypeError, "a pair"),
        ((torch.randn(T, B, I), (torch.zeros(1, B, H),) * 3), RuntimeError, "two hidden states"),
        ((torch.randn(T, B, I), (torch.zeros(1, 2, H),) * 2), RuntimeError, r"hidden\[0\] size"),
        ((torch.randn(T, B, I), (torch.zeros(1, B, H), None)), TypeError, "must be a pair"),
        ((torch.randn(T, B, I), None, torch.zeros(T, B)), TypeError, "must be bool"),
        ((torch.randn(T, B, I), None, torch.zeros(T, 2) > 0), RuntimeError, "Expected reset size"),
    ],
)
def test_errors_are_those_of_the_long_way(
    given: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        lstmfused.LSTM(I, H)(*given)


def test_params_that_do_not_fit() -> None:
    x, module = torch.randn(T, B, I), lstmfused.LSTM(I, H)
    weights: list[Any] = list(module.parameters())
    with pytest.raises(RuntimeError, match="incorrect number of RNN parameters"):
        lstmfused.functional.lstm(x, None, weights[:3])
    with pytest.raises(RuntimeError, match="bias_hh"):
        lstmfused.functional.lstm(x, None, [*weights[:3], weights[0]])
    short: Any = _C.lstm_layers
    with pytest.raises(TypeError, match="takes 10 arguments"):
        short(x)


def test_no_layers() -> None:
    flags = None, None, True, 0, 0.0, False, False
    assert _C.lstm_layers(torch.randn(T, B, I), None, [], *flags) is None
