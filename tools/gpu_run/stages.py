"""The stages in their order, and how the time is shared between them."""

from __future__ import annotations

import shutil
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import checks, plan
from .record import Clock, DeviceLost, Json, Record

RESERVE = 3.0  # seconds to write and print what was found
COMPILATION = 30.0  # a cell with compiled contestants may take, and cannot be interrupted


class Context(NamedTuple):
    record: Record
    logs: Path
    quick: bool
    seed: int
    restarted: bool = False  # to go on behind what took the device away

    def keep_logs(self) -> None:
        """As one file beside the result, so that whoever fetches that has them, too."""
        if self.logs.is_dir():
            name = self.record.path.with_suffix("")
            shutil.make_archive(f"{name}-logs", "gztar", self.logs)


class Stage(NamedTuple):
    """`share` of what is left when it begins, at most `cap` seconds; `vital`: none without it."""

    run: Callable[[Context, Clock], Json]
    share: float
    cap: float | None = None
    vital: bool = False


def progress(items: Sequence[Any]) -> Iterable[Any]:
    """With a bar where tqdm is installed, with a line now and then elsewhere."""
    try:
        from tqdm import tqdm
    except ImportError:
        return every(items)
    return tqdm(items, unit="cell", smoothing=0, mininterval=5)


def every(items: Sequence[Any], seconds: float = 10) -> Iterator[Any]:
    last = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - last > seconds:
            print(f"{done}/{len(items)} {item}", file=sys.stderr, flush=True)
            last = time.monotonic()
        yield item


def build(context: Context, clock: Clock) -> Json:
    return checks.build(clock, context.logs)


def smoke(context: Context, clock: Clock) -> Json:
    return checks.smoke(clock, context.logs)


def tests(context: Context, clock: Clock) -> Json:
    return checks.tests(clock, context.logs)


def sanitizer(context: Context, clock: Clock) -> Json:
    return checks.sanitize(clock, context.logs)


def ceilings(context: Context, clock: Clock) -> Json:
    from .ceilings import ceilings as measure

    def flush(found: Json) -> None:
        context.record.data["ceilings"] = found
        context.record.flush()

    found = measure(clock, context.quick, flush)
    return {key: found[key] for key in ("status", "errors")}


def crossovers(context: Context, clock: Clock) -> Json:
    from .crossovers import crossovers as measure
    from .rows import settle, warm_up

    settle()
    warm_up()
    return measure(clock, context.record.data, context.quick, context.record.flush)


def benchmark(context: Context, clock: Clock) -> Json:
    """Adds to the record's rows, cell by cell."""
    from .rows import measure, settle, warm_up

    data = context.record.data
    about = {
        "seed": context.seed,
        "ceilings": data.get("ceilings"),
        "l2_bytes": data["machine"]["device"]["l2_bytes"],
    }
    settle()
    warm_up()
    return cells(
        plan.cells(context.quick), clock, context.record, lambda c, s: measure(c, s, about)
    )


def cells(
    planned: Sequence[plan.Cell],
    clock: Clock,
    record: Record,
    measure: Callable[[plan.Cell, float], list[Json]],
) -> Json:
    """Measures what is not there yet until the time is over; says what was left out."""
    data = record.data
    done = {row["cell"] for row in data["rows"]} | {entry["cell"] for entry in data["failed"]}
    todo = [cell for cell in planned if str(cell) not in done]
    lately: deque[float] = deque([1.0], maxlen=10)
    left_out: list[str] = []
    for index, cell in enumerate(progress(todo)):
        left = clock.left()
        if left < max(lately):
            left_out += map(str, todo[index:])
            break
        if left < COMPILATION and cell.contestants == plan.COMPILED:
            left_out.append(str(cell))
            continue
        try:
            # Half of a cell's time is its making and checking.
            data["rows"] += measure(cell, min(2.0, max(0.1, left / (len(todo) - index) / 2)))
        except Exception as error:
            data["failed"].append(
                {"cell": str(cell), "error": f"{type(error).__name__}: {error}"[:300]}
            )
            if isinstance(error, DeviceLost):
                raise
        finally:
            record.flush()
        lately.append(left - clock.left())
    if left_out:
        return {"status": "cut", "reason": "no time left", "left_out": left_out}
    return {"status": "done", "left_out": []}


STAGES = {
    "build": Stage(build, 0.6, 300, vital=True),
    "smoke": Stage(smoke, 0.15, 60),
    "ceilings": Stage(ceilings, 0.1, 40),
    "crossovers": Stage(crossovers, 0.25, 120),
    "benchmark": Stage(benchmark, 0.6),
    "tests": Stage(tests, 0.65, 180),
    "sanitizer": Stage(sanitizer, 1.0, 150),
}


def run(
    context: Context, clock: Clock, chosen: Sequence[str], stages: dict[str, Stage]
) -> str | None:
    """Runs the chosen stages that are not done yet; why it stopped early, or None."""
    record, stop = context.record, None
    settled = ("done", "failed", "left out") if context.restarted else ("done",)
    for name, stage in stages.items():
        if record.data["stages"].get(name, {}).get("status") in settled:
            continue
        if name not in chosen:
            record.data["stages"].setdefault(
                name, {"status": "left out", "reason": "not asked for"}
            )
            continue
        if stop or clock.left() <= RESERVE:
            record.stage(name, {"status": "left out", "reason": stop or "no time left"})
            continue
        part = Clock(clock.left() - RESERVE, clock.now).part(stage.share, stage.cap)
        print(f"{name}: at most {part.left():.0f} s", file=sys.stderr, flush=True)
        start = clock.now()
        record.stage(name, {"status": "begun"})
        try:
            found = stage.run(context, part)
        except DeviceLost:
            raise
        except Exception:
            found = {"status": "failed", "error": traceback.format_exc().splitlines()[-12:]}
        record.stage(name, {**found, "stage_seconds": round(clock.now() - start, 2)})
        context.keep_logs()
        if stage.vital and found["status"] != "done":
            stop = f"{name} failed"
    return stop
