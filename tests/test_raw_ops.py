"""The inner operators called by hand: right results, and an error instead of a crash."""

from itertools import product
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    Arguments,
    activated_gates,
    check_gradient,
    check_output,
    gradients,
    oracle,
    random_arguments,
    random_like,
)
from torch import Tensor, zeros

import lstmfused  # noqa: F401  registers the operators

pytestmark = pytest.mark.usefixtures("poisoned_memory")

B, I, H = 3, 10, 20
ops = torch.ops.lstmfused
GRADIENTS = ("input", "h", "c", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
ALL = [True] * 7
WRONG = {
    "input": [(B, I + 1), (B + 1, I), (I,), (1, B, I), (0, I)],
    "h": [(B, H + 1), (B + 1, H), (H,), (1, B, H), (1, H), (B, 1)],
    "c": [(B, H - 1), (B - 1, H), (H,), (1, B, H), (1, H), (B, 1)],
    "weight_ih": [(4 * H + 1, I), (4 * H, I - 1), (4 * H,), (H, I), (1, 4 * H, I)],
    "weight_hh": [(4 * H - 1, H), (4 * H, H + 1), (4 * H,), (H, H), (H, 4 * H)],
    "bias_ih": [(4 * H - 1,), (1,), (1, 4 * H), ()],
    "bias_hh": [(4 * H + 1,), (H,), (4 * H, 1), (0,)],
}


def backward_arguments(arguments: Arguments, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Everything that lstm_cell_backward takes, by name."""
    wide = arguments.double()
    assert wide.h is not None
    return {
        "grad_h": random_like(wide.h, 1).to(dtype),
        "grad_c": random_like(wide.h, 2).to(dtype),
        "gates": activated_gates(wide).to(dtype),
        **dict(zip(GRADIENTS[:5], arguments[:5], strict=True)),
    }


def backward(given: dict[str, Any], mask: list[bool] = ALL) -> list[Tensor]:
    """By both operators, of which one may use up the gates and nothing else."""
    copy: dict[str, Any] = {n: t if t is None else t.clone() for n, t in given.items()}
    found = list(ops.lstm_cell_backward(*given.values(), mask))
    again = list(ops.lstm_cell_backward_reuse_gates(*copy.values(), mask))
    assert all(map(torch.equal, again, found))
    for name in copy.keys() - {"gates"}:
        assert given[name] is None or torch.equal(copy[name], given[name]), name
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(dtype: torch.dtype) -> None:
    for rows, bias in product((0, 1, 5, 65), product((True, False), repeat=2)):
        arguments = random_arguments(rows, I, H, dtype, bias=bias)
        h, c, gates = ops.lstm_cell_forward(*arguments)
        wide = arguments.double()
        for name, actual, want in zip("hc", (h, c), oracle(wide), strict=True):
            check_output(name, actual, want, (rows, bias))
        assert gates.shape == (rows, 4 * H)
        assert gates.dtype == dtype
        check_output("c", gates, activated_gates(wide), "gates")
        # The operator that keeps no gates has the same state, to the bit.
        assert all(map(torch.equal, ops.lstm_cell(*arguments), (h, c)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("use", ["hc", "h", "c", ""])
def test_backward(use: str, dtype: torch.dtype) -> None:
    """Every mask; outputs that are not wanted are empty."""
    arguments = random_arguments(B, I, H, dtype)
    given = backward_arguments(arguments, dtype)
    for name in {"h", "c"} - set(use):
        given[f"grad_{name}"] = None
    wide = [None if given[n] is None else given[n].double() for n in ("grad_h", "grad_c")]
    if use:
        expected = gradients(oracle, arguments.double(), *wide)
    else:
        expected = {n: torch.zeros_like(t) for n, t in arguments.double()._asdict().items()}
    for mask in product((True, False), repeat=7):
        found = backward(given, list(mask))
        for name, actual, wanted in zip(GRADIENTS, found, mask, strict=True):
            assert actual.dtype == dtype
            if wanted:
                check_gradient(name, actual, expected[name], (use, mask))
            else:
                assert actual.shape == (0,), (name, mask)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_shapes(name: str) -> None:
    arguments = random_arguments(B, I, H)
    for shape in WRONG[name]:
        bad = arguments._replace(**{name: zeros(shape)})
        with pytest.raises(RuntimeError):
            ops.lstm_cell_forward(*bad)
        with pytest.raises((RuntimeError, ValueError)):
            ops.lstm_cell(*bad)
        if name in GRADIENTS[:5]:
            with pytest.raises(RuntimeError):
                backward({**backward_arguments(arguments), name: zeros(shape)})


@pytest.mark.parametrize("name", ["grad_h", "grad_c", "gates"])
def test_wrong_shapes_of_backward(name: str) -> None:
    units = 4 * H if name == "gates" else H
    given = backward_arguments(random_arguments(B, I, H))
    for shape in ((B, units + 1), (B + 1, units), (1, units), (units,), (1, B, units), (0,), ()):
        with pytest.raises(RuntimeError):
            backward({**given, name: zeros(shape)})


@pytest.mark.parametrize("name", ["grad_h", "grad_c", "gates", *GRADIENTS[:5]])
def test_wrong_dtypes_of_backward(name: str) -> None:
    given = backward_arguments(random_arguments(B, I, H))
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        with pytest.raises((RuntimeError, NotImplementedError)):
            backward({**given, name: given[name].to(dtype)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_from_what_it_needs(dtype: torch.dtype) -> None:
    """A gradient takes the other factor of its product, and an error names one that is missing."""
    needed = {"input": "weight_ih", "h": "weight_hh", "weight_ih": "input", "weight_hh": "h"}
    given = backward_arguments(random_arguments(B, I, H, dtype), dtype)
    expected = dict(zip(GRADIENTS, backward(given), strict=True))
    for wanted in product((True, False), repeat=7):
        names = {n for n, want in zip(GRADIENTS, wanted, strict=True) if want}
        factors = {needed[n] for n in names & needed.keys()}
        least = {n: None if n in needed and n not in factors else t for n, t in given.items()}
        for name, found in zip(GRADIENTS, backward(least, list(wanted)), strict=True):
            assert torch.equal(found, expected[name]) if name in names else found.shape == (0,)
        for missing in factors:
            with pytest.raises(RuntimeError, match=f"takes {missing}|takes hx"):
                backward({**least, missing: None}, list(wanted))


@pytest.mark.parametrize("length", [0, 1, 6, 8])
def test_wrong_mask(length: int) -> None:
    given = backward_arguments(random_arguments(B, I, H))
    with pytest.raises(RuntimeError):
        backward(given, [True] * length)


def test_strided_arguments_of_backward() -> None:
    arguments = random_arguments(B, I, H)
    given = backward_arguments(arguments)
    strided = {name: t.mT.contiguous().mT for name, t in given.items()}
    assert not any(t.is_contiguous() for t in strided.values())
    expected = backward(backward_arguments(arguments.double(), torch.float64))
    for name, actual, want in zip(GRADIENTS, backward(strided), expected, strict=True):
        check_gradient(name, actual, want, "strided")
