"""python -m tools.profiles RESULT.json: where the time of a step goes, by perf, for the rows of a
--full run that its page tells about: samples each for some seconds and adds what it finds to the
file."""

from __future__ import annotations

import argparse
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

from benchmarks.cases import COLUMNS, WITHOUT_GRAD, Case
from benchmarks.frame import frame
from benchmarks.peers import PEERS
from benchmarks.problem import Problem
from benchmarks.record import Json, Record, load
from benchmarks.targets import looked_at, verdicts

SECONDS = 2.0
FREQUENCY = 2999  # samples a second; no divisor of what else comes every millisecond

# From "library symbol" to a part of the step; the first that fits.
PARTS = {
    "new pages": r"^\[",  # the system: it is asked for little else
    "waiting for threads": r"^libgomp",
    "transposing": r"^_C\S* .*transpose",
    "products": r"^_C\S* .*(panel|_tile|dot_block|run_dots|Product|packed_(block|streams))",
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
    """The shares of the parts in the steps of one peer."""
    torch.set_num_threads(case.threads)
    peer, grad = PEERS[name], case.mode not in WITHOUT_GRAD
    with tempfile.TemporaryDirectory() as folder, torch.set_grad_enabled(grad), peer.context():
        data = Path(folder) / "perf.data"
        step = peer.bind(Problem(case)).run(case.mode)
        for _ in range(3):
            step()
        record = ["perf", "record", "-q", "-F", str(FREQUENCY), "-o", str(data)]
        perf = subprocess.Popen([*record, "-p", str(os.getpid())], stderr=subprocess.DEVNULL)
        time.sleep(0.5)  # until it samples
        end = time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            step()
        perf.send_signal(signal.SIGINT)
        perf.wait()
        fields = ["--no-children", "-F", "overhead,dso,symbol", "-t", "|", "--percent-limit", "0"]
        command = ["perf", "report", "--stdio", "-i", str(data), *fields]
        return shares(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def wanted(data: Json) -> list[tuple[Case, str]]:
    """The rows that the page tells about, each once, and who is held to the target."""
    every: list[tuple[Case, str]] = []
    for verdict in verdicts(data, frame(data)):
        if verdict.reached is False and not verdict.target.isa:
            rows: list[Any] = looked_at(verdict).to_dict("records")
            every += [(Case.of(row), verdict.target.subject) for row in rows]
    return list(dict.fromkeys(every))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.profiles", description=__doc__)
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    args = parser.parse_args()
    if not shutil.which("perf"):
        raise SystemExit("perf, of the Linux kernel's tools, is not installed")
    found = Record(args.result, load(args.result))
    profiles = []
    for case, name in tqdm(wanted(found.data), unit="row"):
        about = {key: value for key, value in case.columns().items() if key in COLUMNS}
        parts = {k: round(v, 3) for k, v in profile(case, name).items()}
        profiles.append(about | {"subject": name} | parts)
    found.data["profiles"] = profiles
    found.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
