"""python -m benchmarks.second_order: gradients of gradients, and the transforms of torch.func.

Compares lstmfused.LSTMCell with torch.nn.LSTMCell: penalties on gradients and a Hessian-vector
product, each checked against float64 before it is timed by turns; then torch.func.grad with a
plain backward, and forward mode with the step composed of torch's operators. Prints ratios and
writes JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, func
from tqdm import tqdm

import lstmfused
from lstmfused import reference

from . import machine
from .__main__ import RESULTS, numbers
from .contestants import contestants
from .report import second_order, table
from .rows import row
from .shapes import DOUBLE_BACKWARD, Case, Shape
from .timing import CLOCKS, Clock, measure
from .verify import Problem, WrongResult

UNITS = (16, 64, 128, 256, 512)
BATCHES = (8, 32, 64)


def transforms(case: Case, seconds: float, seed: int) -> dict[str, Any]:
    """Times in microseconds. An empty torch.func.grad has no cell in it, but the same loss."""
    torch.set_num_threads(case.threads)
    problem = Problem(case, seed)
    leaves = tuple(problem.leaves.values())
    tensors = tuple(leaf.detach() for leaf in leaves)
    every, cotangents = tuple(range(len(leaves))), problem.grad_outputs

    def outputs(step: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda x, h, c, *weights: step(x, (h, c), *weights)

    fused, composed = outputs(lstmfused.functional.lstm_cell), outputs(reference.lstm_cell)

    def loss_of(h: Tensor, c: Tensor) -> Tensor:
        return (h * cotangents[0]).sum() + (c * cotangents[1]).sum()

    def loss(*given: Tensor) -> Tensor:
        return loss_of(*fused(*given))

    def empty(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Tensor:
        return loss_of(h, c)

    calls: dict[str, Callable[[], object]] = {
        "backward": lambda: torch.autograd.grad(loss(*leaves), leaves),
        "torch.func.grad": lambda: func.grad(loss, every)(*tensors),
        "empty torch.func.grad": lambda: func.grad(empty, every)(*tensors),
        "torch.func.jvp": lambda: func.jvp(fused, tensors, tensors),
        "torch.func.jvp, composed": lambda: func.jvp(composed, tensors, tensors),
    }
    for call in calls.values():
        call()  # for the first time, which imports and compiles
    timings = measure(calls, seconds, seed)
    return {
        **case.columns(),
        "microseconds": {name: asdict(timing) for name, timing in timings.items()},
    }


def transform_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for found in rows:
        plain, grad, empty, jvp, composed = (t["median"] for t in found["microseconds"].values())
        lines.append(
            [
                f"{found['units']}",
                f"{found['batch']}",
                f"{found['threads']}",
                f"{plain:.0f} µs",
                f"{grad / plain:.2f}x",
                f"{(grad - empty) / plain:.2f}x",
                f"{composed / jvp:.2f}x",
            ]
        )
    header = ["units", "batch", "threads", "backward", "torch.func.grad takes", "less an empty one"]
    return table([*header, "forward mode over composed"], lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.second_order", description=__doc__)
    add = parser.add_argument
    add("--units", type=numbers, default=UNITS, metavar="H,...", help="of square cells")
    add("--batches", type=numbers, default=BATCHES, metavar="B,...", help="batch sizes")
    add("--threads", type=numbers, metavar="N,...", help="thread counts (default: 1 and torch's)")
    add("--budget", type=float, default=240, metavar="SECONDS", help="for the whole run")
    add(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="cpu: the calling thread's own time, for --threads 1 where others load the machine",
    )
    add("--seed", type=int, default=0, help="of inputs, weights and the order of turns")
    add(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="default: benchmarks/results/second-order-CPU.json",
    )
    args = parser.parse_args()
    threads = args.threads or sorted({1, torch.get_num_threads()})
    if args.clock == "cpu" and max(threads) > 1:
        parser.error("--clock cpu goes with --threads 1")
    Clock.name = args.clock
    result: dict[str, Any] = {
        **machine.describe(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv[1:],
        "clock": args.clock,
        "rows": [],
        "transforms": [],
    }
    start = time.perf_counter()
    field = contestants(("lstmfused", "torch"))
    sizes = list(product(threads, args.units, args.batches))
    modes = (*DOUBLE_BACKWARD, None)
    cases = [
        (Case(count, "float32", Shape(H, H), B, mode or "training"), mode)
        for mode, (count, H, B) in product(modes, sizes)
    ]
    try:
        with tqdm(cases, unit="row", smoothing=0) as progress:
            for done, (case, mode) in enumerate(progress):
                left = (start + args.budget - time.perf_counter()) / (len(cases) - done)
                if mode:
                    result["rows"].append(row(case, field, left, args.seed))
                else:
                    result["transforms"].append(transforms(case, left, args.seed))
    except WrongResult as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result["seconds"] = time.perf_counter() - start
    for found in result["rows"]:
        times = (f"{name} {t['median']:.0f} µs" for name, t in found["microseconds"].items())
        where = f"{found['units']} units, batch {found['batch']}, threads {found['threads']}"
        print(f"{found['mode']}, {where}: {', '.join(times)}, {found['speedup']['torch']:.2f}x")
    print(f"\n{second_order(result)}\n\n{transform_table(result['transforms'])}")
    out = args.out or RESULTS / f"second-order-{machine.slug(machine.processor())}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
