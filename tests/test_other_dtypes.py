"""What torch's cell takes and no kernel has is left to torch's cell: same numbers, same errors."""

from typing import Any

import pytest
import torch
from cases import Arguments, cell, random_arguments, random_like, torch_cell
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lstmfused

I, H = 5, 7
COMPLEX = (torch.complex64, torch.complex128)


def complex_arguments(B: int | None, dtype: torch.dtype, **form: Any) -> Arguments:
    real, imaginary = (random_arguments(B, I, H, seed=seed, **form) for seed in (0, 1))
    pairs = zip(real, imaginary, strict=True)
    return Arguments(*(None if r is None else torch.complex(r, i).to(dtype) for r, i in pairs))  # type: ignore[arg-type]


def with_gradients(function: Any, arguments: Arguments) -> list[Tensor]:
    arguments = arguments.map(
        lambda t: t.detach().requires_grad_(t.is_floating_point() or t.is_complex())
    )
    outputs = function(arguments)
    trained = [t for t in arguments.present() if t.requires_grad]
    grads = [random_like(t) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, trained, grads)]


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
@pytest.mark.parametrize("B", [None, 0, 1, 3])
def test_complex(B: int | None, dtype: torch.dtype) -> None:
    for form in ({}, {"state": False}, {"bias": (False, False)}):
        arguments = complex_arguments(B, dtype, **form)
        if form.get("bias") is None:
            expected = with_gradients(torch_cell, arguments)
            torch.testing.assert_close(with_gradients(cell, arguments), expected)
        with torch.no_grad():
            torch.testing.assert_close(cell(arguments), torch_cell(arguments))
        with torch.inference_mode():
            torch.testing.assert_close(cell(arguments), torch_cell(arguments))


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_complex_module(dtype: torch.dtype) -> None:
    results = []
    for kind in (nn.LSTMCell, lstmfused.LSTMCell):
        torch.manual_seed(0)
        module = kind(I, H, dtype=dtype)
        x = complex_arguments(3, dtype).input
        h, c = module(x, module(x))
        (h.abs().sum() + c.abs().sum()).backward()
        results.append([h, c, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "other", [torch.float64, torch.float32, torch.float16, torch.int64, torch.complex64], ids=str
)
def test_cell_state_of_any_dtype(other: torch.dtype, dtype: torch.dtype) -> None:
    """Torch promotes it; only float32 beside half types is a kernel's."""
    if other == dtype or (dtype == torch.bfloat16 and other == torch.float32):
        return
    for B in (None, 3):
        arguments = random_arguments(B, I, H, dtype)
        assert arguments.c is not None
        arguments = arguments._replace(c=arguments.c.mul(3).to(other))
        expected = with_gradients(torch_cell, arguments)
        actual = with_gradients(cell, arguments)
        assert [t.dtype for t in actual] == [t.dtype for t in expected]
        torch.testing.assert_close(actual, expected)
        with FakeTensorMode() as mode:
            fake = cell(arguments.map(mode.from_tensor))
        with torch.inference_mode():
            meta = cell(arguments.map(lambda t: t.to("meta")))
        for found in (fake, meta):
            described = [(t.dtype, t.shape) for t in found]
            assert described == [(t.dtype, t.shape) for t in expected[:2]]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex32],
    ids=str,
)
def test_errors_are_those_of_torch(dtype: torch.dtype) -> None:
    arguments = random_arguments(3, I, H).map(lambda t: t.to(dtype))
    for given in (arguments, arguments._replace(h=None, c=None)):
        errors = []
        for function in (torch_cell, cell):
            with pytest.raises(Exception) as caught:
                function(given)
            errors.append((type(caught.value), str(caught.value).splitlines()[0]))
        assert errors[1] == errors[0]


def test_inner_operators_have_no_such_kernels() -> None:
    arguments = complex_arguments(3, torch.complex64)
    with pytest.raises(NotImplementedError, match="not implemented for 'ComplexFloat'"):
        torch.ops.lstmfused.lstm_cell_forward(*arguments)


def test_complex_in_graphs_and_transforms() -> None:
    arguments = complex_arguments(3, torch.complex64)
    expected = cell(arguments)

    def step(*given: Tensor) -> Any:
        return cell(Arguments(*given))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments.present()), expected)
    for name in Arguments._fields:
        stacked = torch.stack([getattr(arguments, name)] * 2)
        found = torch.vmap(lambda t, name=name: cell(arguments._replace(**{name: t})))(stacked)
        torch.testing.assert_close(tuple(t[1] for t in found), expected)
    with torch.autocast("cpu"):
        torch.testing.assert_close(cell(arguments), torch_cell(arguments))


def test_batch_invariance_is_not_promised() -> None:
    with (
        lstmfused.batch_invariant(),
        pytest.raises(NotImplementedError, match="no batch-invariant kernels for ComplexFloat"),
    ):
        cell(complex_arguments(3, torch.complex64))
