"""The rows of the benchmark: a cell's contestants, each found right, then timed in every mode."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from .contestants import FIELD
from .floor import floor
from .paths import chosen
from .plan import COLD, DEVICE, EAGER, TRAINING, TRAINING_GRAPH, Cell, graph_steps
from .problem import Bound, GpuProblem, check, precision
from .record import DeviceLost, Json
from .timing import Sampler, called, interleaved, replayed, short

COLD_SIZE = 3  # times the L2 cache: what a replay finds there of the weights is next to nothing


def survive() -> None:
    """After an exception: frees memory; raises DeviceLost if the device is beyond use."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.ones(1, device=DEVICE).item()
    except Exception as error:
        raise DeviceLost(describe(error)) from error


def settle() -> None:
    """What lives now is no longer looked at by the collector, which runs before every timing."""
    gc.collect()
    gc.freeze()


def warm_up() -> None:
    """Until the clocks are up."""
    factor = torch.randn(2048, 2048, device=DEVICE)
    for _ in range(200):
        factor.mm(factor)
    torch.cuda.synchronize()


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def chain(bound: Bound, steps: int, others: list[Bound]) -> Callable[[], object]:
    """Each step from the state of the one before, with the weights of each in turn."""
    weights = [bound, *others]

    def body() -> object:
        x, h, c = (t.detach() for t in (bound.problem.input, bound.problem.hx, bound.problem.cx))
        with torch.no_grad():
            for index in range(steps):
                h, c = weights[index % len(weights)].step(x, h, c)
        return h, c

    return body


def copies(problem: GpuProblem, l2_bytes: int) -> int:
    size = sum(p.numel() * p.element_size() for p in problem.parameters.values())
    return max(1, -(-COLD_SIZE * l2_bytes // size))


def training(bound: Bound, steps: int) -> Callable[[], object]:
    """For a graph: gradients are returned, for what adds them to .grad has a stream of its own."""
    problem = bound.problem
    leaves = tuple(problem.leaves.values())

    def body() -> None:
        for _ in range(steps):
            torch.autograd.grad(bound.forward(), leaves, problem.grad_outputs)

    return body


def without_grad(call: Callable[[], object]) -> Sampler:
    with torch.no_grad():
        sample = called(call)

    def sampler() -> float:
        with torch.no_grad():
            return sample()

    return sampler


def sampler(mode: str, name: str, bound: Bound, l2_bytes: int) -> tuple[Sampler, int]:
    """Times a step of `mode`; and of how many steps a graph is."""
    problem = bound.problem
    if mode == EAGER:
        return without_grad(bound.call), 1
    if mode == TRAINING:
        return called(problem.step(bound.forward)), 1
    if mode == TRAINING_GRAPH:
        steps = max(1, graph_steps(problem.case) // 4)
        return replayed(training(bound, steps), steps), steps
    steps, others = graph_steps(problem.case), []
    if mode == COLD:
        count = copies(problem, l2_bytes)
        others = [FIELD[name].bind(problem.rotated()) for _ in range(count - 1)]
        steps = -(-steps // count) * count
    return replayed(chain(bound, steps, others), steps), steps


def bind(cell: Cell, seed: int) -> tuple[dict[str, Bound], dict[str, str]]:
    """The contestants that compute this cell right, and what is wrong with the others."""
    right, broken = {}, {}
    problem = GpuProblem(cell.case(training=TRAINING in cell.modes), seed)
    for name in cell.contestants:
        if missing := FIELD[name].missing():
            broken[name] = missing
            continue
        try:
            bound = FIELD[name].bind(problem)
            check(name, bound, cell.precision)
            right[name] = bound
        except Exception as error:
            broken[name] = describe(error)
            survive()
    return right, broken


def row(mode: str, cell: Cell, right: dict[str, Bound], seconds: float, context: Json) -> Json:
    """Microseconds of a step; `speedup` is lstmfused over each peer."""
    samplers, broken, steps = {}, {}, {}
    for name, bound in right.items():
        if mode not in FIELD[name].modes:
            continue
        try:
            samplers[name], steps[name] = sampler(mode, name, bound, context["l2_bytes"])
        except Exception as error:
            broken[name] = describe(error)
            survive()
    timings = interleaved(samplers, seconds, context["seed"]) if samplers else {}
    times = {name: timing.median for name, timing in timings.items()}
    own = times.get("lstmfused")
    case = cell.case(training=mode in (TRAINING, TRAINING_GRAPH))
    limit = floor(context["ceilings"], case, cell.precision, mode == COLD)
    return {
        "mode": mode,
        "steps": max(steps.values(), default=0),
        "microseconds": {name: asdict(timing) for name, timing in timings.items()},
        "speedup": {k: short(v / own) for k, v in times.items() if k != "lstmfused"} if own else {},
        "limit": limit,
        "share": {name: short(limit / time) for name, time in times.items()} if limit else {},
        "broken": broken,
    }


def measure(cell: Cell, seconds: float, context: Json) -> list[Json]:
    """A row for every mode of `cell`, in about `seconds` of sampling."""
    about: dict[str, Any] = {
        "cell": str(cell),
        "precision": cell.precision,
        "input": cell.shape.input,
        "units": cell.shape.units,
        "batch": cell.batch,
    }
    found = []
    with precision(cell.precision):
        about["path"] = chosen(cell)
        right, wrong = bind(cell, context["seed"])
        for mode in cell.modes:
            share = seconds / len(cell.modes)
            try:
                measured = row(mode, cell, right, share, context)
            except DeviceLost:
                raise
            except Exception as error:
                measured = {"mode": mode, "error": describe(error), "microseconds": {}}
                measured |= {"speedup": {}, "share": {}, "limit": None, "broken": {}}
                survive()
            found.append({**about, **measured, "broken": {**wrong, **measured["broken"]}})
    if "compile" in cell.contestants:
        torch.compiler.reset()  # past its recompile limit it would give up
        settle()
    torch.cuda.empty_cache()
    return found
