"""python -m benchmarks --full: every row that benchmarks/targets.py asks for.

All is in one file, written every minute; `--resume` goes on with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import torch
from tqdm import tqdm

from . import machine
from .contestants import Contestant, contestants
from .gpu.record import Clock, Record
from .memory import memory
from .roofline import Roofline, roofline
from .rows import against, overhead, row
from .shapes import Case, Shape, grid
from .timing import ROUNDS

SECTIONS = (
    ("float32", "inference"),
    ("float32", "training"),
    ("float64", "inference"),
    ("float64", "training"),
    ("bfloat16", "inference"),
)
# The same cells as on a processor without AVX-512: torch's kernels and ours go by the first,
# oneDNN's and MKL's by their own.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
AVX2_SECTIONS = SECTIONS[:1]
AVX2_CONTESTANTS = ("lstmfused", "torch", "allocate")
FLUSH = 60  # seconds between two writings of the file

Json = dict[str, Any]


def cases(args: Namespace, sections: tuple[tuple[str, str], ...]) -> list[Case]:
    """From little work to much, so that time small ones leave over goes to large ones."""
    every = grid(args.threads, args.dtypes, args.shapes, args.batches, args.modes)
    chosen = [case for case in every if (case.dtype, case.mode) in sections]
    return sorted(chosen, key=lambda case: case.flops * (2 if case.dtype == "float64" else 1))


def least(case: Case, field: list[Contestant], roof: Roofline | None) -> float:
    """Seconds that a row takes anyway, about: as many rounds as there must be, each contestant at
    two thirds of the limit, and the check against float64."""
    calls = (ROUNDS.start + 2) * sum(who.supports(case) for who in field) + 3
    return 0.1 + 1e-8 * case.bytes + (1.5e-6 * calls * roof.limit(case) if roof else 0)


def short(value: Any) -> Any:
    """Four digits of every number."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return {k: short(v) for k, v in value.items()} if isinstance(value, dict) else value


def case_of(row: Json) -> Case:
    shape = Shape(row["input"], row["units"])
    return Case(row["threads"], row["dtype"], shape, row["batch"], row["mode"])


def plain(case: Case) -> Case:
    """As `case_of` finds it again."""
    return case._replace(shape=Shape(*case.shape[:2]))


def opened(args: Namespace) -> Record:
    """A new record, or that of an earlier run of the same revision on the same processor."""
    fresh: Json = {
        **machine.describe(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv[1:],
        "seed": args.seed,
        "seconds": 0.0,
        "environment": {name: os.environ[name] for name in AVX2 if name in os.environ},
        "roofline": {},
        "overhead": [],
        "memory": [],
        "rows": [],
    }
    if not args.resume:
        return Record(args.out, fresh)
    old: Json = json.loads(args.resume.read_text(encoding="utf-8"))
    for key in ("revision", "processor", "environment", "seed"):
        if old.get(key) != fresh[key]:
            raise SystemExit(f"{args.resume} is of {key} {old.get(key)}, this is {fresh[key]}")
    old["dirty"] = old["dirty"] or fresh["dirty"]
    return Record(args.resume, old)


def rooflines(data: Json) -> dict[int, Roofline]:
    return {
        int(threads): Roofline(roof["peak"], {int(k): v for k, v in roof["bandwidth"].items()})
        for threads, roof in data["roofline"].items()
    }


def measure_rooflines(data: Json, counts: tuple[int, ...]) -> None:
    """Whenever it is measured anew, for it may have been disturbed, the best rates are kept."""
    for threads in counts:
        if roof := roofline(threads):
            best = asdict(roof.best(rooflines(data).get(threads)))
            best["bandwidth"] = {str(size): rate for size, rate in best["bandwidth"].items()}
            data["roofline"][str(threads)] = best


def avx2(args: Namespace, record: Record, seconds: float) -> None:
    """The rows of another process, in which AVX2 is all there is."""
    path = record.path.with_suffix(".avx2.json")
    options = {
        "capability": "avx2",
        "shapes": ",".join(f"{shape.input}:{shape.units}" for shape in args.shapes),
        "batches": ",".join(map(str, args.batches)),
        "threads": ",".join(map(str, args.threads)),
        "contestants": ",".join(args.contestants),
        "seed": args.seed,
        "budget": seconds,
        "resume" if path.exists() else "out": path,
    }
    command = [sys.executable, "-m", "benchmarks", "--full"]
    command += [f"--{name}={value}" for name, value in options.items()]
    if subprocess.run(command, env={**os.environ, **AVX2}, check=False).returncode:
        raise SystemExit(f"no AVX2 rows; all others are in {record.path}, --resume goes on with it")
    found = json.loads(path.read_text(encoding="utf-8"))
    record.data["avx2_rows"] = found.pop("rows")
    record.data["avx2"] = {
        key: found[key] for key in ("environment", "build_info", "roofline", "overhead")
    }
    path.unlink()


def run(args: Namespace) -> Json:
    clock = Clock(args.budget)
    start = time.perf_counter()
    capability = torch.backends.cpu.get_cpu_capability()
    if args.capability and capability.lower() != args.capability:
        raise SystemExit(f"asked for {args.capability}, torch runs {capability}: set {AVX2}")
    record = opened(args)
    data = record.data
    print(f"writing {record.path}", flush=True)
    names = AVX2_CONTESTANTS if args.capability else args.contestants
    field = contestants(tuple(name for name in names if name in args.contestants))
    measure_rooflines(data, args.threads)
    roofs = rooflines(data)
    for threads in args.threads:
        if threads not in {entry["threads"] for entry in data["overhead"]}:
            data["overhead"].append(short(overhead(field, threads, args.seed)))
    if not args.capability and not data["memory"]:
        data["memory"] = memory(max(args.threads), args.shapes, args.seed)

    done = {case_of(found) for found in data["rows"]}
    wanted = cases(args, AVX2_SECTIONS if args.capability else SECTIONS)
    pending = [case for case in wanted if plain(case) not in done]
    later = [] if args.capability or "avx2" in data else cases(args, AVX2_SECTIONS)
    if later and capability not in ("AVX2", "AVX512"):
        print(f"torch runs {capability} here: the AVX2 rows are left out")
        later = []
    costs = [least(case, field, roofs.get(case.threads)) for case in [*pending, *later]]
    try:
        flushed = clock.left()
        with tqdm(pending, unit="row", smoothing=0) as progress:
            for index, case in enumerate(progress):
                progress.set_postfix_str(str(case))
                spare = (clock.left() - sum(costs[index:])) / len(costs[index:])
                found = row(case, field, max(spare, 0), args.seed)
                data["rows"].append(short(against(roofs.get(case.threads), case, found)))
                if flushed - clock.left() > FLUSH:
                    record.flush()
                    flushed = clock.left()
        measure_rooflines(data, args.threads)
        roofs = rooflines(data)
        data["rows"] = [
            short(against(roofs.get(found["threads"]), case_of(found), found))
            for found in data["rows"]
        ]
    finally:
        data["seconds"] += time.perf_counter() - start
        record.flush()
    if later:
        avx2(args, record, clock.left())
        record.flush()
    return data
