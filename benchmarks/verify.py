"""No figure without a check: every contestant is compared with the float64 reference first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from lstmfused import reference

from .shapes import HVP, INPUT_PENALTY, PENALTY, Case

Forward = Callable[[], tuple[Tensor, Tensor]]  # () -> h', c' (B,H)

# Largest |value - reference| / max(1, |reference|) allowed in h' and c'. The reference is computed
# in float64 from the same rounded weights and inputs, so this is the contestant's own error.
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
# A kernel may add up the K = I + H terms of a gate one after the other; its error is then a walk
# of K steps. Up to TERMS terms TOLERANCE holds as it is, beyond it grows with the root of K.
TERMS = 128
# A peer may be this much further off: half-precision peers round every gate on the way.
PEER_FACTOR = 4
# A gradient is a sum over batch or gates whose terms cancel: its rounding follows the largest
# element of the tensor, and grows with the number of terms.
GRADIENT_FACTOR = 10


class WrongResult(Exception):
    """A contestant's numbers are not those of an LSTM cell."""


class Problem:
    """Inputs, weights and output gradients of one case; all contestants share these leaves.

    Of a sequence, `steps` are taken, each on the same input.
    """

    def __init__(self, case: Case, seed: int = 0, steps: int = 1) -> None:
        inputs, units = case.shape[:2]
        batch, dtype = case.batch, getattr(torch, case.dtype)
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(dtype)

        def weight(*size: int) -> torch.nn.Parameter:  # as nn.LSTMCell draws them
            uniform = torch.rand(size, generator=generator) * 2 - 1
            return torch.nn.Parameter((uniform * units**-0.5).to(dtype))

        self.case, self.steps = case, steps
        self.input = normal(batch, inputs).requires_grad_()
        self.hx = normal(batch, units).tanh().requires_grad_()
        self.cx = normal(batch, units).requires_grad_()
        self.weight_ih, self.weight_hh = weight(4 * units, inputs), weight(4 * units, units)
        self.bias_ih, self.bias_hh = weight(4 * units), weight(4 * units)
        self.grad_outputs = normal(batch, units), normal(batch, units)

    @cached_property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def leaves(self) -> dict[str, Tensor]:
        return {"input": self.input, "hx": self.hx, "cx": self.cx, **self.parameters}

    def step(self, forward: Forward) -> Forward:
        """What is timed: in training, forward and backward into the `.grad` of all leaves. The
        other modes take first gradients and then, into `.grad`, those of half the sum of their
        squares (PENALTY), of how far each row's norm is from 1, as WGAN-GP has it (INPUT_PENALTY),
        or of their product with a vector, the parameters themselves (HVP)."""
        mode = self.case.mode
        if mode == "inference":
            return forward
        leaves = tuple(self.leaves.values())
        parameters = [self.leaves[name] for name in self.parameters]
        of = {PENALTY: leaves, INPUT_PENALTY: leaves[:1], HVP: parameters}.get(mode, leaves)
        backward = torch.autograd.backward

        def train() -> tuple[Tensor, Tensor]:
            for leaf in leaves:
                leaf.grad = None
            outputs = forward()
            if mode == "training":
                backward(outputs, self.grad_outputs)
                return outputs
            first = torch.autograd.grad(outputs, of, self.grad_outputs, create_graph=True)
            if mode == PENALTY:
                backward(first, [gradient.detach() for gradient in first])
            elif mode == INPUT_PENALTY:
                backward((first[0].norm(dim=1) - 1).square().mean())
            else:
                backward(first, [p.detach() for p in parameters], inputs=parameters)
            return outputs

        return train

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        """h', c' and, but for inference, what a step leaves in `.grad`, in float64."""
        wide = copy.copy(self)
        wide.__dict__["leaves"] = leaves = {
            name: leaf.detach().double().requires_grad_(self.case.mode != "inference")
            for name, leaf in self.leaves.items()
        }
        wide.grad_outputs = self.grad_outputs[0].double(), self.grad_outputs[1].double()
        input, hx, cx, *weights = leaves.values()

        def forward() -> tuple[Tensor, Tensor]:
            state = hx, cx
            for _ in range(self.steps):
                state = reference.lstm_cell(input, state, *weights)
            return state

        h, c = wide.step(forward)()
        gradients = {f"grad {k}": leaf.grad for k, leaf in leaves.items() if leaf.grad is not None}
        return {"h": h.detach(), "c": c.detach(), **gradients}


def verify(name: str, problem: Problem, step: Forward) -> None:
    """Runs `step` once; raises WrongResult unless h', c' and all gradients are right."""
    h, c = step()
    got: dict[str, Tensor | None] = {"h": h.detach(), "c": c.detach()}
    got |= {f"grad {leaf}": tensor.grad for leaf, tensor in problem.leaves.items()}
    terms = problem.steps * max(1.0, sum(problem.case.shape[:2]) / TERMS)
    tolerance = TOLERANCE[h.dtype] * terms**0.5
    tolerance *= 1 if name.startswith("lstmfused") else PEER_FACTOR
    for key, expected in problem.expected.items():
        value = got[key]
        where = f"{name} is wrong at {problem.case}: {key}"
        if value is None or value.shape != expected.shape:
            shape = None if value is None else tuple(value.shape)
            raise WrongResult(f"{where} has shape {shape}, not {tuple(expected.shape)}")
        scale, allowed = expected.abs(), tolerance
        if key.startswith("grad"):
            scale, allowed = scale.amax(), tolerance * GRADIENT_FACTOR
        error = ((value.double() - expected).abs() / scale.clamp(min=1)).amax().item()
        if not error <= allowed:  # so written, NaN is caught too
            raise WrongResult(f"{where} is off by {error:.1e}, allowed is {allowed:.1e}")
