"""What is measured: cells that real projects run, and square ones between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple


class Shape(NamedTuple):
    """A cell of I inputs and H units; `batch` is what its users run it with."""

    input: int
    units: int
    batch: int = 64
    origin: str = ""

    def __str__(self) -> str:
        return f"{self.input}→{self.units}"


SHAPES = (
    Shape(2, 20, 4096, "learned optimizers: a row for every parameter"),
    Shape(16, 16, 1, "where the cost of a call is all there is"),
    Shape(51, 51, 97, "pytorch/examples time_sequence_prediction (float64 there)"),
    Shape(64, 64),
    Shape(128, 128, 1, "Silero VAD: a step every 32 ms"),
    Shape(512, 128, 8, "CleanRL ppo_atari_lstm"),
    Shape(256, 256, 64),
    Shape(288, 256, 1, "pytorch-a3c"),
    Shape(512, 512, 4096, "PufferLib Atari"),
    Shape(2560, 512, 32, "image captioning decoder: the batch shrinks every step"),
    Shape(768, 1024, 64, "tacotron2 decoder"),
    Shape(1024, 1024, 64),
)

BATCHES = (1, 2, 4, 8, 16, 32, 64, 97, 128, 256, 512, 1024, 4096)
COLUMNS = (1, 8, 64, 512, 4096)  # of the README's tables
MODES = ("inference", "training")  # forward under no_grad; forward and backward
# Gradients of gradients, of which an ordinary run has the shapes below only; see verify.py.
PENALTY = "penalty on all gradients"
INPUT_PENALTY = "penalty on the input's gradient"
HVP = "Hessian-vector product"
DOUBLE_BACKWARD = (PENALTY, INPUT_PENALTY, HVP)
DOUBLE_SHAPES = ((128, 128), (512, 128), (256, 256))
DTYPES = ("float32", "float64", "bfloat16", "float16")

QUICK_SHAPES = tuple(s for s in SHAPES if s[:2] in {(16, 16), (128, 128), (512, 128), (512, 512)})
QUICK_BATCHES = (1, 8, 64)


class Case(NamedTuple):
    """One row of the result."""

    threads: int
    dtype: str
    shape: Shape
    batch: int
    mode: str

    def __str__(self) -> str:
        return f"{self.shape} B={self.batch} {self.dtype} {self.mode}, {self.threads} thread(s)"

    @property
    def flops(self) -> int:
        """The gates' products, (B,I)x(I,4H) and (B,H)x(H,4H); backward takes twice as many."""
        forward = 2 * self.batch * (self.shape.input + self.shape.units) * 4 * self.shape.units
        return forward * (1 if self.mode == "inference" else 3)

    def columns(self) -> dict[str, int | str]:
        """What a row of a result file says of its case."""
        return {
            "input": self.shape.input,
            "units": self.shape.units,
            "batch": self.batch,
            "dtype": self.dtype,
            "mode": self.mode,
            "threads": self.threads,
        }

    @property
    def bytes(self) -> int:
        """Weights once and x, h, c, h', c' once; in training each of them has a gradient."""
        inputs, units = self.shape[:2]
        weights = 4 * units * (inputs + units + 2)
        states = self.batch * (inputs + 4 * units)
        size = {"float64": 8, "float32": 4}.get(self.dtype, 2)
        return size * (weights + states) * (1 if self.mode == "inference" else 2)


def grid(
    threads: Iterable[int],
    dtypes: Iterable[str],
    shapes: Sequence[Shape],
    batches: Sequence[int],
    modes: Iterable[str],
) -> list[Case]:
    """Cases from little work to much, so that time small ones leave over goes to large ones."""
    pairs = list(product(shapes, sorted(set(batches))))
    pairs.sort(key=lambda pair: Case(1, "float32", pair[0], pair[1], "inference").flops)
    return [
        Case(count, dtype, shape, batch, mode)
        for count, dtype, (shape, batch), mode in product(threads, dtypes, pairs, modes)
    ]
