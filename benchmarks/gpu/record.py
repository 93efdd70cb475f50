"""What a run has found so far, on disk after every step, and the time that it has left."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Json = dict[str, Any]


class DeviceLost(Exception):
    """After an error nothing more runs on the device in this process."""


class Clock:
    """Counts down; a part of it ends no later than the whole."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.end = now, now() + seconds

    def left(self) -> float:
        return max(0.0, self.end - self.now())

    def part(self, share: float, cap: float | None = None) -> Clock:
        """A clock of `share` of what is left now, and at most `cap` seconds."""
        seconds = self.left() * share
        return Clock(seconds if cap is None else min(seconds, cap), self.now)


def text(data: Json) -> str:
    """JSON with a line for each row: quickly written, and a diff of it can be read."""
    parts = []
    for key, value in data.items():
        rows = ",\n".join(map(json.dumps, value)) if isinstance(value, list) else None
        shown = json.dumps(value, indent=1) if rows is None else f"[\n{rows}\n]"
        parts.append(f"{json.dumps(key)}: {shown}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


class Record:
    """The JSON file of a run."""

    def __init__(self, path: Path, data: Json) -> None:
        self.path, self.data = path, data

    def flush(self) -> None:
        """Replaces the file in one move: whoever cuts the run off leaves a whole one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".partial")
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text(self.data))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.path)

    def stage(self, name: str, found: Json) -> None:
        self.data["stages"][name] = found
        self.flush()
