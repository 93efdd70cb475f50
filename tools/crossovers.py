"""python -m tools.crossovers: every path of lstmfused on CUDA at every size, by which the choice
between them is made."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import record, report
from benchmarks.cases import GPU_BATCHES, GPU_DTYPES, GPU_SQUARE, INFERENCE, TRAINING, Case
from benchmarks.peers import PEERS
from benchmarks.problem import Bound, Problem, precision, verify
from benchmarks.record import ROOT, Clock, Json, Record
from benchmarks.report import PATHS
from benchmarks.run import LOST, DeviceLost, Run, graph_steps
from benchmarks.timing import ROUNDS, by_turns, replayed
from lstmfused._ops import _C

SECONDS = 0.02  # of sampling for a cell
BACKWARD = ("small_batch", "products")
BACKWARD_BATCH = 256  # the largest
_c: Any = _C


def chosen(case: Case) -> str:
    """The path that the step takes, under what is forced now."""
    dtype = getattr(torch, "float32" if case.dtype == "tf32" else case.dtype)
    return str(_c.cuda_path(dtype, case.batch, *case.shape[:2], case.dtype == "tf32"))


@contextmanager
def forced(path: str) -> Iterator[None]:
    """ "" forces nothing."""
    _c.set_cuda_path(path)
    try:
        yield
    finally:
        _c.set_cuda_path("")


def able(case: Case) -> list[str]:
    """Those that compute this case when asked; the others would fall back to one of these."""

    def does(path: str) -> bool:
        with forced(path):
            return chosen(case) == path

    return [path for path in PATHS if does(path)]


def backward(bound: Bound, steps: int, path: str) -> Callable[[], object]:
    """Training steps of which only the backward one is forced."""
    leaves, cotangents = tuple(bound.problem.leaves.values()), bound.problem.grad_outputs

    def body() -> None:
        for _ in range(steps):
            outputs = bound.call()
            with forced(path):
                torch.autograd.grad(outputs, leaves, cotangents)

    return body


def measured(run: Run, case: Case) -> Json:
    """Microseconds of a step in a graph by each path, found right."""
    found: Json = {"dtype": case.dtype, "units": case.shape.units, "batch": case.batch}
    found["path"] = chosen(case)
    with precision(case.dtype):
        bound = PEERS["lstmfused"].bind(Problem(case))
        samplers = {}
        for path in able(case):
            with run.forgiving(path, case), forced(path), torch.no_grad():
                verify("lstmfused", bound, INFERENCE)
                steps = graph_steps(case)
                samplers[path] = replayed(bound.chain(steps, []), steps)
        training, few = case._replace(mode=TRAINING), case.batch <= BACKWARD_BATCH
        for path in BACKWARD if few else ():
            with run.forgiving(f"training {path}", training):
                steps = graph_steps(training)
                samplers[f"training {path}"] = replayed(backward(bound, steps, path), steps)
        times = by_turns(samplers, SECONDS, ROUNDS["cuda"])
    return found | {path: timing.median for path, timing in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.crossovers", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "out", metavar="DIR|FILE.json")
    add("--resume", type=Path, metavar="FILE.json", help="go on with the file of an earlier run")
    add("--budget", type=float, default=120, metavar="SECONDS")
    add("--revision", metavar="R", help="of the sources, where git cannot tell")
    add("--quick", action="store_true", help="two sizes of two dtypes")
    args = parser.parse_args()
    fresh = record.describe("crossovers", args.revision) | record.gpu()
    found = Record.open(args.out, fresh | {"rows": [], "begun": [], "crossovers": []}, args.resume)
    data, run = found.data, Run(found, [], Clock(args.budget))
    sizes = 2 if args.quick else None
    cases = [
        Case(shape, batch, dtype=dtype, device="cuda")
        for dtype, shape in product(GPU_DTYPES[:sizes], GPU_SQUARE[:sizes])
        for batch in GPU_BATCHES
    ]
    try:
        for case in tqdm([case for case in cases if str(case) not in data["begun"]], mininterval=5):
            if run.clock.left() < 2:
                break
            data["begun"].append(str(case))  # and not again, should it take the device away
            found.flush()
            with run.forgiving("lstmfused", case):
                data["crossovers"].append(measured(run, case))
    except DeviceLost as error:
        print(f"error: the GPU is lost: {error}", file=sys.stderr, flush=True)
        os._exit(LOST)  # what the interpreter does at its end may hang
    data["left_out"] = [str(case) for case in cases if str(case) not in data["begun"]]
    found.flush()
    print(report.summary(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
