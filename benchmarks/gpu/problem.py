"""One cell's tensors on the device, and the check of whoever computes with them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..shapes import Case
from ..verify import TOLERANCE, Forward, Problem, verify
from .plan import DEVICE

Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # x, h, c -> h', c'
# Factors keep 10 bits behind the point; weights shrink as sums grow, so one bound holds for all.
TF32_TOLERANCE = 2e-3


class GpuProblem(Problem):
    """A Problem whose leaves live on the device; the reference is computed there, in float64."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__(case, seed)
        training = case.mode == "training"
        for name in ("input", "hx", "cx"):
            setattr(self, name, getattr(self, name).detach().to(DEVICE).requires_grad_(training))
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(self, name, Parameter(getattr(self, name).detach().to(DEVICE)))
        first, second = self.grad_outputs
        self.grad_outputs = first.to(DEVICE), second.to(DEVICE)

    def twin(self, parameters: dict[str, Parameter]) -> GpuProblem:
        """The same inputs and, by value, the same weights in other memory."""
        other = copy.copy(self)
        other.__dict__.update(parameters)
        for cached in ("parameters", "leaves"):
            other.__dict__.pop(cached, None)
        return other

    def rotated(self) -> GpuProblem:
        return self.twin({k: Parameter(p.detach().clone()) for k, p in self.parameters.items()})

    def inference(self) -> GpuProblem:
        """To be checked and timed without gradients."""
        with torch.enable_grad():
            expected = self.expected
        other = copy.copy(self)
        other.case = self.case._replace(mode="inference")
        other.__dict__["expected"] = {name: expected[name] for name in ("h", "c")}
        return other

    def rows(self, batch: int) -> GpuProblem:
        """The first rows of the batch: each is computed as if it were alone. To be checked
        without gradients, for those of the weights would be others."""
        other = self.inference()
        other.case = other.case._replace(batch=batch)
        for name in ("input", "hx", "cx"):
            setattr(other, name, getattr(self, name).detach()[:batch].requires_grad_())
        first, second = self.grad_outputs
        other.grad_outputs = first[:batch], second[:batch]
        other.__dict__["expected"] = {k: v[:batch] for k, v in other.expected.items()}
        other.__dict__.pop("leaves", None)
        return other


@dataclass
class Bound:
    """A contestant and the weights it computes with."""

    problem: GpuProblem  # whose leaves get its gradients
    step: Step
    call: Callable[[], object]  # one step on the problem's own input, as cheap as can be

    @property
    def forward(self) -> Forward:
        problem, step = self.problem, self.step
        return lambda: step(problem.input, problem.hx, problem.cx)


@contextmanager
def precision(name: str) -> Iterator[None]:
    """float32 or tf32 for everyone: by default cuDNN rounds where cuBLAS does not."""
    flags: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


@contextmanager
def tolerance(name: str) -> Iterator[None]:
    """verify's, or that of tf32 for float32 tensors."""
    before = TOLERANCE[torch.float32]
    if name == "tf32":
        TOLERANCE[torch.float32] = TF32_TOLERANCE
    try:
        yield
    finally:
        TOLERANCE[torch.float32] = before


def check(name: str, bound: Bound, precision: str) -> None:
    """Raises WrongResult unless h', c' and, if the case is training, all gradients are right."""
    problem = bound.problem
    with tolerance(precision):
        with torch.no_grad():
            verify(name, problem.inference(), bound.forward)
        if problem.case.mode == "training":
            verify(name, problem, problem.step(bound.forward))
