"""What the tests of benchmarks.gpu share."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the benchmarks are run from the repository, not installed

from benchmarks.gpu.record import Record  # noqa: E402

MACHINE = {
    "revision": "0123456789abcdef",
    "dirty": False,
    "device": {"name": "A Device", "l2_bytes": 50 << 20},
    "versions": {"torch": "2.11.0", "triton": None},
}

CEILINGS = {
    "copy_gbs": 3000.0,
    "l2_read_gbs": 6000.0,
    "l2_bytes": 50 << 20,
    "matmul_tflops": {"float32": 50.0, "bfloat16": 800.0},
}


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def on_disk(record: Record) -> Any:
    return json.loads(record.path.read_text())


def new_record(folder: Path) -> Record:
    data = {"machine": MACHINE, "stages": {}, "ceilings": {}, "rows": [], "failed": []}
    return Record(folder / "results" / "result.json", data)
