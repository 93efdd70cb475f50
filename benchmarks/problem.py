"""No figure without a check: what everyone computes with, and the float64 reference of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, func
from torch.nn import Parameter

from lstmfused import reference

from .cases import (
    GRAD,
    HVP,
    INFERENCE,
    INPUT_PENALTY,
    JVP,
    PENALTY,
    RESETS,
    TRAINING,
    WITHOUT_GRAD,
    Case,
)

Pair = tuple[Tensor, Tensor]
Step = Callable[[Tensor, Tensor, Tensor], Pair]  # x, h, c -> h', c'
Call = Callable[[], tuple[Tensor, ...]]

# Largest |value - reference| / max(1, |reference|) allowed in h' and c'. The reference is computed
# in float64 from the same rounded weights and inputs, so this is the peer's own error.
TOLERANCE = {"float64": 1e-14, "float32": 1e-6, "tf32": 2e-3, "float16": 2e-3, "bfloat16": 1.6e-2}
# A kernel may add up the K = I + H terms of a gate one after the other; its error is then a walk
# of K steps. Up to TERMS terms TOLERANCE holds as it is, beyond it grows with the root of K.
TERMS = 128
# A peer may be this much further off: half-precision peers round every gate on the way.
PEER_FACTOR = 4
# A gradient is a sum over batch or gates whose terms cancel: its rounding follows the largest
# element of the tensor, and grows with the number of terms.
GRADIENT_FACTOR = 10
RESET = 0.05  # of the steps of a row


class WrongResult(Exception):
    """A peer's numbers are not those of an LSTM cell."""


class Problem:
    """Inputs, weights and output gradients of a case; all peers share these leaves."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        (inputs, units), batch = case.shape[:2], case.batch
        dtype = getattr(torch, "float32" if case.dtype == "tf32" else case.dtype)
        generator = torch.Generator(case.device).manual_seed(seed)
        given: Any = {"generator": generator, "device": case.device}

        def normal(*size: int) -> Tensor:
            return torch.randn(size, **given).to(dtype)

        def weight(*size: int) -> Parameter:  # as nn.LSTMCell draws them
            return Parameter(((torch.rand(size, **given) * 2 - 1) * units**-0.5).to(dtype))

        time = (case.steps,) if case.steps > 1 or case.sequence else ()
        every = time if case.sequence else ()  # or the last state alone
        self.case = case
        self.leaves: dict[str, Tensor] = {
            "input": normal(*time, batch, inputs).requires_grad_(),
            "hx": normal(batch, units).tanh().requires_grad_(),
            "cx": normal(batch, units).requires_grad_(),
            "weight_ih": weight(4 * units, inputs),
            "weight_hh": weight(4 * units, units),
            "bias_ih": weight(4 * units),
            "bias_hh": weight(4 * units),
        }
        self.grad_outputs = normal(*every, batch, units), normal(batch, units)
        draws = torch.rand((case.steps, batch), **given)
        self.reset = draws < RESET if case.sequence == RESETS else None  # (T,B)
        self._expected: dict[str, dict[str, Tensor]] = {}

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.leaves["input"], self.leaves["hx"], self.leaves["cx"]

    @property
    def parameters(self) -> dict[str, Tensor]:
        return dict(list(self.leaves.items())[3:])

    def replaced(self, leaves: Mapping[str, Tensor], dtype: str | None = None) -> Problem:
        """The same with other leaves."""
        other = copy.copy(self)
        other.case = self.case._replace(dtype=dtype or self.case.dtype)
        other.leaves, other._expected = {**self.leaves, **leaves}, {}
        return other

    def widened(self, dtype: str) -> Problem:
        """The same numbers in more bits."""
        wide = getattr(torch, dtype)
        leaves = {k: Parameter(v.detach().to(wide)) for k, v in self.leaves.items()}
        other = self.replaced(leaves, dtype)
        other.grad_outputs = self.grad_outputs[0].to(wide), self.grad_outputs[1].to(wide)
        return other

    def expected(self, mode: str) -> dict[str, Tensor]:
        """What a call of `mode` returns and leaves in `.grad`, in float64."""
        if mode not in self._expected:
            wide = self.widened("float64")
            with torch.set_grad_enabled(mode not in WITHOUT_GRAD):
                outputs = formula(wide).run(mode)()
            self._expected[mode] = found(outputs, wide)
        return self._expected[mode]


def found(outputs: tuple[Tensor, ...], problem: Problem) -> dict[str, Tensor]:
    """By name: h', c', what else is returned, and the gradients in `.grad`."""
    names = ("h", "c", *(f"result {index}" for index in range(2, len(outputs))))
    gradients = {f"grad {k}": v.grad for k, v in problem.leaves.items() if v.grad is not None}
    return {k: v.detach() for k, v in zip(names, outputs, strict=True)} | gradients


@dataclass
class Bound:
    """A peer and the tensors it computes with."""

    problem: Problem  # whose leaves get its gradients
    step: Step
    call: Callable[[], Pair]  # a step on the problem's own state, as cheap as can be

    def run(self, mode: str) -> Call:
        """What is timed: in training, forward and backward into the `.grad` of all leaves. Those of
        second order take first gradients and then, into `.grad`, those of half the sum of their
        squares (PENALTY), of how far each row's norm is from 1, as WGAN-GP has it (INPUT_PENALTY),
        or of their product with a vector, the parameters themselves (HVP)."""
        leaves, cotangents = tuple(self.problem.leaves.values()), self.problem.grad_outputs
        parameters, state = leaves[3:], tuple(leaf.detach() for leaf in leaves[:3])
        of = {PENALTY: leaves, INPUT_PENALTY: leaves[:1], HVP: parameters}
        backward = torch.autograd.backward

        def train() -> Pair:
            for leaf in leaves:
                leaf.grad = None
            outputs = self.call()
            if mode == TRAINING:
                backward(outputs, cotangents)
                return outputs
            first = torch.autograd.grad(outputs, of[mode], cotangents, create_graph=True)
            if mode == PENALTY:
                backward(first, [gradient.detach() for gradient in first])
            elif mode == INPUT_PENALTY:
                backward((first[0].norm(dim=-1) - 1).square().mean())
            else:
                backward(first, [p.detach() for p in parameters], inputs=list(parameters))
            return outputs

        def loss(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Pair]:
            h, c = self.step(x, h, c)
            return (h * cotangents[0]).sum() + (c * cotangents[1]).sum(), (h, c)

        def grad() -> tuple[Tensor, ...]:
            gradients, outputs = func.grad(loss, (0, 1, 2), has_aux=True)(*state)
            return (*outputs, *gradients)

        def jvp() -> tuple[Tensor, ...]:
            found: Any = func.jvp(self.step, state, state)
            return (*found[0], *found[1])

        return {INFERENCE: self.call, GRAD: grad, JVP: jvp}.get(mode, train)

    def chain(self, steps: int, others: list[Bound]) -> Callable[[], object]:
        """For a graph: each step from the state of the one before, the weights of each in turn."""
        weights = [self, *others]

        def body() -> object:
            x, h, c = (t.detach() for t in self.problem.state)
            for index in range(steps):
                h, c = weights[index % len(weights)].step(x, h, c)
            return h, c

        return body

    def trained(self, steps: int) -> Callable[[], object]:
        """For a graph: gradients are returned, for what adds to .grad has a stream of its own."""
        leaves = tuple(self.problem.leaves.values())

        def body() -> None:
            for _ in range(steps):
                torch.autograd.grad(self.call(), leaves, self.problem.grad_outputs)

        return body


def over_time(step: Step, reset: Tensor | None = None, every: bool = False) -> Step:
    """Of a sequence (T,B,I), a step for each of its inputs; h' of the last one, or of all."""

    def loop(x: Tensor, h: Tensor, c: Tensor) -> Pair:
        states = []
        for t, now in enumerate(x.unbind()):
            if reset is not None:
                kept = ~reset[t, :, None]
                h, c = h * kept, c * kept
            h, c = step(now, h, c)
            states.append(h)
        return torch.stack(states) if every else h, c

    return loop


def formula(problem: Problem) -> Bound:
    weights = tuple(problem.parameters.values())

    def step(x: Tensor, h: Tensor, c: Tensor) -> Pair:
        return reference.lstm_cell(x, (h, c), *weights)

    sequence = problem.reset, bool(problem.case.sequence)
    whole = over_time(step, *sequence) if problem.state[0].dim() == 3 else step
    return Bound(problem, whole, lambda: whole(*problem.state))


def verify(name: str, bound: Bound, mode: str) -> None:
    """Runs it once; raises WrongResult unless all that it returns and all gradients are right."""
    problem = bound.problem
    got = found(bound.run(mode)(), problem)
    case = problem.case._replace(mode=mode)
    terms = case.steps * max(1.0, sum(case.shape[:2]) / TERMS)
    tolerance = TOLERANCE[case.dtype] * terms**0.5
    tolerance *= 1 if name.startswith("lstmfused") else PEER_FACTOR
    for key, expected in problem.expected(mode).items():
        value = got.get(key)
        where = f"{name} is wrong at {case}: {key}"
        if value is None or value.numel() != expected.numel():
            shape = None if value is None else tuple(value.shape)
            raise WrongResult(f"{where} has shape {shape}, not {tuple(expected.shape)}")
        scale, allowed = expected.abs(), tolerance
        if key not in "hc":
            scale, allowed = scale.amax(), tolerance * GRADIENT_FACTOR
        wrong = (value.double().view_as(expected) - expected).abs()
        error = (wrong / scale.clamp(min=1)).amax().item()
        if not error <= allowed:  # so written, NaN is caught too
            raise WrongResult(f"{where} is off by {error:.1e}, allowed is {allowed:.1e}")


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """float32 or tf32 for everyone: by default cuDNN rounds where cuBLAS does not."""
    flags: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value
