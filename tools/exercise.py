"""python -m tools.exercise: every path of the CUDA cell once, on small cells. The smoke test, and
what compute-sanitizer watches. Prints a JSON object a line; fails if one is wrong."""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product

import torch

from benchmarks.cases import GPU_DTYPES, STEP, WITHOUT_GRAD, Case, Shape
from benchmarks.peers import PEERS
from benchmarks.problem import Problem, precision, verify
from benchmarks.report import PATHS

from .crossovers import chosen, forced

# Rows of whole 16 bytes and others; batches on either side of what few rows are;
# and more stages of K than shared memory holds.
CELLS = (
    (Shape(64, 64), 16),
    (Shape(40, 48), 3),
    (Shape(33, 17), 40),
    (Shape(51, 51), 1),
    (Shape(640, 136), 130),
)


def wrong(case: Case, checked: bool) -> str | None:
    """What is wrong, or None."""
    try:
        bound = PEERS["lstmfused"].bind(Problem(case))
        for mode in STEP:
            with torch.set_grad_enabled(mode not in WITHOUT_GRAD):
                verify("lstmfused", bound, mode) if checked else bound.run(mode)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.exercise", description=__doc__)
    parser.add_argument("--unchecked", action="store_true", help="run only: no float64 reference")
    args = parser.parse_args()
    errors = 0
    for dtype, (shape, batch), path in product((*GPU_DTYPES, "float64"), CELLS, ("", *PATHS)):
        case = Case(shape, batch, dtype=dtype, device="cuda")
        with precision(dtype), forced(path):
            taken = chosen(case)
            if path not in ("", taken):
                continue
            error = wrong(case, not args.unchecked)
        errors += error is not None
        found = {"dtype": dtype, "path": taken, "forced": path, "case": str(case), "error": error}
        print(json.dumps(found), flush=True)
    return int(errors > 0)


if __name__ == "__main__":
    sys.exit(main())
