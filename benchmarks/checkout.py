"""A cell of another checkout as a peer. Two versions of an extension do not fit one process, so
each checkout has one of its own, which verifies its cell and times a turn whenever it is asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .cases import WITHOUT_GRAD, Case
from .peers import PEERS, Peer
from .problem import Bound, Problem, WrongResult, verify
from .record import ROOT
from .timing import Sampler, called

# lstmfused of the one folder, benchmarks of the other.
CHILD = """
import sys
_, there, here = sys.argv
sys.path.insert(0, there)
import lstmfused
sys.path[0] = here
from benchmarks.checkout import serve
serve(lstmfused.__file__)
"""


def serve(file: str) -> None:
    """Answers on stdout, a line each: first which lstmfused this is."""
    print(json.dumps(file), flush=True)
    samplers: dict[Case, Sampler] = {}
    for line in sys.stdin:
        columns, clock = json.loads(line)
        case = Case.of(columns)
        torch.set_num_threads(case.threads)
        try:
            with torch.set_grad_enabled(case.mode not in WITHOUT_GRAD):
                if case not in samplers:
                    samplers.clear()
                    bound = PEERS["lstmfused"].bind(Problem(case.tensors()))
                    verify("lstmfused", bound, case.mode)
                    samplers[case] = called(bound.run(case.mode), clock=clock)
                answer: Any = samplers[case]()
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), flush=True)


class Checkout(Peer):
    computes = False  # here: its own process verifies it

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name)
        command = [sys.executable, "-c", CHILD, str(folder.resolve()), str(ROOT)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process: Any = subprocess.Popen(command, cwd=folder, **pipes)
        self.process = process
        file = process.stdout.readline()
        if not file or Path(json.loads(file)).resolve().parents[1] != folder.resolve():
            self.close()
            raise SystemExit(f"lstmfused of {folder}, built there, was asked for, {file} came")

    def close(self) -> None:
        self.process.communicate()

    def bind(self, problem: Problem) -> Bound:
        return Bound(problem, *[None] * 2)  # type: ignore[arg-type]  # never called here

    def sampler(self, case: Case, clock: str) -> Sampler:
        def sample() -> float:
            self.process.stdin.write(json.dumps([case.columns(), clock]) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline())
            if isinstance(answer, str):
                raise WrongResult(f"{self.name}: {answer}")
            return float(answer)

        sample()
        return sample
