"""No cliffs: numbers, sizes and thread counts at which kernels are apt to be wrong or very slow.

Times are ratios within one interleaved run. A bound is far above what is expected and far below
what a cliff costs, and to fail it must be exceeded again and again.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Mapping
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
    torch_cell,
)
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmarks are not installed

from benchmarks.timing import measure

Call = Callable[[], object]
ATTEMPTS = 4


@pytest.fixture(autouse=True, scope="module")
def keep_memory() -> None:
    """Nothing freed goes back to the system from now on, where C's library lets one ask for that.
    Else all that was allocated before decides which call has its outputs' pages made anew each
    time, at several times the cost of the call."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, mmap_threshold = -1, -3  # of glibc's malloc.h
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 32 << 20)  # the most there may be


def paces(calls: Mapping[str, Call], work: Mapping[str, float]) -> dict[str, float]:
    timings = measure(calls, seconds=0.06 * len(calls))
    return {name: timing.q1 / work.get(name, 1) for name, timing in timings.items()}


def check_pace(
    calls: Mapping[str, Call], bound: float, work: Mapping[str, float] | None = None
) -> None:
    """No call takes more than `bound` times as long as the first one, by the unit of work."""
    base = next(iter(calls))
    for _ in range(ATTEMPTS):
        found = paces(calls, work or {})
        ratios = {name: pace / found[base] for name, pace in found.items()}
        if max(ratios.values()) <= bound:
            return
    raise AssertionError(f"times of {base!r}, more than {bound} allowed: {ratios}")


def forward(arguments: Arguments) -> Call:
    return lambda: torch.ops.lstmfused.lstm_cell(*arguments)


def backward(arguments: Arguments, *grads: Tensor) -> Call:
    h, c, gates = torch.ops.lstmfused.lstm_cell_forward(*arguments)
    given = (*(grads or (random_like(h, 1), random_like(c, 2))), gates, *arguments[:5])
    return lambda: torch.ops.lstmfused.lstm_cell_backward(*given, [True] * 7)


def on_threads(call: Call, threads: int) -> Call:
    def run() -> None:
        torch.set_num_threads(threads)
        call()

    return run


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


@pytest.mark.parametrize("B", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_denormals_cost_no_more(dtype: torch.dtype, B: int) -> None:
    """Beyond what they cost torch's own cell: some processors stop and think about each of them."""
    arguments = random_arguments(B, 128, 128, dtype)
    changed = {where: with_denormal(arguments, names) for where, names in DENORMAL.items()}
    steps = {"normal": arguments, **changed}
    grads = denormal(arguments.input), denormal(arguments.input)
    backwards = {name: backward(a) for name, a in steps.items()}
    backwards |= {"gradients": backward(arguments, *grads)}
    with torch.no_grad():
        torchs = {name: lambda a=a: torch_cell(a) for name, a in steps.items()}
        found = paces(torchs, {})
        bound = 3 * max(1, max(found.values()) / found["normal"])
        check_pace({name: forward(a) for name, a in steps.items()}, bound)
        check_pace(backwards, bound)


# --------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("B", [1, 8, 64])
@pytest.mark.parametrize("kernel", [forward, backward], ids=lambda kernel: kernel.__name__)
@pytest.mark.parametrize("sizes", [(256, 255, 257), (512, 511, 513)], ids=str)
def test_pace_at_odd_sizes(
    sizes: tuple[int, ...], kernel: Callable[[Arguments], Call], B: int
) -> None:
    """A multiply-add costs about the same where the size is no multiple of the vector. One row's
    gradients are all stores, each of which may cost twice as much where it lies across two lines:
    that alone is more than 1.5."""
    calls = {str(n): kernel(random_arguments(B, n, n)) for n in sizes}
    only_stores = kernel is backward and B == 1
    check_pace(calls, 2.5 if only_stores else 1.5, {str(n): n * n for n in sizes})


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


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core: a second thread has none")
@pytest.mark.parametrize("kernel", [forward, backward], ids=lambda kernel: kernel.__name__)
@pytest.mark.parametrize("shape", LOPSIDED, ids=str)
def test_a_second_thread_does_no_harm(
    shape: tuple[int, int, int], kernel: Callable[[Arguments], Call]
) -> None:
    if (load := os.getloadavg()[0]) > (os.cpu_count() or 1):
        pytest.skip(f"others are at work on these cores: a load of {load:.1f}")
    call = kernel(random_arguments(*shape))
    check_pace({"one": on_threads(call, 1), "two": on_threads(call, 2)}, 3)


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
    """The same bits, and in calls that are not over before all threads have woken, as soon."""
    call = kernel(random_arguments(*shape))
    expected = call()
    torch.set_num_threads(MANY)
    assert all(map(torch.equal, call(), expected))
    if shape == (64, 256, 256):
        check_pace({"cores": on_threads(call, CORES), "many": on_threads(call, MANY)}, 3)


@pytest.mark.parametrize("shape", [(1, 512, 512), (64, 256, 256)], ids=str)
def test_several_callers_at_once(shape: tuple[int, int, int]) -> None:
    """Each Python thread has as many threads as there are cores."""
    call, callers, times = on_threads(forward(random_arguments(*shape)), CORES), 4, 30

    def repeated(count: int) -> None:
        for _ in range(count):
            call()

    with ThreadPoolExecutor(callers) as pool:
        check_pace(
            {
                "in turn": lambda: repeated(callers * times),
                "at once": lambda: list(pool.map(repeated, [times] * callers)),
            },
            3,
        )
