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
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from .cases import STEP, TRAINING, WITHOUT_GRAD, Case, Shape
from .format import table
from .peers import PEERS
from .problem import Problem, verify
from .timing import ROUNDS, by_turns, called

Call = Callable[[], object]
ATTEMPTS = 4
CORES = os.cpu_count() or 1
LEAVES = ("input", "hx", "cx", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
DENORMAL = {"input": LEAVES[:1], "state": LEAVES[1:3], "weights": LEAVES[3:5]}
DENORMAL |= {"biases": LEAVES[5:], "all": LEAVES}
LOPSIDED = (*((Shape(*of), 100_000) for of in ((1, 1), (3, 3), (16, 1))), (Shape(64, 2100), 1))
SQUARE = Shape(256, 256)


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
    run, grad = bound.run(case.mode), case.mode not in WITHOUT_GRAD
    with torch.set_grad_enabled(grad):
        verify(peer, bound, case.mode)

    def call() -> None:
        torch.set_num_threads(case.threads)
        with torch.set_grad_enabled(grad):
            run()

    return call


class Cliff(NamedTuple):
    """No call is to take more than `bound` times as long as the first one, by the unit of work."""

    name: str
    calls: Mapping[str, Call]
    bound: float
    work: Mapping[str, float]

    def ratios(self) -> dict[str, float]:
        samplers = {name: called(call) for name, call in self.calls.items()}
        timings = by_turns(samplers, 0.06 * len(samplers), ROUNDS["cpu"])
        paces = {name: timing.median / self.work.get(name, 1) for name, timing in timings.items()}
        return {name: pace / next(iter(paces.values())) for name, pace in paces.items()}

    def least(self) -> dict[str, float]:
        """The ratios of the attempt whose largest is the least; it ends once none is too large."""
        attempts = []
        for _ in range(ATTEMPTS):
            attempts.append(self.ratios())
            if max(attempts[-1].values()) <= self.bound:
                break
        return min(attempts, key=lambda found: max(found.values()))


def denormal(t: Tensor) -> Tensor:
    return torch.nn.Parameter(t.detach().clamp(-1, 1) * (torch.finfo(t.dtype).tiny / 4))


def denormals(case: Case) -> Cliff:
    """Beyond what they cost torch's own cell: some processors stop and think about each of them."""
    normal = Problem(case)
    given = {"normal": normal}
    for where, names in DENORMAL.items():
        given[where] = normal.replaced({name: denormal(normal.leaves[name]) for name in names})
    if case.mode == TRAINING:
        given["gradients"] = normal.replaced({})
        first, second = (denormal(gradient).detach() for gradient in normal.grad_outputs)
        given["gradients"].grad_outputs = first, second
    own, torchs = (
        {where: calling(case, problem, peer) for where, problem in given.items()}
        for peer in ("lstmfused", "torch")
    )
    bound = 3 * max(Cliff("", torchs, float("inf"), {}).ratios().values())
    return Cliff(f"denormals, {case}", own, bound, {})


def cliffs() -> Iterator[Cliff]:
    for mode, B, dtype in product(STEP, (1, 64), ("float32", "float64")):
        yield denormals(Case(Shape(128, 128), B, mode, dtype))
    # A multiply-add costs about the same where the size is no multiple of the vector. One row's
    # gradients are all stores, each of which may cost twice as much where it lies across two lines.
    for mode, B, size in product(STEP, (1, 8, 64), (256, 512)):
        cases = {str(n): Case(Shape(n, n), B, mode) for n in (size, size - 1, size + 1)}
        calls = {name: calling(case) for name, case in cases.items()}
        work = {name: float(case.flops) for name, case in cases.items()}
        bound = 2.5 if mode == TRAINING and B == 1 else 1.5
        yield Cliff(f"near {size} units, B = {B}, {mode}", calls, bound, work)
    counts = [(shape, B, (1, min(2, CORES))) for shape, B in LOPSIDED]  # and more than cores
    for (shape, B, threads), mode in product([*counts, (SQUARE, 64, (CORES, 8 * CORES))], STEP):
        calls = {str(n): calling(Case(shape, B, mode, threads=n)) for n in threads}
        yield Cliff(f"threads, {shape}, B = {B}, {mode}", calls, 3, {})
    with ThreadPoolExecutor(4) as pool:  # of Python, each with as many threads as there are cores
        for units, B in ((512, 1), (256, 64)):
            call = calling(Case(Shape(units, units), B, threads=CORES))

            def repeated(count: int, call: Call = call) -> None:
                for _ in range(count):
                    call()

            def at_once(repeated: Callable[[int], None] = repeated) -> None:
                list(pool.map(repeated, [30] * 4))

            calls = {"in turn": partial(repeated, 120), "at once": at_once}
            yield Cliff(f"several callers, {units} units, B = {B}", calls, 3, {})


def main() -> int:
    keep_memory()
    if (load := os.getloadavg()[0]) > CORES:
        print(f"others are at work on these cores: a load of {load:.1f}", file=sys.stderr)
    lines, over = [], 0
    for cliff in cliffs():
        torch.set_num_threads(1)
        ratios = cliff.least()
        worst = max(ratios, key=lambda name: ratios[name])
        beyond = ratios[worst] > cliff.bound
        over += beyond
        bound = f"{cliff.bound:.1f}x", "CLIFF" * beyond
        lines.append([cliff.name, f"{ratios[worst]:.2f}x", worst, *bound])
    print(table(["", "slowest", "at", "allowed", ""], lines))
    return int(over > 0)
