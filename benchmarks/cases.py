"""What is measured: cells that real projects run, and square ones between them. Needs no torch."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """A cell of I inputs and H units; `batch` is what its users run it with."""

    input: int
    units: int
    batch: int = 64

    def __str__(self) -> str:
        return f"{self.input}→{self.units}"


SHAPES = (
    Shape(2, 20, 4096),  # learned optimizers: a row for every parameter
    Shape(16, 16, 1),  # where the cost of a call is all there is
    Shape(51, 51, 97),  # pytorch/examples time_sequence_prediction (float64 there)
    Shape(64, 64),
    Shape(128, 128, 1),  # Silero VAD: a step every 32 ms
    Shape(512, 128, 8),  # CleanRL ppo_atari_lstm
    Shape(256, 256, 64),
    Shape(288, 256, 1),  # pytorch-a3c
    Shape(512, 512, 4096),  # PufferLib Atari
    Shape(2560, 512, 32),  # image captioning decoder: the batch shrinks every step
    Shape(768, 1024, 64),  # tacotron2 decoder
    Shape(1024, 1024, 64),
)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 97, 128, 256, 512, 1024, 4096)
DTYPES = ("float32", "tf32", "float64", "bfloat16", "float16")  # tf32: products rounded, on a GPU

INFERENCE, TRAINING = STEP = ("inference", "training")  # no grad; forward and backward
PENALTY, INPUT_PENALTY, HVP = SECOND_ORDER = (
    "penalty on all gradients",
    "penalty on the input's gradient",
    "Hessian-vector product",
)
GRAD, JVP = TRANSFORMS = ("torch.func.grad", "forward mode")  # of input and state
KEPT, PEAK = MEMORY = ("memory kept", "memory peak")  # bytes of a training step
MODES = (*STEP, *SECOND_ORDER, *TRANSFORMS, *MEMORY)
WITHOUT_GRAD = (INFERENCE, JVP)
# On a GPU: called one by one, or a CUDA graph of chained steps; cold: each with other weights.
EAGER, GRAPH, COLD = LAUNCHES = ("eager", "graph", "cold graph")
# Of a sequence by one module, which returns the state of every step; RESETS: in one step of 20 a
# row's state is zero before it.
LAYER, RESETS = SEQUENCES = ("layer", "layer with resets")


class Case(NamedTuple):
    """One row of a result."""

    shape: Shape
    batch: int
    mode: str = INFERENCE
    dtype: str = "float32"
    threads: int = 1
    steps: int = 1  # of a sequence (steps, batch, input), where more than one
    sequence: str = ""  # of SEQUENCES, or a cell
    launch: str = EAGER
    isa: str = ""  # the instruction set, where not the processor's best
    device: str = "cpu"

    def __str__(self) -> str:
        rare = (str(getattr(self, name)) for name in RARE if getattr(self, name) != USUAL[name])
        parts = (self.dtype, self.mode, f"{self.threads} threads", *rare)
        return f"{self.shape} B={self.batch} {', '.join(filter(None, parts))}"

    def columns(self) -> dict[str, Any]:
        """What a row says of its case; what is rare only where it is so."""
        said = {"input": self.shape.input, "units": self.shape.units}
        said |= {name: getattr(self, name) for name in COLUMNS[2:]}
        return {k: v for k, v in said.items() if k not in RARE or v != USUAL[k]}

    @classmethod
    def of(cls, row: dict[str, Any]) -> Case:
        known = {name: row[name] for name in COLUMNS[2:] if name in row}
        return cls(Shape(row["input"], row["units"]), **known)

    def tensors(self) -> Case:
        """The same for all cases of the same tensors."""
        return self._replace(shape=Shape(*self.shape[:2]), mode="", launch=EAGER)

    @property
    def flops(self) -> int:
        """The gates' products, (B,I)x(I,4H) and (B,H)x(H,4H); backward takes twice as many."""
        rows = self.batch * self.steps
        forward = 2 * rows * (self.shape.input + self.shape.units) * 4 * self.shape.units
        return forward * (3 if self.mode == TRAINING else 1)

    @property
    def bytes(self) -> int:
        """Weights once and x, h, c, h', c' once; in training each of them has a gradient."""
        inputs, units = self.shape[:2]
        weights = 4 * units * (inputs + units + 2)
        states = self.batch * self.steps * (inputs + 4 * units)
        return self.itemsize * (weights + states) * (2 if self.mode == TRAINING else 1)

    @property
    def itemsize(self) -> int:
        return {"float64": 8, "float32": 4, "tf32": 4}.get(self.dtype, 2)

    @property
    def recurrent(self) -> int:
        """Bytes of weight_hh, which each step of a sequence takes, forward and backward."""
        return self.itemsize * 4 * self.shape.units**2 * bool(self.sequence)


COLUMNS = ("input", "units", *Case._fields[1:-1])
RARE = ("steps", "sequence", "launch", "isa")
USUAL = {name: value for name, value in Case._field_defaults.items() if name in COLUMNS}


class Suite(NamedTuple):
    """A named run: every combination of these. No batches: each shape's own; threads 0: torch's."""

    what: str
    peers: tuple[str, ...]
    budget: float
    shapes: tuple[Shape, ...] = SHAPES
    batches: tuple[int, ...] = BATCHES
    dtypes: tuple[str, ...] = ("float32",)
    modes: tuple[str, ...] = STEP
    threads: tuple[int, ...] = (0,)
    steps: tuple[int, ...] = (1,)
    sequence: str = ""
    launches: tuple[str, ...] = (EAGER,)
    isa: str = ""
    device: str = "cpu"

    def cases(self, all_threads: int) -> list[Case]:
        """From little work to much, so that time small ones leave over goes to large ones; on a
        GPU, where a run may end before all is measured, the most telling first."""
        counts = sorted({count or all_threads for count in self.threads})
        kinds = list(product(counts, self.dtypes, self.steps, self.modes, self.launches))
        found = [
            Case(
                shape,
                batch,
                mode,
                dtype,
                count,
                steps,
                self.sequence,
                launch,
                self.isa,
                self.device,
            )
            for shape in self.shapes
            for batch in sorted(set(self.batches or (shape.batch,)))
            for count, dtype, steps, mode, launch in kinds
            if launch != COLD or (mode == INFERENCE and shape.units >= 512)  # else they fit the L2
        ]
        work = worth if self.device == "cuda" else lambda case: (case._replace(mode="").flops,)
        return sorted(found, key=work)


OWN = "lstmfused"
SQUARE = tuple(Shape(units, units) for units in (16, 64, 128, 256, 512))
FEW = tuple(
    shape for shape in SHAPES if shape[:2] in {(16, 16), (128, 128), (512, 128), (512, 512)}
)
LOOPED = (Shape(16, 16, 1), Shape(128, 128, 8), Shape(256, 256, 64), Shape(512, 512, 512))
PACKED = ("lstmfused packed", "lstmfused packed bfloat16", "lstmfused packed int8")
FULL = ("lstmfused float32", PACKED[0], "lstmfused batch-invariant", "allocate")
STEPPED = "lstmfused stepped"
GPU_SQUARE = tuple(Shape(units, units) for units in (512, 128, 1024, 256, 64, 2048))
GPU_SHAPES = (*GPU_SQUARE, Shape(2, 20), Shape(51, 51))
GPU_BATCHES = (1, 32, 8, 128, 16, 4, 64, 1024, 256, 4096)  # corners before what is between them
GPU_DTYPES = ("bfloat16", "float32", "float16", "tf32")

SUITES = {
    "default": Suite("", (OWN, "torch", "compile", "onnxruntime", "empty nn.Module"), 360),
    "quick": Suite(
        "a few shapes: under two minutes", (OWN, "torch", "onnxruntime"), 90, FEW, (1, 8, 64)
    ),
    "full": Suite(
        "all that the targets ask for, and whether they are reached: 45 minutes",
        (OWN, "torch", "onnxruntime", *FULL),
        43 * 60,
        dtypes=("float32", "float64", "bfloat16"),
        threads=(1, 0),
    ),
    "packed": Suite(
        "cells packed for inference, weights in float32, bfloat16 and int8",
        (OWN, *PACKED),
        200,
        batches=BATCHES[:7],
        modes=(INFERENCE,),
        threads=(1, 0),
    ),
    "second-order": Suite(
        "gradients of gradients, and the transforms of torch.func",
        (OWN, "torch"),
        240,
        SQUARE,
        (8, 32, 64),
        modes=(*SECOND_ORDER, *TRANSFORMS),
        threads=(1, 0),
    ),
    "compiled": Suite(
        "inside torch.compile, beside what any compiled module costs to call",
        (OWN, "lstmfused compiled", "a compiled module that computes nothing"),
        100,
        LOOPED,
        (),
        steps=(1, 20),
    ),
    "layer": Suite(
        "sequences of 1 to 128 steps, by the layer and by others: 20 minutes",
        (OWN, PACKED[0], "torch", "onnxruntime", "products alone", STEPPED, "torch stepped"),
        20 * 60,
        SQUARE[1:],
        (1, 8, 32, 128),
        threads=(1, 0),
        steps=(1, 16, 128),
        sequence=LAYER,
    ),
    "memory": Suite(
        "bytes that a training step keeps for backward, and the most that it takes",
        (OWN, "torch"),
        60,
        batches=(),
        modes=MEMORY,
    ),
    "gpu": Suite(
        "on a GPU, the most telling rows first, until the budget ends",
        (OWN, "torch", "cudnn"),
        300,
        GPU_SHAPES,
        GPU_BATCHES,
        GPU_DTYPES,
        launches=LAUNCHES,
        device="cuda",
    ),
    "gpu-compiled": Suite(
        "on a GPU, beside torch.compile",
        (OWN, "torch", "compile", "reduce-overhead"),
        120,
        GPU_SQUARE[:2],
        GPU_BATCHES[:4:3],
        GPU_DTYPES[:2],
        (INFERENCE,),
        launches=LAUNCHES[:2],
        device="cuda",
    ),
}
# Of the layer's run: resets, as CleanRL trains with them; few units; bytes.
BESIDE_LAYER = (
    SUITES["layer"]._replace(
        shapes=(Shape(512, 128),), batches=(2, 8), steps=(128,), sequence=RESETS
    ),
    SUITES["layer"]._replace(shapes=SQUARE[:3], batches=(1,), steps=(64,)),
    SUITES["layer"]._replace(batches=(8, 32), threads=(0,), steps=(16, 128), modes=(KEPT,)),
)
# Of the full run, in a process of its own.
AVX2 = Suite("", (OWN, "torch", "allocate"), 0, modes=(INFERENCE,), threads=(1, 0), isa="avx2")


def worth(case: Case) -> tuple[int, ...]:
    """The place in an unattended run of the cells of a GPU."""
    shape, batch, dtype = case.shape, case.batch, case.dtype
    if batch == 128 and shape.units in (512, 1024) and dtype == "bfloat16":
        tier = 0
    else:
        tier = 1 if batch <= 32 and shape.units <= 512 else 2 if batch <= 128 else 3

    def rank(order: tuple[object, ...], item: object) -> int:
        return order.index(item) if item in order else len(order)

    kind = rank(GPU_DTYPES, dtype)
    return tier, kind // 2, rank(GPU_BATCHES, batch), rank(GPU_SHAPES, shape), kind
