"""One row of the result: a case, checked, timed and set against its limit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from itertools import product
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .contestants import Contestant
from .roofline import Roofline
from .shapes import DOUBLE_BACKWARD, DOUBLE_SHAPES, SHAPES, Case, Shape
from .timing import measure
from .verify import Forward, Problem, WrongResult, verify


def steps(field: list[Contestant], problem: Problem) -> tuple[dict[str, Forward], dict[str, str]]:
    """A step for every contestant, each found right; and which peers broke down, and how.

    Wrong numbers end the run. A peer that cannot run a case at all does not: torch.compile's
    C++, for one, does not always compile in bfloat16.
    """
    right, broken = {}, {}
    for contestant in field:
        name = contestant.name
        if not contestant.supports(problem.case):
            continue
        try:
            right[name] = problem.step(contestant.forward(problem))
            if contestant.computes:
                with contestant.context():
                    verify(name, problem, right[name])
        except Exception as error:
            if isinstance(error, WrongResult) or name.startswith("lstmfused"):
                raise
            right.pop(name, None)
            broken[name] = type(error).__name__
            tqdm.write(f"{name} left out at {problem.case}: {broken[name]}")
    return right, broken


def contexts(field: list[Contestant]) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    return {contestant.name: contestant.context for contestant in field}


def row(case: Case, field: list[Contestant], seconds: float, seed: int) -> dict[str, Any]:
    """Times in microseconds; `speedup` is lstmfused over each peer."""
    torch.set_num_threads(case.threads)
    with torch.set_grad_enabled(case.mode != "inference"):
        right, broken = steps(field, Problem(case, seed))
        timings = measure(right, seconds, seed, contexts(field))
    median = {name: timing.median for name, timing in timings.items()}
    own = median.get("lstmfused")
    return {
        **case.columns(),
        "microseconds": {name: asdict(timing) for name, timing in timings.items()},
        "broken": broken,
        "speedup": {k: v / own for k, v in median.items() if k != "lstmfused"} if own else {},
    }


def against(roof: Roofline | None, case: Case, row: dict[str, Any]) -> dict[str, Any]:
    """`row` with its limit in microseconds, and the share of it that each contestant reached."""
    limit = roof.limit(case) if roof else None
    times = {name: timing["median"] for name, timing in row["microseconds"].items()}
    share = {name: limit / time for name, time in times.items()} if limit else {}
    return row | {"limit": limit, "share": share}


def double_backward(field: list[Contestant], threads: int, seed: int) -> list[dict[str, Any]]:
    """Rows of some shapes, each at its own batch."""
    shapes = [shape for shape in SHAPES if shape[:2] in DOUBLE_SHAPES]
    cases = [
        Case(threads, "float32", s, s.batch, mode) for s, mode in product(shapes, DOUBLE_BACKWARD)
    ]
    return [row(case, field, 1.5, seed) for case in cases]


class Empty(torch.nn.Module):
    """What any module costs to call."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor]) -> None:
        return None


def overhead(field: list[Contestant], threads: int, seed: int) -> dict[str, Any]:
    """16 units, batch 1, no grad: next to no arithmetic, beside a module that does nothing."""
    torch.set_num_threads(threads)
    problem = Problem(Case(threads, "float32", Shape(16, 16, batch=1), 1, "inference"), seed)
    empty, input, hx = Empty(), problem.input, (problem.hx, problem.cx)
    with torch.no_grad():
        right, _ = steps(field, problem)
        calls = {"empty nn.Module": lambda: empty(input, hx), **right}
        timings = measure(calls, seconds=3, seed=seed, contexts=contexts(field))
    floor = timings["empty nn.Module"].median
    return {
        "threads": threads,
        "microseconds": {name: asdict(timing) for name, timing in timings.items()},
        "over_empty": {name: timing.median - floor for name, timing in timings.items()},
    }
