"""python -m benchmarks --cliffs: numbers, sizes and threads at which kernels are apt to be slow.

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
from typing import NamedTuple

import torch
from torch import Tensor

from .cases import INFERENCE, STEP, TRAINING, WITHOUT_GRAD, Case, Shape
from .format import table
from .peers import PEERS
from .problem import Problem, verify
from .timing import ROUNDS, by_turns, called

Call = Callable[[], object]
ATTEMPTS = 4
CORES = os.cpu_count() or 1
# What becomes denormal.
DENORMAL = {
    "input": ("input",),
    "state": ("hx", "cx"),
    "weights": ("weight_ih", "weight_hh"),
    "biases": ("bias_ih", "bias_hh"),
    "all": ("input", "hx", "cx", "weight_ih", "weight_hh", "bias_ih", "bias_hh"),
}


def keep_memory() -> None:
    """Nothing freed goes back to the system from now on, where C's library lets one ask for that.
    Else all that was allocated before decides which call has its outputs' pages made anew each
    time, at several times the cost of the call."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, mmap_threshold = -1, -3  # of glibc's malloc.h
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 32 << 20)  # the most there may be


def calling(case: Case, problem: Problem | None = None, peer: str = "lstmfused") -> Call:
    """A call of the case with its threads, found right."""
    bound = PEERS[peer].bind(problem or Problem(case))
    run = bound.run(case.mode)

    def call() -> None:
        torch.set_num_threads(case.threads)
        with torch.set_grad_enabled(case.mode not in WITHOUT_GRAD):
            run()

    with torch.set_grad_enabled(case.mode not in WITHOUT_GRAD):
        verify(peer, bound, case.mode)
    return call


class Cliff(NamedTuple):
    """No call is to take more than `bound` times as long as the first one, by the unit of work."""

    name: str
    calls: Mapping[str, Call]
    bound: float
    work: Mapping[str, float] = {}

    def ratios(self) -> dict[str, float]:
        samplers = {name: called(call) for name, call in self.calls.items()}
        timings = by_turns(samplers, 0.06 * len(samplers), ROUNDS["cpu"])
        paces = {name: timing.median / self.work.get(name, 1) for name, timing in timings.items()}
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


def denormal(t: Tensor) -> Tensor:
    small = t.detach().clamp(-1, 1) * (torch.finfo(t.dtype).tiny / 4)
    return torch.nn.Parameter(small)


def denormals() -> Iterator[Cliff]:
    """Beyond what they cost torch's own cell: some processors stop and think about each of them."""
    for dtype, B, mode in product(("float32", "float64"), (1, 64), STEP):
        case = Case(Shape(128, 128), B, mode, dtype)
        given = {"normal": Problem(case)}
        for where, names in DENORMAL.items():
            leaves = {name: denormal(given["normal"].leaves[name]) for name in names}
            given[where] = given["normal"].replaced(leaves)
        if mode == TRAINING:
            given["gradients"] = given["normal"].replaced({})
            first, second = map(denormal, given["normal"].grad_outputs)
            given["gradients"].grad_outputs = first.detach(), second.detach()
        own, torchs = (
            {where: calling(case, problem, peer) for where, problem in given.items()}
            for peer in ("lstmfused", "torch")
        )
        bound = 3 * max(Cliff("", torchs, float("inf")).ratios().values())
        yield Cliff(f"denormals, B = {B}, {dtype} {mode}", own, bound)


def odd_sizes() -> Iterator[Cliff]:
    """A multiply-add costs about the same where the size is no multiple of the vector. One row's
    gradients are all stores, each of which may cost twice as much where it lies across two lines:
    that alone is more than 1.5."""
    for sizes, mode, B in product(((256, 255, 257), (512, 511, 513)), STEP, (1, 8, 64)):
        calls = {str(n): calling(Case(Shape(n, n), B, mode)) for n in sizes}
        bound = 2.5 if mode == TRAINING and B == 1 else 1.5
        work = {str(n): float(n * n) for n in sizes}
        yield Cliff(f"near {sizes[0]} units, B = {B}, {mode}", calls, bound, work)


def threads() -> Iterator[Cliff]:
    lopsided = (((1, 1), 100_000), ((3, 3), 100_000), ((64, 1), 100_000), ((64, 2100), 1))
    for ((I, H), B), mode in product(lopsided, STEP):
        case = Case(Shape(I, H), B, mode)
        counts = {"one": 1, "two": min(2, CORES)}
        calls = {name: calling(case._replace(threads=count)) for name, count in counts.items()}
        yield Cliff(f"a second thread, {I}→{H}, B = {B}, {mode}", calls, 3)
    for mode in STEP:
        case, counts = Case(Shape(256, 256), 64, mode), {"cores": CORES, "many": 8 * CORES}
        calls = {name: calling(case._replace(threads=count)) for name, count in counts.items()}
        yield Cliff(f"more threads than cores, {mode}", calls, 3)


def callers() -> Iterator[Cliff]:
    """Each Python thread has as many threads as there are cores."""
    with ThreadPoolExecutor(4) as pool:
        for units, B in ((512, 1), (256, 64)):
            call = calling(Case(Shape(units, units), B, INFERENCE, threads=CORES))

            def repeated(count: int, call: Call = call) -> None:
                for _ in range(count):
                    call()

            def at_once(repeated: Callable[[int], None] = repeated) -> None:
                list(pool.map(repeated, [30] * 4))

            calls = {"in turn": lambda repeated=repeated: repeated(120), "at once": at_once}
            yield Cliff(f"several callers, {units} units, B = {B}", calls, 3)


KINDS = (denormals, odd_sizes, threads, callers)


def main() -> int:
    keep_memory()
    if (load := os.getloadavg()[0]) > CORES:
        print(f"others are at work on these cores: a load of {load:.1f}", file=sys.stderr)
    lines, over = [], 0
    for kind in KINDS:
        for cliff in kind():
            torch.set_num_threads(1)
            ratios = cliff.least()
            worst = max(ratios, key=lambda name: ratios[name])
            beyond = ratios[worst] > cliff.bound
            over += beyond
            verdict, bound = "CLIFF" * beyond, f"{cliff.bound:.1f}x"
            lines.append([cliff.name, f"{ratios[worst]:.2f}x", worst, bound, verdict])
    print(table(["", "slowest", "at", "allowed", ""], lines))
    return int(over > 0)
