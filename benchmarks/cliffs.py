"""python -m benchmarks.cliffs: numbers, sizes and threads at which kernels are apt to be slow.

Times are ratios within one interleaved run. A bound is far above what is expected and far below
what a cliff costs, and to be over it a ratio must be so again and again. On cores that others use,
it says nothing.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import torch
from torch import Tensor

import lstmfused  # noqa: F401  # whose operators are timed

from .report import table
from .timing import measure

Call = Callable[[], object]
Arguments = dict[str, Tensor]
ATTEMPTS = 4
CORES = os.cpu_count() or 1
ops = torch.ops.lstmfused


def keep_memory() -> None:
    """Nothing freed goes back to the system from now on, where C's library lets one ask for that.
    Else all that was allocated before decides which call has its outputs' pages made anew each
    time, at several times the cost of the call."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, mmap_threshold = -1, -3  # of glibc's malloc.h
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 32 << 20)  # the most there may be


def arguments(B: int, I: int, H: int, dtype: torch.dtype = torch.float32) -> Arguments:
    generator = torch.Generator().manual_seed(0)
    sizes: dict[str, tuple[int, ...]] = {"input": (B, I), "hx": (B, H), "cx": (B, H)}
    sizes |= {"weight_ih": (4 * H, I), "weight_hh": (4 * H, H), "bias_ih": (4 * H,)}
    sizes |= {"bias_hh": (4 * H,)}
    scale = {name: max(I, H) ** -0.5 for name in sizes if "_" in name}
    return {
        name: torch.randn(size, generator=generator, dtype=dtype) * scale.get(name, 1)
        for name, size in sizes.items()
    }


def forward(given: Arguments) -> Call:
    return lambda: ops.lstm_cell(*given.values())


def backward(given: Arguments, *grads: Tensor) -> Call:
    h, c, gates = ops.lstm_cell_forward(*given.values())
    back = (*(grads or (torch.ones_like(h), torch.ones_like(c))), gates, *list(given.values())[:5])
    return lambda: ops.lstm_cell_backward(*back, [True] * 7)


def torchs(given: Arguments) -> Call:
    x, h, c, *weights = given.values()
    return lambda: torch.lstm_cell(x, (h, c), *weights)


def on_threads(call: Call, threads: int) -> Call:
    def run() -> None:
        torch.set_num_threads(threads)
        call()

    return run


class Cliff:
    """No call is to take more than `bound` times as long as the first one, by the unit of work."""

    def __init__(
        self,
        name: str,
        calls: Mapping[str, Call],
        bound: float,
        work: Mapping[str, float] | None = None,
    ) -> None:
        self.name, self.calls, self.bound, self.work = name, calls, bound, work or {}

    def ratios(self) -> dict[str, float]:
        timings = measure(self.calls, seconds=0.06 * len(self.calls))
        paces = {name: timing.q1 / self.work.get(name, 1) for name, timing in timings.items()}
        base = next(iter(paces.values()))
        return {name: pace / base for name, pace in paces.items()}

    def least(self) -> dict[str, float]:
        """The ratios of the attempt whose largest is the least; it ends once none is too large."""
        attempts = []
        for _ in range(ATTEMPTS):
            attempts.append(self.ratios())
            if max(attempts[-1].values()) <= self.bound:
                break
        return min(attempts, key=lambda found: max(found.values()))


# Which arguments become denormal.
DENORMAL = {
    "input": ("input",),
    "state": ("hx", "cx"),
    "weights": ("weight_ih", "weight_hh"),
    "biases": ("bias_ih", "bias_hh"),
}


def denormal(t: Tensor) -> Tensor:
    return t.clamp(-1, 1) * (torch.finfo(t.dtype).tiny / 4)


def denormals() -> Iterator[Cliff]:
    """Beyond what they cost torch's own cell: some processors stop and think about each of them."""
    for dtype, B in product((torch.float32, torch.float64), (1, 64)):
        normal = arguments(B, 128, 128, dtype)
        steps = {"normal": normal}
        for where, names in {**DENORMAL, "all": tuple(normal)}.items():
            steps[where] = normal | {name: denormal(normal[name]) for name in names}
        own = Cliff("", {name: torchs(given) for name, given in steps.items()}, float("inf"))
        bound = 3 * max(1, *own.ratios().values())
        name = f"denormals, B = {B}, {str(dtype).removeprefix('torch.')}"
        yield Cliff(f"{name}, forward", {k: forward(v) for k, v in steps.items()}, bound)
        grads = denormal(normal["hx"]), denormal(normal["cx"])
        backwards = {k: backward(v) for k, v in steps.items()}
        backwards["gradients"] = backward(normal, *grads)
        yield Cliff(f"{name}, backward", backwards, bound)


def odd_sizes() -> Iterator[Cliff]:
    """A multiply-add costs about the same where the size is no multiple of the vector. One row's
    gradients are all stores, each of which may cost twice as much where it lies across two lines:
    that alone is more than 1.5."""
    for sizes, kernel, B in product(
        ((256, 255, 257), (512, 511, 513)), (forward, backward), (1, 8, 64)
    ):
        calls = {str(n): kernel(arguments(B, n, n)) for n in sizes}
        bound = 2.5 if kernel is backward and B == 1 else 1.5
        work = {str(n): float(n * n) for n in sizes}
        yield Cliff(f"near {sizes[0]} units, B = {B}, {kernel.__name__}", calls, bound, work)


def threads() -> Iterator[Cliff]:
    lopsided = ((100_000, 1, 1), (100_000, 3, 3), (100_000, 64, 1), (1, 64, 2100))
    for shape, kernel in product(lopsided, (forward, backward)):
        call = kernel(arguments(*shape))
        calls = {"one": on_threads(call, 1), "two": on_threads(call, min(2, CORES))}
        yield Cliff(f"a second thread, {shape}, {kernel.__name__}", calls, 3)
    for kernel in (forward, backward):
        call = kernel(arguments(64, 256, 256))
        calls = {"cores": on_threads(call, CORES), "many": on_threads(call, 8 * CORES)}
        yield Cliff(f"more threads than cores, {kernel.__name__}", calls, 3)


def callers() -> Iterator[Cliff]:
    """Each Python thread has as many threads as there are cores."""
    with ThreadPoolExecutor(4) as pool:
        for shape in ((1, 512, 512), (64, 256, 256)):
            call = on_threads(forward(arguments(*shape)), CORES)

            def repeated(count: int, call: Call = call) -> None:
                for _ in range(count):
                    call()

            def at_once(repeated: Callable[[int], None] = repeated) -> None:
                list(pool.map(repeated, [30] * 4))

            calls = {"in turn": lambda repeated=repeated: repeated(120), "at once": at_once}
            yield Cliff(f"several callers, {shape}", calls, 3)


def main() -> int:
    keep_memory()
    if (load := os.getloadavg()[0]) > CORES:
        print(f"others are at work on these cores: a load of {load:.1f}", file=sys.stderr)
    lines, over = [], 0
    for cliffs in (denormals, odd_sizes, threads, callers):
        for cliff in cliffs():
            torch.set_num_threads(1)
            ratios = cliff.least()
            worst = max(ratios, key=lambda name: ratios[name])
            beyond = ratios[worst] > cliff.bound
            over += beyond
            verdict = "CLIFF" if beyond else ""
            lines.append(
                [cliff.name, f"{ratios[worst]:.2f}x", worst, f"{cliff.bound:.1f}x", verdict]
            )
    print(table(["", "slowest", "at", "allowed", ""], lines))
    return int(over > 0)


if __name__ == "__main__":
    sys.exit(main())
