"""Who is measured on the device. A new contestant is one class here and a place in FIELD."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import Parameter

import lstmfused

from .. import contestants as cpu
from .plan import DEVICE, EAGER, GRAPH, MODES
from .problem import Bound, GpuProblem


class Contestant:
    modes: tuple[str, ...] = MODES

    def missing(self) -> str | None:
        """Why it cannot run on this machine."""
        return None

    def bind(self, problem: GpuProblem) -> Bound:
        raise NotImplementedError


def bound_cell(problem: GpuProblem, module: Callable[..., tuple[Tensor, Tensor]]) -> Bound:
    return Bound(problem, lambda x, h, c: module(x, (h, c)), cpu.call(module, problem))


class Cell(Contestant):
    def __init__(self, cell: type[nn.LSTMCell]) -> None:
        self.cell = cell

    def bind(self, problem: GpuProblem) -> Bound:
        with torch.device(DEVICE):  # what the constructor draws is thrown away: let that be quick
            return bound_cell(problem, cpu.bind(self.cell, problem))


class Compiled(Contestant):
    """torch.compile(nn.LSTMCell), compiled anew for every cell."""

    def __init__(self, mode: str, modes: tuple[str, ...]) -> None:
        self.mode, self.modes = mode, modes

    def missing(self) -> str | None:
        return None if find_spec("triton") else "triton not installed"

    def bind(self, problem: GpuProblem) -> Bound:
        with torch.device(DEVICE):
            module = cpu.bind(nn.LSTMCell, problem)
        compiled = torch.compile(module, fullgraph=True, dynamic=False, mode=self.mode)
        return bound_cell(problem, compiled)


class CuDnn(Contestant):
    """nn.LSTM over one step, its weights in the one piece of memory that cuDNN wants."""

    def bind(self, problem: GpuProblem) -> Bound:
        inputs, units = problem.case.shape[:2]
        lstm = nn.LSTM(inputs, units, dtype=problem.input.dtype, device=DEVICE)
        own: dict[str, Parameter] = {k: getattr(lstm, f"{k}_l0") for k in problem.parameters}
        with torch.no_grad():
            for name, parameter in problem.parameters.items():
                own[name].copy_(parameter)
        twin = problem.twin(own)
        x, h, c = (t.detach()[None] for t in (twin.input, twin.hx, twin.cx))

        state = lstm.__dict__  # past nn.Module's costly way to set an attribute

        def step(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            state["training"] = torch.is_grad_enabled()  # else it keeps what backward would need
            _, (h, c) = lstm(x.unsqueeze(0), (h.unsqueeze(0), c.unsqueeze(0)))
            return h.squeeze(0), c.squeeze(0)

        def call() -> object:
            state["training"] = False
            return lstm(x, (h, c))

        return Bound(twin, step, call)


FIELD: dict[str, Contestant] = {
    "lstmfused": Cell(lstmfused.LSTMCell),
    "torch": Cell(nn.LSTMCell),
    "cudnn": CuDnn(),
    "compile": Compiled("default", (EAGER, GRAPH)),
    "reduce-overhead": Compiled("reduce-overhead", (EAGER,)),  # it makes graphs of its own
}
