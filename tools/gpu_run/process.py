"""Commands with a time limit, and what their output says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
GRACE = 10  # seconds between asking a command to end and ending it
LINES = 60  # of a log go into the result


def tail(text: str, lines: int = LINES) -> list[str]:
    """The last lines, without the folder that this repository happens to lie in."""
    shown = text.replace(f"{ROOT}/", "").rstrip().splitlines()[-lines:]
    return [line[:500] for line in shown]


def end(process: subprocess.Popen[bytes]) -> None:
    """An interrupt first, for pytest then still writes its report."""
    for signal_, seconds in ((signal.SIGINT, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, signal_)
            process.wait(seconds)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue  # one that not even SIGKILL ends, in a call to the driver, is left behind


def run(
    command: Sequence[str], log: Path, seconds: float, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Runs `command` in the repository; its output goes to `log`, the end of it into the result.

    `returncode` is None for a command that ran out of time or could not be started.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    code, late = None, False
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its children end with it
            )
        except OSError as error:
            output.write(f"{command[0]}: {error}\n".encode())
        else:
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                late = True
                end(process)
            except BaseException:
                end(process)
                raise
    text = log.read_text(encoding="utf-8", errors="replace")
    return {
        "command": list(command),
        "returncode": code,
        "timed_out": late,
        "seconds": round(time.monotonic() - start, 2),
        "log": str(log),
        "tail": tail(text),
    }


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


OUTCOMES = {
    "PASSED": "passed",
    "FAILED": "failed",
    "ERROR": "errors",
    "SKIPPED": "skipped",
    "XFAIL": "skipped",
    "XPASS": "passed",
}


def outcomes(text: str) -> dict[str, Any]:
    """Of pytest -v, also of one that did not come to its end."""
    words = "|".join(OUTCOMES)
    found = re.findall(rf"^(\S+::.*?) ({words})\b", text, re.M)
    # pytest-xdist: [gw0] [ 25%] PASSED tests/test_cuda.py::test_parity
    beside = re.findall(rf"^\[gw\d+\] \[ *\d+%\] ({words}) (\S+::.*?) *$", text, re.M)
    found += [(name, word) for word, name in beside]
    counts = Counter(OUTCOMES[word] for _, word in found)
    names = [name for name, word in found if word in ("FAILED", "ERROR")]
    return {"counts": dict(counts), "failures": [{"name": name, "lines": []} for name in names]}


def junit(text: str) -> dict[str, Any]:
    """Of pytest --junitxml: counts, and for every failure its name and last lines."""
    counts: Counter[str] = Counter()
    failures = []
    for case in ElementTree.fromstring(text).iter("testcase"):
        problem = case.find("failure")
        if problem is None:
            problem = case.find("error")
        if problem is not None:
            counts["errors" if problem.tag == "error" else "failed"] += 1
            name = f"{case.get('classname', '')}::{case.get('name', '')}"
            lines = tail(problem.text or problem.get("message") or "", 12)
            failures.append({"name": name, "lines": lines})
        else:
            counts["passed" if case.find("skipped") is None else "skipped"] += 1
    return {"counts": dict(counts), "failures": failures}


def sanitized(text: str) -> dict[str, Any]:
    """Of compute-sanitizer: how many errors it sums up, and the first of them."""
    sums = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", text)
    reports = [line for line in text.splitlines() if line.startswith("=========")]
    errors = sum(int(a or b) for a, b in sums) if sums else None
    return {"errors": errors, "report": [line[:300] for line in reports[:40]] if errors else []}
