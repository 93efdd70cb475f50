"""python -m benchmarks: verifies every peer, then times it; writes JSON, tables and a picture."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lstmfused

from . import limits, pictures, record, report
from .cases import AVX2, BESIDE_LAYER, DTYPES, MODES, SHAPES, SUITES, Case, Shape, Suite
from .checkout import Checkout
from .cliffs import main as cliffs
from .peers import PEERS, Peer, present
from .problem import WrongResult
from .record import ROOT, Clock, Json, Record
from .run import LOST, DeviceLost, Run
from .timing import CLOCKS

# As on a processor without AVX-512: torch's kernels and ours go by the first, oneDNN's and MKL's by
# their own.
ONLY_AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def shapes(text: str) -> tuple[Shape, ...]:
    known = {shape[:2]: shape for shape in SHAPES}
    pairs = [tuple(map(int, word.split(":"))) for word in text.split(",")]
    return tuple(known.get((i, h), Shape(i, h)) for i, h in pairs)


def among(*choices: str) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        if unknown := set(text.split(",")) - set(choices):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {choices}")
        return tuple(text.split(","))

    return parse


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compares one step of lstmfused.LSTMCell with its peers and with the limit of "
        "this processor. Every peer is first checked against a float64 reference.",
        epilog="Without options: float32, all threads, the shapes and batch sizes of "
        "benchmarks/cases.py, under ten minutes on two cores. Lists, separated by commas, take the "
        "place of a suite's own.",
    )
    suite = parser.add_mutually_exclusive_group()
    for name, of in list(SUITES.items())[1:]:
        suite.add_argument(
            f"--{name}", dest="suite", action="store_const", const=name, help=of.what
        )
    suite.add_argument("--cliffs", action="store_true", help="fails at what is unexpectedly slow")
    add = parser.add_argument
    add("--against", type=Path, metavar="DIR", help="compare with another checkout, built there")
    add("--shapes", type=shapes, metavar="I:H,...", help="inputs and units: 512:128,64:64")
    add("--batches", type=numbers, metavar="B,...", help="batch sizes: 1,8,97")
    add("--dtypes", type=among(*DTYPES), metavar="D,...", help=", ".join(DTYPES))
    add("--threads", type=numbers, metavar="N,...", help="thread counts: 1,2 (0: torch's)")
    add("--steps", type=numbers, metavar="T,...", help="lengths of sequences")
    add("--modes", type=among(*MODES), metavar="M,...", help=", ".join(MODES))
    add("--peers", type=among(*PEERS), metavar="P,...", help=", ".join(PEERS))
    add("--out", type=Path, default=ROOT / "out", metavar="DIR|FILE.json", help="default: out")
    add("--resume", type=Path, metavar="FILE.json", help="go on with the file of an earlier run")
    add("--budget", type=float, metavar="SECONDS", help="for the whole run, as far as possible")
    add("--seed", type=int, default=0, help="of the inputs, the weights and the order of turns")
    add("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: with --threads 1, under load")
    add("--revision", metavar="R", help="of the sources, where git cannot tell")
    add("--isa", choices=("avx2",), default="", help=argparse.SUPPRESS)  # of a child of --full
    args = parser.parse_args(given)
    args.suite = args.suite or "default"
    args.budget = SUITES[args.suite].budget if args.budget is None else args.budget
    if args.clock == "cpu" and args.threads != (1,):
        parser.error("--clock cpu goes with --threads 1")
    return args


def cases(args: argparse.Namespace) -> list[Case]:
    """The suite, with what the options ask for in place of its own."""
    names = ("shapes", "batches", "threads", *(() if args.isa else ("dtypes", "steps", "modes")))
    asked: Json = {name: value for name in names if (value := getattr(args, name)) is not None}
    found = (AVX2 if args.isa else SUITES[args.suite])._replace(**asked)
    every = found.cases(torch.get_num_threads())
    beside: tuple[Suite, ...] = ()
    if args.suite == "full" and not args.isa:
        beside = (SUITES["memory"]._replace(shapes=found.shapes),)
    elif args.suite == "layer" and not asked:
        beside = BESIDE_LAYER
    return every + [case for suite in beside for case in suite.cases(torch.get_num_threads())]


def peers(args: argparse.Namespace) -> list[Peer]:
    if args.against:
        before = Checkout("before", args.against)
        return [Checkout("lstmfused", ROOT), before]
    names = args.peers or (AVX2 if args.isa else SUITES[args.suite]).peers
    return present(names, everywhere=args.peers is not None)


def run(args: argparse.Namespace) -> Record:
    clock, device = Clock(args.budget), SUITES[args.suite].device
    capability = torch.backends.cpu.get_cpu_capability()
    if args.isa and capability.lower() != args.isa:
        raise SystemExit(f"asked for {args.isa}, torch runs {capability}: set {ONLY_AVX2}")
    fresh: Json = record.describe(args.suite, args.revision) | {"build": lstmfused.build_info()}
    fresh |= record.gpu() if device == "cuda" else {}
    fresh |= {"seed": args.seed, "clock": args.clock, "seconds": 0.0, "roofline": {}}
    found = Record.open(args.out, fresh | {"failed": [], "rows": []}, args.resume)
    print(f"writing {found.path}", file=sys.stderr, flush=True)
    wanted = cases(args)
    counts = sorted({case.threads for case in wanted})
    field = peers(args)
    try:
        for threads in counts if device == "cpu" or not found.data["roofline"] else ():
            limits.measure(found.data, threads, args.isa, device)
        Run(found, field, clock, args.seed, args.clock).course(wanted)
        for threads in (
            counts if device == "cpu" else ()
        ):  # once more, should it have been disturbed
            limits.measure(found.data, threads, args.isa, device)
    finally:
        for peer in field:
            peer.close()
        found.data["seconds"] += args.budget - clock.left()
        found.flush()
    if args.suite == "full" and not args.isa and capability in ("AVX2", "AVX512"):
        # In a process where AVX2 is all there is, which goes on with the file.
        own = [*sys.argv[1:], "--isa=avx2", f"--budget={clock.left()}", f"--resume={found.path}"]
        command = [sys.executable, "-m", "benchmarks", *own]
        subprocess.run(command, cwd=ROOT, env=os.environ | ONLY_AVX2, check=True)
    return found


def main() -> int:
    args = arguments()
    if args.cliffs:
        return cliffs()
    try:
        found = run(args)
    except WrongResult as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except DeviceLost as error:
        print(f"error: the GPU is lost: {error}", file=sys.stderr, flush=True)
        os._exit(LOST)  # what the interpreter does at its end may hang
    if args.isa:
        return 0
    data: dict[str, Any] = record.load(found.path)
    print(report.summary(data))
    pictures.cells(data, found.path.with_suffix(".png"))
    print(f"\nwritten to {found.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
