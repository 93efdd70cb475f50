"""python -m benchmarks.frozen: a frozen cell against lstmfused.LSTMCell, for each weight dtype.

Both are verified before they are timed by turns. Prints how many times faster the frozen cells are
and writes JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import lstmfused

from . import machine
from .__main__ import RESULTS, numbers, shapes
from .contestants import bind
from .shapes import SHAPES, Case, Shape
from .timing import measure
from .verify import Problem, WrongResult, verify

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
BATCHES = (1, 2, 4, 8, 16, 32, 64)
UNFROZEN = "lstmfused"


def rounded(problem: Problem, dtype: torch.dtype) -> Problem:
    """The same problem with the weights that a frozen cell computes with."""
    with torch.no_grad():
        weights = problem.weight_ih, problem.weight_hh
        if dtype == torch.int8:
            scale = torch.cat(weights, 1).abs().amax(1, keepdim=True) / 127
            values = [(w / scale).round() * scale for w in weights]
        else:
            values = [w.to(dtype).float() for w in weights]
    other = copy.copy(problem)
    for cached in ("parameters", "leaves", "expected"):
        vars(other).pop(cached, None)
    other.weight_ih, other.weight_hh = (torch.nn.Parameter(v) for v in values)
    return other


def row(case: Case, seconds: float, seed: int) -> dict[str, Any]:
    torch.set_num_threads(case.threads)
    problem = Problem(case, seed)
    cell: Any = bind(lstmfused.LSTMCell, problem)
    input, hx = problem.input.detach(), (problem.hx.detach(), problem.cx.detach())

    def step(module: torch.nn.Module) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: module(input, hx)

    steps = {UNFROZEN: step(cell)}
    verify(UNFROZEN, problem, steps[UNFROZEN])
    for name, dtype in DTYPES.items():
        steps[name] = step(lstmfused.FrozenLSTMCell(cell, dtype))
        verify(UNFROZEN, rounded(problem, dtype), steps[name])
    timings = measure(steps, seconds, seed)
    return {
        "input": case.shape.input,
        "units": case.shape.units,
        "batch": case.batch,
        "threads": case.threads,
        "microseconds": {name: asdict(timing) for name, timing in timings.items()},
        "speedup": {name: timings[UNFROZEN].median / timings[name].median for name in DTYPES},
    }


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Of each shape a line, of each batch a column: the speed-ups by float32, bfloat16 and int8."""
    found = {(r["input"], r["units"], r["batch"]): r["speedup"] for r in rows}
    batches = sorted({batch for _, _, batch in found})
    lines = ["".join(["in→units".rjust(10), *(f"batch {b}".rjust(18) for b in batches)])]
    for pair in dict.fromkeys(key[:2] for key in found):
        cells = ["/".join(f"{found[(*pair, b)][d]:.2f}" for d in DTYPES).rjust(18) for b in batches]
        lines.append("".join([f"{pair[0]}→{pair[1]}".rjust(10), *cells]))
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> str:
    lines = []
    for name in DTYPES:
        for title, some in (
            ("batch 1", [r for r in rows if r["batch"] == 1]),
            ("larger batches", [r for r in rows if r["batch"] > 1]),
        ):
            if not some:
                continue
            worst = min(some, key=lambda r: float(r["speedup"][name]))
            mean = geometric_mean(r["speedup"][name] for r in some)
            lines.append(
                f"{name:>8} weights, {title}: geometric mean {mean:.2f}x, worst "
                f"{worst['speedup'][name]:.2f}x ({worst['input']}→{worst['units']}, batch "
                f"{worst['batch']}), "
                f"{sum(r['speedup'][name] < 1 for r in some)} of {len(some)} slower"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frozen", description=__doc__)
    add = parser.add_argument
    add("--shapes", type=shapes, default=SHAPES, metavar="I:H,...", help="inputs and units")
    add("--batches", type=numbers, default=BATCHES, metavar="B,...", help="batch sizes")
    add("--threads", type=numbers, metavar="N,...", help="thread counts (default: 1 and torch's)")
    add("--budget", type=float, default=200, metavar="SECONDS", help="for the whole run")
    add("--seed", type=int, default=0, help="of inputs, weights and the order of turns")
    add("--out", type=Path, metavar="FILE.json", help="default: benchmarks/results/frozen-CPU.json")
    args = parser.parse_args()
    threads = args.threads or sorted({1, torch.get_num_threads()})
    about = {
        **machine.describe(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv[1:],
    }
    start = time.perf_counter()
    cases = [
        Case(count, "float32", Shape(*shape[:2]), batch, "inference")
        for count, shape, batch in product(threads, args.shapes, args.batches)
    ]
    rows = []
    try:
        with torch.no_grad(), tqdm(cases, unit="row", smoothing=0) as progress:
            for done, case in enumerate(progress):
                left = start + args.budget - time.perf_counter()
                rows.append(row(case, left / (len(cases) - done), args.seed))
    except WrongResult as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    versions = ", ".join(
        f"{name} {version}" for name, version in about["versions"].items() if version
    )
    print(f"{about['processor']}, kernel {about['build_info']['cpu kernel']}; {versions}")
    print(f"frozen over lstmfused.LSTMCell, weights in {', '.join(DTYPES)}")
    for count in threads:
        some = [r for r in rows if r["threads"] == count]
        print(f"\n{count} thread(s)\n{table(some)}\n{summary(some)}")
    out = args.out or RESULTS / f"frozen-{machine.slug(about['processor'])}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    seconds = time.perf_counter() - start
    out.write_text(json.dumps({**about, "rows": rows, "seconds": seconds}, indent=1) + "\n")
    print(f"\nwritten to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
