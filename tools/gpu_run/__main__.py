"""python -m benchmarks.gpu: builds, checks and measures the CUDA cell, within a deadline."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from datetime import datetime, timezone
from pathlib import Path

from . import summary
from .record import Clock, DeviceLost, Json, Record
from .stages import RESERVE, STAGES, Context, run

RESULTS = Path(__file__).resolve().parents[1] / "results"
RESTARTS = 5


def stage_names(text: str) -> tuple[str, ...]:
    if unknown := set(text.split(",")) - set(STAGES):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(STAGES)}")
    return tuple(text.split(","))


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Builds, checks and measures the CUDA cell in one run. Everything found is on "
        "disk as soon as it is found; what there was no time for is recorded as left out.",
    )
    add = parser.add_argument
    add("--deadline", type=float, default=540, metavar="SECONDS", help="for all (default: 540)")
    add(
        "--stages", type=stage_names, default=tuple(STAGES), metavar="S,...", help=", ".join(STAGES)
    )
    add("--quick", action="store_true", help="a few cells of every kind")
    add("--device", default="0", metavar="N", help="which GPU (default: 0)")
    add("--revision", metavar="R", help="of the sources, where git cannot tell")
    add("--seed", type=int, default=0, help="of inputs, weights and the order of turns")
    add("--logs", type=Path, default=Path("build/gpu"), metavar="DIR", help="default: build/gpu")
    add(
        "--out",
        type=Path,
        default=RESULTS,
        metavar="DIR|FILE.json",
        help="the result, and its logs beside it (default: benchmarks/results)",
    )
    add("--resume", type=Path, metavar="FILE.json", help="go on with an earlier run's file")
    add("--restarts", type=int, default=0, help=argparse.SUPPRESS)
    add("--show", type=Path, metavar="FILE.json", help="print a result; needs no GPU")
    return parser.parse_args(given)


def opened(args: argparse.Namespace, machine: Json) -> Record:
    """A new record, or that of an earlier run of the same sources on the same kind of device."""
    fresh: Json = {"machine": machine, "stages": {}, "ceilings": {}, "rows": [], "failed": []}
    device, revision = machine["device"]["name"], machine["revision"]
    if args.resume:
        old = json.loads(args.resume.read_text(encoding="utf-8"))
        was = old["machine"]["device"]["name"], old["machine"]["revision"]
        if was != (device, revision):
            raise SystemExit(f"{args.resume} is of {was}, this is {(device, revision)}")
        return Record(args.resume, {**fresh, **old})
    from .checks import slug

    day = f"{datetime.now(timezone.utc):%Y%m%d}"
    name = f"{slug(device)}-{day}-{revision[:10]}.json"
    return Record(args.out if args.out.suffix == ".json" else args.out / name, fresh)


def restart(args: argparse.Namespace, record: Record, clock: Clock) -> None:
    """In a new process, for the device has been lost to this one. Returns if that is in vain."""
    record.flush()
    if args.restarts >= RESTARTS or clock.left() < 30:
        return
    print("the device is lost to this process: going on in another", file=sys.stderr, flush=True)
    later = (f"--deadline={clock.left()}", f"--restarts={args.restarts + 1}", "--device=0")
    last = ("--resume", str(record.path), *later)  # the later of two options counts
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], *last])


def see_only(device: str) -> None:
    """Of the visible GPUs one: it is number 0 then, in every process started here, too."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    index = int(device.removeprefix("cuda:"))
    known = list(map(str, range(index + 1))) if visible is None else visible.split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = known[index] if index < len(known) else ""


def measured(args: argparse.Namespace, clock: Clock) -> int:
    see_only(args.device)
    import torch

    if not torch.cuda.is_available():
        print("error: there is no GPU that torch can use", file=sys.stderr)
        return 1
    torch.cuda.set_device(0)
    properties = torch.cuda.get_device_properties(0)
    from . import checks

    record = opened(args, checks.machine(args.revision))
    record.flush()
    print(f"writing {record.path}", file=sys.stderr, flush=True)

    def overdue() -> None:  # a kernel that never ends cannot be interrupted; the file is whole
        try:
            print(summary.text(record.data), flush=True)
        finally:
            print("error: stuck past the deadline", file=sys.stderr, flush=True)
            os._exit(3)

    watch = threading.Timer(clock.left() + RESERVE, overdue)
    watch.daemon = True
    watch.start()
    context = Context(record, args.logs.absolute(), args.quick, args.seed, args.restarts > 0)
    try:
        stop = run(context, clock, args.stages, STAGES)
    except DeviceLost as error:
        restart(args, record, clock)
        stop = f"the device is lost: {error}"
        for stage in record.data["stages"].values():
            if stage["status"] == "begun":
                stage |= {"status": "failed", "error": [stop]}
    finally:
        watch.cancel()
    data = record.data
    data["machine"]["nvidia_smi_after"] = checks.smi(properties)
    data["summary"] = summary.targets(data["rows"])
    record.flush()
    print(summary.text(data))
    print(f"\nwritten to {record.path}")
    bad = [name for name, stage in data["stages"].items() if stage["status"] == "failed"]
    return 2 if stop else int(bool(bad))


def main() -> int:
    args = arguments()
    clock = Clock(args.deadline)
    if args.show:
        print(summary.text(json.loads(args.show.read_text(encoding="utf-8"))))
        return 0
    return measured(args, clock)


if __name__ == "__main__":
    sys.exit(main())
