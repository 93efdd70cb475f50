"""Where the time of a step goes, by perf, for rows of a --full run: the worst of each missed target
and one of each group of sizes.

python -m benchmarks.profiles RESULT.json samples each of them for some seconds and adds what it
finds to the file; the targets' table tells it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .contestants import contestants
from .full import case_of
from .gpu.record import Record
from .shapes import Case
from .targets import TARGETS, found, judged, looked_at
from .verify import Problem

SECONDS = 2.0
FREQUENCY = 2999  # samples a second; no divisor of what else comes every millisecond

# From "library symbol" to a part of the step; the first that fits.
PARTS = {
    "new pages": r"^\[",  # the system: it is asked for little else
    "waiting for threads": r"^libgomp",
    "transposing": r"^_C\S* .*transpose",
    "products": r"^_C\S* .*(panel|_tile|dot_piece|dot_far|Product|frozen_(block|streams))",
    "activations": r"^_C\S* .*(finish|forward_dot|gate_gradients|bias_gradient)",
    "allocator": r"^libc\.",
    "Python": r"^(libpython|python)",
    "torch": "",  # its dispatch and autograd, and our own operators' C++
}


def part(library: str, symbol: str) -> str:
    return next(name for name, known in PARTS.items() if re.search(known, f"{library} {symbol}"))


def shares(report: str) -> dict[str, float]:
    """Of the parts, from lines of perf's: percent|library|symbol."""
    total: dict[str, float] = {}
    for line in report.splitlines():
        fields = [field.strip() for field in line.split("|", 2)]
        if len(fields) == 3 and fields[0].endswith("%"):
            name = part(fields[1], re.sub(r"^\[.\] ", "", fields[2]))
            total[name] = total.get(name, 0) + float(fields[0][:-1]) / 100
    return total


def profile(case: Case, name: str) -> dict[str, float]:
    """The shares of the parts in the steps of one contestant."""
    torch.set_num_threads(case.threads)
    (who,) = contestants((name,))
    with tempfile.TemporaryDirectory() as folder, torch.set_grad_enabled(case.mode != "inference"):
        data = Path(folder) / "perf.data"
        record = ["perf", "record", "-q", "-F", str(FREQUENCY), "-o", str(data)]
        problem = Problem(case)
        step = problem.step(who.forward(problem))
        with who.context():
            for _ in range(3):
                step()
            perf = subprocess.Popen([*record, "-p", str(os.getpid())], stderr=subprocess.DEVNULL)
            time.sleep(0.5)  # until it samples
            end = time.perf_counter() + SECONDS
            while time.perf_counter() < end:
                step()
            perf.send_signal(signal.SIGINT)
            perf.wait()
        fields = ["--no-children", "-F", "overhead,dso,symbol", "-t", "|", "--percent-limit", "0"]
        report = subprocess.run(
            ["perf", "report", "--stdio", "-i", str(data), *fields],
            check=True,
            capture_output=True,
            text=True,
        )
    return shares(report.stdout)


def wanted(result: dict[str, Any]) -> list[tuple[Case, str]]:
    """The rows that the targets' table tells about, each once, and who is held to the target."""
    every = (
        (case_of(entry.row), target.subject)
        for target in TARGETS
        if target.rows == "rows" and judged(target, result)["reached"] is False
        for entry in looked_at(found(target, result))
    )
    return list(dict.fromkeys(every))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profiles", description=__doc__)
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    args = parser.parse_args()
    if not shutil.which("perf"):
        raise SystemExit("perf, of the Linux kernel's tools, is not installed")
    record = Record(args.result, json.loads(args.result.read_text(encoding="utf-8")))
    record.data["profiles"] = [
        {
            **case.columns(),
            "subject": name,
            "shares": {k: round(v, 3) for k, v in profile(case, name).items()},
        }
        for case, name in tqdm(wanted(record.data), unit="row")
    ]
    record.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
