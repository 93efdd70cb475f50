"""The samples and error inputs by which torch tests nn.LSTMCell, and those that it leaves out."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import ERROR
from torch import nn

import lstmfused

pytest.importorskip("expecttest", reason="torch's own test utilities need it")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_modules import (
        FunctionInput,
        ModuleErrorEnum,
        ModuleInput,
        module_db,
    )

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
(INFO,) = (info for info in module_db if info.module_cls is nn.LSTMCell)


def inputs(function: Any, dtype: torch.dtype) -> Any:
    return function(INFO, device="cpu", dtype=dtype, requires_grad=True, training=True)


def more(dtype: torch.dtype) -> Iterator[Any]:
    """Batched, without bias, without state."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    for bias in (True, False):
        for rows in ((), (0,), (1,), (4,)):
            for state in ((), (None,), ((tensor(*rows, 10), tensor(*rows, 10)),)):
                forward = FunctionInput(tensor(*rows, 5), *state)
                yield ModuleInput(FunctionInput(5, 10, bias=bias), forward)


@DTYPES
def test_samples(dtype: torch.dtype) -> None:
    """Outputs and gradients are those of nn.LSTMCell and, where torch has one, of its reference."""
    torch.manual_seed(0)
    count = 0
    for sample in [*inputs(INFO.module_inputs_func, dtype), *more(dtype)]:
        made, given = sample.constructor_input, sample.forward_input
        fused = lstmfused.LSTMCell(*made.args, **{**made.kwargs, "dtype": dtype})
        stock = nn.LSTMCell(*made.args, **{**made.kwargs, "dtype": dtype})
        stock.load_state_dict(fused.state_dict())
        found = fused(*given.args, **given.kwargs)
        expected = stock(*given.args, **given.kwargs)
        torch.testing.assert_close(found, expected)
        if sample.reference_fn:
            torch.testing.assert_close(found, sample.reference_fn(fused, *given.args))
        grads = [
            torch.autograd.grad(torch.cat(outputs, -1).square().sum(), list(module.parameters()))
            for module, outputs in ((fused, found), (stock, expected))
        ]
        for actual, want in zip(*grads, strict=True):
            # Sums of terms that cancel: their rounding follows the largest; torch's inputs reach 9.
            bound = 10 * ERROR[dtype] * max(1.0, float(want.abs().max()))
            torch.testing.assert_close(actual, want, rtol=0, atol=bound)
        count += 1
    assert count >= 26


@DTYPES
def test_error_inputs(dtype: torch.dtype) -> None:
    count = 0
    for error in inputs(INFO.module_error_inputs_func, dtype):
        made = error.module_error_input.constructor_input
        given = error.module_error_input.forward_input
        assert error.error_on is ModuleErrorEnum.FORWARD_ERROR
        module = lstmfused.LSTMCell(*made.args, **{**made.kwargs, "dtype": dtype})
        with pytest.raises(error.error_type, match=error.error_regex):
            module(*given.args, **given.kwargs)
        count += 1
    assert count >= 4
