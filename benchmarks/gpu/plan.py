"""Which rows are measured, the most telling first."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from ..shapes import Case, Shape

DEVICE = "cuda"
DTYPES = {"float32": "float32", "tf32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
PRECISIONS = tuple(DTYPES)
BATCHES = (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
UNITS = (64, 128, 256, 512, 1024, 2048)
SHAPES = (*(Shape(units, units) for units in UNITS), Shape(2, 20), Shape(51, 51))
COLD_UNITS = 512  # from here on a model's weights may be too many to stay in the L2 cache

# graph: CUDA graph of chained steps without grad, the same weights at every step, or other ones
# eager: calls without grad; training: forward and backward
GRAPH, COLD, EAGER, TRAINING, TRAINING_GRAPH = (
    "graph",
    "graph cold",
    "eager",
    "training",
    "training graph",
)
MODES = (GRAPH, EAGER, TRAINING, COLD, TRAINING_GRAPH)
STEPS = 20

PEERS = ("lstmfused", "torch", "cudnn")
# Each compilation takes seconds: two cells come early, the others at the end.
COMPILED = ("lstmfused", "torch", "compile", "reduce-overhead")
COMPILED_CELLS = (
    ("float32", (128, 1)),
    ("bfloat16", (512, 32)),
    ("float32", (512, 128)),
    ("bfloat16", (128, 1)),
    ("float32", (512, 32)),
    ("bfloat16", (512, 128)),
)
EARLY = 2

# Earlier means sooner: should the time end, corners of the grid stand for what is between them.
BATCH_ORDER = (1, 32, 8, 128, 16, 4, 64, 1024, 256, 4096)
UNITS_ORDER = (512, 128, 1024, 256, 64, 2048)
PRECISION_ORDER = ("bfloat16", "float32", "float16", "tf32")
QUICK_BATCHES, QUICK_UNITS, QUICK_PRECISIONS = (1, 32, 128), (128, 512), ("float32", "bfloat16")


class Cell(NamedTuple):
    """Rows that share inputs and weights: one for every mode."""

    precision: str
    shape: Shape
    batch: int
    contestants: tuple[str, ...] = PEERS
    modes: tuple[str, ...] = MODES

    def __str__(self) -> str:
        compiled = " compiled" * (self.contestants == COMPILED)
        return f"{self.shape} B={self.batch} {self.precision}{compiled}"

    def case(self, training: bool) -> Case:
        mode = "training" if training else "inference"
        return Case(1, DTYPES.get(self.precision, self.precision), self.shape, self.batch, mode)


def tier(cell: Cell) -> int:
    """The worth of a cell; 0 is the highest."""
    units, batch = cell.shape.units, cell.batch
    if cell.contestants == COMPILED:
        early = [(p, units, batch) for p, (units, batch) in COMPILED_CELLS[:EARLY]]
        return 2 if (cell.precision, units, batch) in early else 5
    if batch == 128 and units in (512, 1024) and cell.precision == "bfloat16":
        return 0
    if batch <= 32 and units <= 512:
        return 1
    return 3 if batch <= 128 else 4


def rank(order: tuple[object, ...], item: object) -> int:
    return order.index(item) if item in order else len(order)


def worth(cell: Cell) -> tuple[int, ...]:
    return (
        tier(cell),
        rank(PRECISION_ORDER[:2], cell.precision),
        rank(BATCH_ORDER, cell.batch),
        rank(UNITS_ORDER, cell.shape.units),
        rank(PRECISION_ORDER, cell.precision),
    )


def cells(quick: bool = False) -> list[Cell]:
    found = [
        Cell(
            precision,
            shape,
            batch,
            modes=tuple(m for m in MODES if m != COLD or shape.units >= COLD_UNITS),
        )
        for precision, shape, batch in product(PRECISIONS, SHAPES, BATCHES)
        if not quick
        or (batch in QUICK_BATCHES and shape.units in QUICK_UNITS and precision in QUICK_PRECISIONS)
    ]
    found += [
        Cell(precision, Shape(units, units), batch, COMPILED, (EAGER, GRAPH))
        for precision, (units, batch) in COMPILED_CELLS[: EARLY if quick else None]
    ]
    return sorted(found, key=worth)


def graph_steps(case: Case) -> int:
    """STEPS, or fewer where one step is long enough to be timed by itself."""
    return max(2, min(STEPS, int(4e11 / max(1, case.flops))))
