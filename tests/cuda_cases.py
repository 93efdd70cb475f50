"""What the tests on CUDA tensors share: arguments, tolerances, comparisons.

Expected values are made on the device too, in float64.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import cases
import pytest
import torch
from cases import (
    DTYPES,
    ERROR,
    HALF,
    LAYOUTS,
    PARAMETERS,
    ROUNDINGS,
    Arguments,
    Cell,
    assert_close,
    cell,
    gradients,
    oracle,
    random_arguments,
    random_like,
)
from torch import Tensor

from lstmfused._ops import _C

# cuBLAS reads it when it starts: without it no product is allowed in torch's deterministic mode,
# which is what fills fresh memory with NaN.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DEVICE = "cuda"
SIZES = (1, 2, 3, 20, 51, 64, 130, 288)
BATCHES = (0, 1, 2, 5, 7, 8, 9, 16, 17, 31, 33, 64, 97, 128, 300)
# One for each way to compute a step: few rows, matrix instructions, products of another library.
PATHS = ((1, 5, 7), (7, 20, 33), (5, 64, 48), (40, 24, 32), (65, 51, 20), (300, 136, 72))
ALL = [True] * 7
ops = torch.ops.lstmfused
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
poisoned = pytest.mark.usefixtures("poisoned_device")


def missing() -> str:
    """Why there is nothing to test here, or nothing."""
    if not _C.cuda_architectures:
        return "the extension was built without CUDA"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a torch for CUDA warns where it finds no driver
        return "" if torch.cuda.is_available() else "there is no CUDA device here"


# --------------------------------------------------------------------------------------------------
# Comparisons


def tolerance(dtype: torch.dtype, depth: int, tf32: bool = False) -> float:
    """The error allowed of a sum of `depth` terms, per unit of its size.

    Kernels here may add one term after another, where those of the CPU add short sums: roundings
    then walk at random. Matrix instructions cut off what they add to, which is a drift.
    """
    if tf32 and dtype == torch.float32:
        return 2e-3
    walk = ERROR[dtype] * max(1.0, math.sqrt(depth) / 8)
    return max(2e-6, walk, 1e-8 * depth) if dtype in HALF else walk


def half_ulp(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2 if dtype in HALF else 0.0


def output_bound(name: str, dtype: torch.dtype, expected: Tensor, error: float) -> Tensor:
    size = expected.detach().double().abs()
    return error * size.clamp(min=1) + ROUNDINGS[name] * half_ulp(dtype) * size


def already(outputs: Sequence[Tensor]) -> Cell:
    """What was computed before, in the place of a call."""
    return lambda _: (outputs[0], outputs[1])


def depth_of(arguments: Arguments) -> int:
    return arguments.weight_ih.shape[1] + arguments.weight_hh.shape[1]


def check_forward(
    arguments: Arguments, case: object, function: Cell = cell, tf32: bool = False
) -> None:
    dtype = arguments.input.dtype
    error = tolerance(dtype, depth_of(arguments), tf32)

    def check(name: str, actual: Tensor, expected: Tensor, case: object) -> None:
        assert_close(actual, expected, output_bound(name, dtype, expected, error), (name, case))

    cases.check_forward(arguments, case, function, check)


def check_gradient(
    name: str, actual: Tensor, expected: Tensor, case: object, depth: int, rows: int, tf32: bool
) -> None:
    """As in cases.py, with more roundings of half types: of the gate gradients before they enter
    the products, of parts of a sum, which torch allows its products to round, and of gates in rows
    that repeat, where they do not average."""
    error, roundings = tolerance(actual.dtype, depth, tf32), ROUNDINGS["gradient"] + 4
    size = expected.detach().double().abs()
    largest = torch.cat([size.flatten(), size.new_ones(1)]).max()
    terms = largest.clamp(min=math.sqrt(rows) / 2 if name in PARAMETERS else 0.5)
    tf32_error = error * terms if tf32 else 0.0
    bound = error * largest + tf32_error + roundings * half_ulp(actual.dtype) * terms
    assert_close(actual, expected, bound, (name, case))


def like(t: Tensor, seed: int = 1) -> Tensor:
    """Random numbers, the same on every device."""
    return random_like(t, seed).to(t.device)


def incoming(arguments: Arguments, use: str = "hc", seed: int = 1) -> list[Tensor | None]:
    """Gradients of h and c, where `use` has them."""
    arguments = arguments.map(Tensor.detach)
    rows = arguments.input.shape[:-1]
    shape = arguments.input.new_empty(*rows, arguments.weight_hh.shape[1])
    return [like(shape, seed + k) if name in use else None for k, name in enumerate("hc")]


def expected_gradients(arguments: Arguments, grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
    wide = [None if g is None else g.double() for g in grads]
    return gradients(oracle, arguments.double(), *wide)


def compare_gradients(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    arguments: Arguments,
    case: object,
    tf32: bool = False,
) -> None:
    rows = len(arguments.input) if arguments.input.dim() == 2 else 1
    depth = max(depth_of(arguments), arguments.weight_hh.shape[0], rows)
    for name, found in actual.items():
        assert found.dtype == arguments.input.dtype, (name, case)
        assert found.device == arguments.input.device, (name, case)
        check_gradient(name, found, expected[name], case, depth, rows, tf32)


def check_gradients(
    arguments: Arguments, case: object, use: str = "hc", function: Cell = cell, tf32: bool = False
) -> None:
    grads = incoming(arguments, use)
    found = gradients(function, arguments, *grads)
    compare_gradients(found, expected_gradients(arguments, grads), arguments, case, tf32)


def on(
    device: str, B: int | None, I: int, H: int, dtype: torch.dtype = torch.float32, **form: Any
) -> Arguments:
    return random_arguments(B, I, H, dtype, **form).map(lambda t: t.to(device))


def in_dtype(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    return arguments.map(lambda t: t.to(dtype))


def everything(arguments: Arguments) -> list[Tensor]:
    """Outputs of inference and of training, and all gradients."""
    outputs = cell(arguments)
    trained = [t.detach() for t in cell(arguments.trainable())]
    found = gradients(cell, arguments, *incoming(arguments))
    return [*outputs, *trained, *found.values()]


def same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def offset(t: Tensor) -> Tensor:
    """Contiguous, from the second element of its memory on."""
    larger = t.new_full([t.numel() + 1], math.nan)
    return larger[1:].view(t.shape).copy_(t)


def wider(by: int) -> Callable[[Tensor], Tensor]:
    """Rows that lie further apart than they are long."""

    def apply(t: Tensor) -> Tensor:
        larger = t.new_full([*t.shape[:-1], t.shape[-1] + by], math.nan)
        return larger[..., : t.shape[-1]].copy_(t)

    return apply


def a_step_of_many(t: Tensor) -> Tensor:
    """x[:, t] of a sequence."""
    larger = t.new_full([*t.shape[:-1], 3, t.shape[-1]], math.nan)
    return larger[..., 1, :].copy_(t)


FORMS: tuple[dict[str, Any], ...] = (
    {},
    {"state": False},
    {"bias": (False, False)},
    {"bias": (True, False)},
    {"bias": (False, True)},
    {"state": False, "bias": (False, False)},
)
EVERY_LAYOUT: dict[str, Callable[[Tensor], Tensor]] = {
    **LAYOUTS,
    "offset": offset,
    "wider by 1": wider(1),
    "wider by 8": wider(8),
    "a step of many": a_step_of_many,
}
