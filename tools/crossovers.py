"""Every path of lstmfused at every size: where the choice between them should change."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from ..shapes import Shape
from .contestants import FIELD
from .paths import PATHS, chosen, forced
from .plan import BATCHES, PRECISION_ORDER, UNITS, UNITS_ORDER, Cell, graph_steps
from .problem import Bound, GpuProblem, check, precision
from .record import Clock, DeviceLost, Json
from .rows import chain, describe, survive
from .timing import interleaved, replayed

SECONDS = 0.02  # of sampling for a cell
BACKWARD = ("few_rows", "products")
BACKWARD_BATCHES = tuple(batch for batch in BATCHES if batch <= 256)


def paths_of(cell: Cell) -> list[str]:
    """Those that compute this cell when asked; the others would fall back to one of these."""
    able = []
    for path in PATHS:
        with forced(path):
            if chosen(cell) == path:
                able.append(path)
    return able


def crossover(cell: Cell, problem: GpuProblem) -> Json:
    found: Json = {
        "precision": cell.precision,
        "units": cell.shape.units,
        "batch": cell.batch,
        "auto": chosen(cell),
        "broken": {},
    }
    samplers = {}
    bound = FIELD["lstmfused"].bind(problem.rows(cell.batch))
    steps = graph_steps(bound.problem.case)
    for path in paths_of(cell):
        try:
            with forced(path):
                check("lstmfused", bound, cell.precision)
                samplers[path] = replayed(chain(bound, steps, []), steps)
        except Exception as error:
            found["broken"][path] = describe(error)
            survive()
    times = interleaved(samplers, SECONDS)
    found["microseconds"] = {path: timing.median for path, timing in times.items()}
    return found | {"best": min(times, key=lambda path: times[path].median, default=None)}


def backward(bound: Bound, steps: int, path: str) -> Callable[[], object]:
    """Training steps of which only the backward one is forced."""
    problem = bound.problem
    leaves = tuple(problem.leaves.values())

    def body() -> None:
        for _ in range(steps):
            outputs = bound.forward()
            with forced(path):
                torch.autograd.grad(outputs, leaves, problem.grad_outputs)

    return body


def backward_crossover(cell: Cell, problem: GpuProblem) -> Json:
    bound = FIELD["lstmfused"].bind(problem.rows(cell.batch))
    steps = max(1, graph_steps(bound.problem.case) // 4)
    samplers, broken = {}, {}
    for path in ("", *BACKWARD):
        try:
            samplers[path or "auto"] = replayed(backward(bound, steps, path), steps)
        except Exception as error:
            broken[path or "auto"] = describe(error)
            survive()
    times = {path: timing.median for path, timing in interleaved(samplers, SECONDS).items()}
    own = [path for path in BACKWARD if path in times]
    best = min(own, key=lambda path: times[path], default=None)
    return {"training_us": times, "training_best": best, "training_broken": broken}


def sizes(quick: bool) -> list[tuple[str, int]]:
    units = [u for u in UNITS_ORDER if u in UNITS]
    return list(product(PRECISION_ORDER[: 2 if quick else None], units[: 2 if quick else None]))


def crossovers(clock: Clock, data: Json, quick: bool, flush: Callable[[], None]) -> Json:
    """Adds to data["crossovers"], size by size."""
    found = data.setdefault("crossovers", [])
    done = {(entry["precision"], entry["units"]) for entry in found}
    left_out, errors = [], {}
    slowest = 1.0
    for name, units in sizes(quick):
        if (name, units) in done:
            continue
        if clock.left() < slowest:
            left_out.append(f"{name} {units}")
            continue
        before, entries = clock.left(), []
        try:
            with precision(name):
                largest = Cell(name, Shape(units, units), BATCHES[-1])
                problem = GpuProblem(largest.case(training=False))
                for batch in BATCHES:
                    cell = largest._replace(batch=batch)
                    entries.append(crossover(cell, problem))
                    if batch in BACKWARD_BATCHES:
                        entries[-1] |= backward_crossover(cell, problem)
        except DeviceLost:
            # Once, so that the next process goes on behind it.
            found.append({"precision": name, "units": units, "error": "device lost"})
            raise
        except Exception as error:
            errors[f"{name} {units}"] = describe(error)
            survive()
        found += entries
        flush()
        torch.cuda.empty_cache()
        slowest = max(slowest, 1.2 * (before - clock.left()))
    status = "cut" if left_out else "failed" if errors else "done"
    reason = "no time left" if left_out else None
    return {"status": status, "left_out": left_out, "reason": reason, "errors": errors}
