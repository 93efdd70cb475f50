"""A result: what it was measured on, its rows, and the file of it. Imports no torch and nothing of
lstmfused, which an unattended run has yet to build."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


class Clock:
    """Counts down."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.end = now, now() + seconds

    def left(self) -> float:
        return max(0.0, self.end - self.now())


# --------------------------------------------------------------------------------------------------
# What it was measured on


def output(*command: str) -> str | None:
    """What `command` prints; None if it is absent, fails or hangs."""
    given: Any = {"capture_output": True, "text": True, "check": True, "timeout": 20}
    try:
        return str(subprocess.run(command, cwd=ROOT, **given).stdout).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def cpuinfo() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""


def processor() -> str:
    if platform.system() == "Darwin":
        name = output("sysctl", "-n", "machdep.cpu.brand_string")
    else:
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo(), re.MULTILINE)
        name = found and found[1]
    return name or platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    names = [name for name in ("torch", "onnxruntime", "triton") if find_spec(name)]
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def describe(suite: str, revision: str | None = None) -> Json:
    """`revision` is of sources that were brought here, where git knows nothing of them."""
    commit = revision or output("git", "rev-parse", "HEAD")
    changes = output("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "suite": suite,
        "device": "cpu",
        "processor": processor(),
        "logical_cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "revision": commit or "unknown",
        "dirty": None if revision or changes is None or not commit else bool(changes),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv[1:],
    }


def gpu() -> Json:
    """Of the first one that is visible."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("error: there is no GPU that torch can use")
    properties: Any = torch.cuda.get_device_properties(0)
    asked = "--query-gpu=driver_version,power.limit,clocks.max.sm,clocks.max.mem"
    which = [f"--id=GPU-{properties.uuid}"] if hasattr(properties, "uuid") else []
    return {
        "device": "cuda",
        "processor": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", 0),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": output("nvidia-smi", asked, "--format=csv,noheader", *which),
    }


# --------------------------------------------------------------------------------------------------
# The file


def short(value: Any) -> Any:
    """Four digits of every number."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return {k: short(v) for k, v in value.items()} if isinstance(value, dict) else value


def text(data: Json) -> str:
    """JSON in which rows are a table, a line each, its columns named once: short, quickly written,
    and a diff of it can be read."""
    parts = []
    for key, value in data.items():
        shown = json.dumps(short(value), ensure_ascii=False)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            columns = list(dict.fromkeys(name for row in value for name in row))
            lines = (json.dumps([short(row.get(name)) for name in columns]) for row in value)
            rows = ",\n".join(lines)
            shown = f'{{"columns": {json.dumps(columns)}, "rows": [\n{rows}\n]}}'
        parts.append(f"{json.dumps(key)}: {shown}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def load(path: Path) -> Json:
    """Rows as dictionaries again, without what they have not."""

    def rows(value: Any) -> Any:
        if not (isinstance(value, dict) and value.keys() == {"columns", "rows"}):
            return value
        filled = (zip(value["columns"], row, strict=True) for row in value["rows"])
        return [{name: cell for name, cell in row if cell is not None} for row in filled]

    return {k: rows(v) for k, v in json.loads(path.read_text(encoding="utf-8")).items()}


class Record:
    """A result and its file."""

    def __init__(self, path: Path, data: Json) -> None:
        self.path, self.data = path, data

    @classmethod
    def open(cls, out: Path, fresh: Json, resume: Path | None = None) -> Record:
        """A new record in the file or folder `out`, or that of an earlier run of the same sources
        on the same processor."""
        if resume:
            old = load(resume)
            for key in ("suite", "revision", "processor"):
                if old[key] != fresh[key]:
                    raise SystemExit(f"{resume} is of {key} {old[key]}, this is {fresh[key]}")
            return cls(resume, {**fresh, **old, "dirty": old["dirty"] or fresh["dirty"]})
        name = re.sub(r"\((r|tm)\)", "", f"{fresh['processor']}-{fresh['date'][:10]}".lower())
        name = re.sub(r"[^a-z0-9]+", "-", f"{name}-{fresh['suite']}-{fresh['revision'][:10]}")
        return cls(out if out.suffix == ".json" else out / f"{name}.json", fresh)

    def flush(self) -> None:
        """Replaces the file in one move: whoever cuts the run off leaves a whole one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".partial")
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text(self.data))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.path)
