"""python -m benchmarks.compiled: the cell inside torch.compile beside the same cell outside of it.

A compiled call costs torch's guards and wrappers, whatever its graph computes. That floor is the
cost of a compiled module with the same signature and parameters that computes next to nothing,
called right after the cell: where the cell's arrays have swept the caches, it is several times
what it is when called again and again. In training it has a backward pass through autograd's
engine of its own, which the cell has as well, so that one is counted twice.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lstmfused

from . import machine
from .contestants import Compile, bind, call
from .report import Row, duration, median, setting, shape, table
from .shapes import MODES, Case, Shape
from .timing import measure
from .verify import Problem, WrongResult, verify

OUT = Path(__file__).parents[1] / "out" / "compiled.json"
STEPS = 20
CASES = (  # shape, steps of a loop
    (Shape(16, 16, 1), 1),
    (Shape(128, 128, 8), 1),
    (Shape(128, 128, 8), STEPS),
    (Shape(256, 256, 64), 1),
    (Shape(512, 512, 512), 1),
)


class Nothing(torch.autograd.Function):
    """Looks at every argument, and leaves their gradients as the memory was."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*tensors)
        touched = reduce(torch.add, [t.view(-1)[0] for t in tensors])
        return tensors[1] + touched, tensors[2] + touched

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


class Floor(nn.LSTMCell):
    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        assert hx is not None
        state: tuple[Tensor, Tensor]
        state = Nothing.apply(input, *hx, *self._parameters.values())  # type: ignore[no-untyped-call]
        return state


class Loop(nn.Module):
    def __init__(self, cell: nn.Module, steps: int) -> None:
        super().__init__()
        self.cell, self.steps = cell, steps

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        for _ in range(self.steps):
            hx = self.cell(input, hx)
        return hx


def row(
    case: Case, steps: int = 1, seconds: float = 5, seed: int = 0, backend: str = "inductor"
) -> Row:
    """Microseconds of a call; `floor` is what it costs to follow the cell."""
    torch.compiler.reset()  # past its recompile limit it would give up
    problem = Problem(case, seed, steps)
    cell, floor = (bind(module, problem) for module in (lstmfused.LSTMCell, Floor))
    plain = cell if steps == 1 else Loop(cell, steps)

    def compiled(module: nn.Module) -> Any:
        return torch.compile(module, fullgraph=True, dynamic=False, backend=backend)

    with torch.set_grad_enabled(case.mode != "inference"):
        modules = {"eager": plain, "compiled": compiled(plain), "floor": compiled(floor)}
        calls = {name: problem.step(call(module, problem)) for name, module in modules.items()}
        for name in ("eager", "compiled"):
            verify("lstmfused", problem, calls[name])
        eager, nothing = calls["eager"], calls.pop("floor")
        nothing()  # compiles
        timings = measure({**calls, "eager, then floor": lambda: (eager(), nothing())}, seconds)
    times = {name: timing.median for name, timing in timings.items()}
    return {
        "input": case.shape.input,
        "units": case.shape.units,
        "batch": case.batch,
        "steps": steps,
        "dtype": case.dtype,
        "mode": case.mode,
        "threads": case.threads,
        "microseconds": {name: asdict(timing) for name, timing in timings.items()},
        "floor": times["eager, then floor"] - times["eager"],
        "over_eager": times["compiled"] / times["eager"],
        "over_eager_and_floor": times["compiled"] / times["eager, then floor"],
    }


def summary(result: Row) -> str:
    header = ("in→units", "batch", "steps", "eager", "compiled", "floor", "compiled - floor")
    ratios = ("compiled / eager", "compiled / (eager + floor)")
    text = []
    for mode in MODES:
        lines = []
        for r in (r for r in result["rows"] if r["mode"] == mode):
            eager, compiled = median(r, "eager"), median(r, "compiled")
            times = map(duration, (eager, compiled, r["floor"], compiled - r["floor"]))
            over = (f"{r[key]:.2f}" for key in ("over_eager", "over_eager_and_floor"))
            lines.append([shape(r), str(r["batch"]), str(r["steps"]), *times, *over])
        text.append(f"{mode}\n{table((*header, *ratios), lines)}")
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "lstmfused"))
    return "\n\n".join([f"{setting(result)}; {versions}", *text])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE.json")
    parser.add_argument("--seconds", type=float, default=5, help="for each row")
    args = parser.parse_args()
    if reason := Compile().missing():
        raise SystemExit(reason)
    threads = torch.get_num_threads()
    cases = [
        (Case(threads, "float32", shape, shape.batch, mode), steps)
        for mode in MODES
        for shape, steps in CASES
    ]
    try:
        rows = [row(case, steps, args.seconds) for case, steps in cases]
    except WrongResult as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result = {**machine.describe(), "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{summary(result)}\n\nwritten to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
