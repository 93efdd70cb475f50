"""No cliffs: numbers, sizes and thread counts at which kernels are apt to be wrong.

Where they are apt to be slow, `python -m benchmarks --cliffs` measures them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    PARAMETERS,
    Arguments,
    assert_close,
    cell,
    check_forward,
    check_gradient,
    check_gradients,
    check_output,
    gradients,
    oracle,
    random_arguments,
    random_like,
)
from torch import Tensor

Call = Callable[[], object]


def forward(arguments: Arguments) -> Call:
    return lambda: torch.ops.lstmfused.lstm_cell(*arguments)


def backward(arguments: Arguments, *grads: Tensor) -> Call:
    h, c, gates = torch.ops.lstmfused.lstm_cell_forward(*arguments)
    given = (*(grads or (random_like(h, 1), random_like(c, 2))), gates, *arguments[:5])
    return lambda: torch.ops.lstmfused.lstm_cell_backward(*given, [True] * 7)


# --------------------------------------------------------------------------------------------------
# Denormal numbers

DENORMAL = {
    "input": ("input",),
    "state": ("h", "c"),
    "weights": ("weight_ih", "weight_hh"),
    "biases": ("bias_ih", "bias_hh"),
    "all": Arguments._fields,
}


def denormal(t: Tensor) -> Tensor:
    small = t.clamp(-1, 1) * (torch.finfo(t.dtype).tiny / 4)
    assert (small[t != 0].abs() < torch.finfo(t.dtype).tiny).all() and small.any()
    return small


def with_denormal(arguments: Arguments, names: tuple[str, ...]) -> Arguments:
    return arguments._replace(**{name: denormal(getattr(arguments, name)) for name in names})


@pytest.mark.parametrize("B", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_denormals_are_right(dtype: torch.dtype, B: int) -> None:
    arguments = random_arguments(B, 33, 40, dtype)
    for where, names in DENORMAL.items():
        check_forward(with_denormal(arguments, names), where)
        check_gradients(with_denormal(arguments, names), where)


@pytest.mark.parametrize("B", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_denormals_are_kept(dtype: torch.dtype, B: int) -> None:
    """Gates that are a half of nearly nothing, and gradients of it: not zero, but right to a few of
    the smallest numbers there are."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    arguments = with_denormal(random_arguments(B, 33, 40, dtype), Arguments._fields)
    bound = torch.tensor(4 * smallest, dtype=torch.float64)
    expected = oracle(arguments.double())
    for name, actual, want in zip("hc", cell(arguments), expected, strict=True):
        assert want.any()
        assert_close(actual, want, bound, name)
    grad_h, grad_c = (denormal(random_like(want, seed).to(dtype)) for seed in (1, 2))
    found = gradients(cell, arguments, grad_h, grad_c)
    wide = gradients(oracle, arguments.double(), grad_h.double(), grad_c.double())
    assert wide["c"].any()
    assert_close(found["c"], wide["c"], bound, "gradient of c")


# --------------------------------------------------------------------------------------------------
# Sizes


LOPSIDED = ((100_000, 1, 1), (100_000, 3, 3), (100_000, 64, 1), (1, 64, 2100))


def at(arguments: Arguments, rows: Tensor) -> Arguments:
    assert arguments.h is not None and arguments.c is not None
    x, h, c = (t[rows] for t in (arguments.input, arguments.h, arguments.c))
    return arguments._replace(input=x, h=h, c=c)


def some_rows(B: int, last: int) -> Tensor:
    """Indices of the first ones, of `last` at the end, and of some between."""
    between = torch.randint(B, (100,), generator=torch.Generator().manual_seed(0))
    return torch.tensor(sorted({*between.tolist(), *range(B)[:50], *range(B)[-last:]}))


def check_rows(arguments: Arguments, rows: Tensor, without: tuple[str, ...] = ()) -> None:
    """Outputs and gradients of these rows. The loss is of them alone, so gradients of parameters
    are sums over them."""
    near, case = at(arguments, rows), len(arguments.input)
    wanted = [name not in without for name in Arguments._fields]
    h, c, gates = torch.ops.lstmfused.lstm_cell_forward(*arguments)
    for name, actual, want in zip("hc", (h, c), oracle(near.double()), strict=True):
        check_output(name, actual[rows], want, case)
    del c
    grad_h = h.zero_()
    grad_h[rows] = random_like(grad_h[rows])
    found = torch.ops.lstmfused.lstm_cell_backward(grad_h, None, gates, *arguments[:5], wanted)
    expected = gradients(oracle, near.double(), grad_h[rows].double(), None)
    for (name, want), actual in zip(expected.items(), found, strict=True):
        if name in without:
            continue
        if name in PARAMETERS:
            check_gradient(name, actual, want, case, len(rows))
        else:
            check_gradient(name, actual[rows], want, case)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("shape", LOPSIDED, ids=str)
def test_few_units_or_one_row(shape: tuple[int, int, int]) -> None:
    arguments = random_arguments(*shape)
    check_forward(arguments, shape)
    check_rows(arguments, some_rows(shape[0], last=50))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("B", [1, 7, 64])
@pytest.mark.parametrize(("I", "H"), [(5000, 64), (64, 2100)])
def test_long_sums(I: int, H: int, B: int) -> None:
    arguments = random_arguments(B, I, H)
    check_forward(arguments, (B, I, H))
    check_gradients(arguments, (B, I, H))


# --------------------------------------------------------------------------------------------------
# More elements than an int counts

I, H = 1, 16
BEYOND = 1000  # rows whose gates are past 2**31 elements
ROWS = 2**31 // (4 * H) + BEYOND


def free_memory() -> int:
    """Bytes that this machine, and the group this process is in, still have; 0 where unknown."""
    free = []
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) * 1024)
    if (group / "memory.max").exists():
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free.append(int(limit) - int((group / "memory.current").read_text()))
    return min(free, default=0)


def need_memory(bytes_needed: int) -> None:
    if (free := free_memory()) < bytes_needed:
        pytest.skip(f"{bytes_needed / 1e9:.0f} GB wanted, {free / 1e9:.0f} GB free")


def many_rows(dtype: torch.dtype) -> Arguments:
    """The rows of the state are one and the same."""
    one = random_arguments(1, I, H, dtype)
    assert one.h is not None and one.c is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(ROWS, I, dtype=dtype).uniform_(-2, 2, generator=generator)
    return one._replace(input=x, h=one.h.expand(ROWS, H), c=one.c.expand(ROWS, H))


@pytest.mark.usefixtures("two_threads")
def test_beyond_2_31() -> None:
    """In a half type, whose gradients of the gates are one stretch. The products with weight_hh are
    those with weight_ih again, and H times as much work."""
    need_memory(18 * 10**9)
    check_rows(many_rows(torch.bfloat16), some_rows(ROWS, BEYOND), without=("h", "weight_hh"))


# --------------------------------------------------------------------------------------------------
# More threads than cores

CORES = os.cpu_count() or 1
MANY = 8 * CORES


@pytest.mark.parametrize("kernel", [forward, backward], ids=lambda kernel: kernel.__name__)
@pytest.mark.parametrize("shape", [(1, 512, 512), (64, 256, 256), (1000, 20, 20)], ids=str)
def test_more_threads_than_cores(
    shape: tuple[int, int, int], kernel: Callable[[Arguments], Any]
) -> None:
    """The same bits."""
    call = kernel(random_arguments(*shape))
    expected = call()
    torch.set_num_threads(MANY)
    assert all(map(torch.equal, call(), expected))


@pytest.mark.parametrize("shape", [(1, 512, 512), (64, 256, 256)], ids=str)
def test_several_callers_at_once(shape: tuple[int, int, int]) -> None:
    """Each Python thread has as many threads as there are cores."""
    call = forward(random_arguments(*shape))
    expected: Any = call()

    def repeated(_: int) -> bool:
        torch.set_num_threads(CORES)
        return all(all(map(torch.equal, call(), expected)) for _ in range(30))  # type: ignore[call-overload]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeated, range(4)))
