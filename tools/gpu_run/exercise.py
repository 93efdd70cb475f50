"""Every path once, on small cells: the smoke test, and what compute-sanitizer watches.

python -m benchmarks.gpu.exercise [--unchecked]: one JSON object a line; fails if one is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product

import torch

from ..shapes import Shape
from .contestants import FIELD
from .paths import PATHS, chosen, forced
from .plan import PRECISIONS, Cell
from .problem import GpuProblem, check, precision

# Rows of whole 16 bytes and others; batches on either side of what few rows are;
# and more stages of K than shared memory holds.
CELLS = (
    (Shape(64, 64), 16),
    (Shape(40, 48), 3),
    (Shape(33, 17), 40),
    (Shape(51, 51), 1),
    (Shape(640, 136), 130),
)


def one(cell: Cell, path: str, checked: bool) -> str | None:
    """What went wrong, or None."""
    try:
        problem = GpuProblem(cell.case(training=True))
        bound = FIELD["lstmfused"].bind(problem)
        if checked:
            check("lstmfused", bound, cell.precision)
        else:
            with torch.no_grad():
                bound.call()
            bound.problem.step(bound.forward)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.exercise", description=__doc__)
    parser.add_argument("--unchecked", action="store_true", help="run only: no float64 reference")
    args = parser.parse_args()
    wrong = 0
    for name, (shape, batch), path in product((*PRECISIONS, "float64"), CELLS, ("", *PATHS)):
        cell = Cell(name, shape, batch)
        with precision(name), forced(path):
            taken = chosen(cell)
            if path not in ("", taken):
                continue
            error = one(cell, path, not args.unchecked)
        wrong += error is not None
        found = {"precision": name, "path": taken, "forced": path, "cell": str(cell)}
        print(json.dumps(found | {"error": error}), flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
