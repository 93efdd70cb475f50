"""No rows, no inputs, no units: each alone and together, in every operator and dtype."""

from itertools import product

import pytest
import torch
from cases import (
    DTYPES,
    activated_gates,
    cell,
    check_forward,
    check_gradients,
    gradients,
    random_arguments,
    random_like,
    run_python,
)
from torch import nn

import lstmfused

ops = torch.ops.lstmfused
# Sizes that take each of the kernels' ways: dots, panels, and products cut into pieces.
SHAPES = [
    (B, I, H)
    for B, I, H in product((0, 1, 3, 33, 300), (0, 1, 9, 130), (0, 1, 8, 9, 20, 100))
    if 0 in (B, I, H)
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for state in (True, False):
            arguments = random_arguments(*shape, dtype, state=state)
            check_forward(arguments, shape)
        for use in ("hc", "h", "c"):
            check_gradients(random_arguments(*shape, dtype), (shape, use), use)


@pytest.mark.usefixtures("poisoned_memory", "two_threads")
def test_step_in_two_threads() -> None:
    for shape in SHAPES:
        check_gradients(random_arguments(*shape), shape)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_rows_or_units_every_gradient_is_zero(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        if 0 not in shape[::2]:
            continue
        arguments = random_arguments(*shape, dtype)
        grad = random_like(arguments.c)  # type: ignore[arg-type]
        for name, found in gradients(cell, arguments, grad, grad).items():
            assert found.shape == getattr(arguments, name).shape
            assert not found.any(), (shape, name)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inner_operators(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        arguments = random_arguments(*shape, dtype)
        x, h, c, weight_ih, weight_hh, *_ = arguments
        next_h, next_c, gates = ops.lstm_cell_forward(*arguments)
        assert all(map(torch.equal, ops.lstm_cell(*arguments), (next_h, next_c)))
        torch.testing.assert_close(gates, activated_gates(arguments.double()).to(dtype))
        given = (random_like(next_h), None, gates, x, h, c, weight_ih, weight_hh)
        expected = gradients(cell, arguments, given[0], None).values()
        for op in (ops.lstm_cell_backward, ops.lstm_cell_backward_reuse_gates):
            for mask in ([True] * 7, [True] * 3 + [False] * 4, [False] * 3 + [True] * 4):
                copies = [t if t is None else t.clone() for t in given]
                for found, want, wanted in zip(op(*copies, mask), expected, mask, strict=True):
                    assert torch.equal(found, want) if wanted else found.shape == (0,)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_packed(weight_dtype: torch.dtype) -> None:
    """Weights of powers of two are the same in every dtype."""
    for B, I, H in SHAPES:
        stock = nn.LSTMCell(I, H)
        with torch.no_grad():
            for p in stock.parameters():
                p.copy_(torch.where(p > 0, 0.125, -0.125))
            h = c = torch.ones(B, H)
            x = torch.ones(B, I)
            packed = lstmfused.PackedLSTMCell(stock, weight_dtype)
            for given in ((x, (h, c)), (x,)):
                for actual, want in zip(packed(*given), stock(*given), strict=True):
                    torch.testing.assert_close(actual, want)


@pytest.mark.parametrize("threads", [1, 2])
def test_backward_without_input_ends_well(threads: int) -> None:
    """It once divided by zero, which ends the process."""
    run_python(
        "-c",
        f"import torch, lstmfused; torch.set_num_threads({threads})\n"
        "for B in (1, 4, 33):\n"
        "    for H in (8, 9, 20, 32):\n"
        "        h, c = lstmfused.LSTMCell(0, H)(torch.zeros(B, 0))\n"
        "        (h.sum() + c.sum()).backward()",
    )
