"""python -m benchmarks: verifies every contestant, then times it; writes JSON, table, picture."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import full, machine, report, targets
from .contestants import CONTESTANTS, FULL_CONTESTANTS, contestants
from .plot import plot
from .roofline import roofline
from .rows import against, double_backward, overhead, row
from .shapes import BATCHES, DTYPES, MODES, QUICK_BATCHES, QUICK_SHAPES, SHAPES, Shape, grid
from .verify import WrongResult

RESULTS = Path(__file__).with_name("results")


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in words(text))


def shapes(text: str) -> tuple[Shape, ...]:
    known = {shape[:2]: shape for shape in SHAPES}
    pairs = [tuple(map(int, word.split(":"))) for word in words(text)]
    return tuple(known.get((i, h), Shape(i, h)) for i, h in pairs)


def among(choices: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        if unknown := set(words(text)) - set(choices):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {choices}")
        return words(text)

    return parse


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compares one step of lstmfused.LSTMCell with its peers and with the limit of "
        "this processor. Every contestant is first checked against a float64 reference.",
        epilog="Without options: float32, all threads, the shapes and batch sizes of "
        "benchmarks/shapes.py; under ten minutes on two cores. Lists are separated by "
        "commas. torch.compile recompiles for every case, so unless --contestants asks for it, it "
        "runs at each shape's own batch only; --full leaves it out.",
    )
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="a few shapes, under two minutes")
    extent.add_argument(
        "--full",
        action="store_true",
        help="all that the targets ask for, and whether they are reached: 45 minutes",
    )
    add = parser.add_argument
    add("--shapes", type=shapes, metavar="I:H,...", help="inputs and units: 512:128,64:64")
    add("--batches", type=numbers, metavar="B,...", help="batch sizes: 1,8,97")
    add("--dtypes", type=among(DTYPES), metavar="D,...", help=", ".join(DTYPES))
    add("--threads", type=numbers, metavar="N,...", help="thread counts: 1,2 (default: torch's)")
    add("--modes", type=among(MODES), default=MODES, metavar="M,...", help=", ".join(MODES))
    known = tuple(dict.fromkeys((*CONTESTANTS, *FULL_CONTESTANTS)))
    add("--contestants", type=among(known), metavar="C,...", help=", ".join(known))
    add("--out", type=Path, metavar="FILE.json", help="default: benchmarks/results/CPU-DATE.json")
    add("--plot", type=Path, metavar="FILE.png", help="default: beside the JSON")
    add("--seed", type=int, default=0, help="of the inputs, the weights and the order of turns")
    add("--budget", type=float, metavar="SECONDS", help="for the whole run, as far as possible")
    add("--resume", type=Path, metavar="FILE.json", help="go on with the file of a --full run")
    add("--capability", choices=("avx2",), help=argparse.SUPPRESS)  # of --full's own process
    args = parser.parse_args()
    if args.resume and not args.full:
        parser.error("--resume goes with --full")

    every = (torch.get_num_threads(),)
    args.everywhere = args.contestants is not None
    if args.full:
        args.dtypes = args.dtypes or DTYPES
        args.threads = args.threads or tuple(sorted({1, *every}))
        args.contestants = args.contestants or FULL_CONTESTANTS
        args.budget = args.budget or 43 * 60
    if args.quick:
        args.shapes = args.shapes or QUICK_SHAPES
        args.batches = args.batches or QUICK_BATCHES
        args.contestants = args.contestants or ("lstmfused", "torch", "onnxruntime")
        args.budget = args.budget or 90
    args.shapes = args.shapes or SHAPES
    args.batches = args.batches or BATCHES
    args.dtypes = args.dtypes or ("float32",)
    args.threads = args.threads or every
    args.contestants = args.contestants or CONTESTANTS
    args.budget = args.budget or 420
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    field = contestants(args.contestants, args.everywhere)
    result: dict[str, Any] = {
        **machine.describe(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv[1:],
        "seed": args.seed,
    }
    roofs = {threads: roofline(threads) for threads in args.threads}
    result["overhead"] = [overhead(field, threads, args.seed) for threads in args.threads]
    result["double_backward"] = [
        found for threads in args.threads for found in double_backward(field, threads, args.seed)
    ]
    rows = []
    cases = grid(args.threads, args.dtypes, args.shapes, args.batches, args.modes)
    with tqdm(cases, unit="row", smoothing=0) as progress:
        for done, case in enumerate(progress):
            progress.set_postfix_str(str(case))
            left = start + args.budget - time.perf_counter()
            share = left / (len(cases) - done)
            rows.append(row(case, field, share, args.seed))
    for threads, roof in roofs.items():  # once more, should the first time have been disturbed
        roofs[threads] = roof and roof.best(roofline(threads))
    result["roofline"] = {threads: roof and asdict(roof) for threads, roof in roofs.items()}
    result["rows"] = [
        against(roofs[case.threads], case, found) for case, found in zip(cases, rows, strict=True)
    ]
    return result | {"seconds": time.perf_counter() - start}


def main() -> int:
    args = arguments()
    day = f"{datetime.now(timezone.utc):%Y%m%d}"
    name = f"{machine.slug(machine.processor())}-{day}{'-full' * args.full}.json"
    out = args.out = args.resume or args.out or RESULTS / name
    try:
        result = full.run(args) if args.full else run(args)
    except WrongResult as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.capability:
        return 0
    if not args.full:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
        result = json.loads(out.read_text())  # as the report reads it: JSON's keys are strings
    plot(result, args.plot or out.with_suffix(".png"))
    print(report.summary(result))
    if args.full:
        print(f"\n{targets.markdown(result)}")
    print(f"\nwritten to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
