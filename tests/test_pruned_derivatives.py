"""Derivatives of every order where a step has saved no more than its first gradients take."""

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import pytest
import torch
from cases import Arguments, assert_close, cell, random_arguments
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

SHAPE = (3, 4, 5)
Step = Callable[[Arguments], tuple[Tensor, Tensor]]


def torchs(a: Arguments) -> tuple[Tensor, Tensor]:
    """The operator of torch's own cell."""
    zeros = a.input.new_zeros(a.input.shape[0], a.weight_hh.shape[1])
    h, c = torch.lstm_cell(a.input, a.hx or (zeros, zeros), *a[3:])
    return h, c


def twice(a: Arguments) -> tuple[Tensor, Tensor]:
    h, c = cell(a)
    return cell(a._replace(h=h, c=c))


def torchs_twice(a: Arguments) -> tuple[Tensor, Tensor]:
    h, c = torchs(a)
    return torchs(a._replace(h=h, c=c))


def derivatives(step: Step, start: Arguments, needing: tuple[str, ...], order: int) -> list[Tensor]:
    """Those of a loss, order by order, with respect to the arguments named: of inner tensors, as
    they come out of a layer before, and of leaves."""
    given = start.map(lambda t: t.detach().clone())
    leaves = [getattr(given, name).requires_grad_() for name in needing]
    inner = {name: leaf.sin() for name, leaf in zip(needing[::2], leaves[::2], strict=True)}
    h, c = step(given._replace(**inner))
    total = h.sin().sum() + c.square().sum()
    found: list[Tensor] = []
    for _ in range(order):
        grads = torch.autograd.grad(
            total, leaves, create_graph=True, allow_unused=True, materialize_grads=True
        )
        found += grads
        total = torch.stack([g.sin().square().sum() for g in grads]).sum()
        if not total.requires_grad:
            break
    return found


def choices(state: bool, bias: tuple[bool, bool]) -> Iterator[tuple[Arguments, tuple[str, ...]]]:
    start = random_arguments(*SHAPE, torch.float64, state=state, bias=bias)
    names = [n for n, t in zip(start._fields, start, strict=True) if t is not None]
    for count in range(1, len(names) + 1):
        for needing in combinations(names, count):
            yield start, needing


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("bias", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("step", "expected"), [(cell, torchs), (twice, torchs_twice)])
def test_to_third_order_whatever_is_frozen(
    state: bool, bias: tuple[bool, bool], step: Step, expected: Step
) -> None:
    tried = 0
    for start, needing in choices(state, bias):
        found, wanted = (derivatives(f, start, needing, 3) for f in (step, expected))
        assert len(found) == len(wanted) == 3 * len(needing)
        for actual, want in zip(found, wanted, strict=True):
            assert_close(actual, want, torch.tensor(1e-9), needing)
        tried += 1
    assert tried == 2 ** (3 + 2 * state + sum(bias)) - 1


@pytest.mark.parametrize(
    "needing", [("input",), ("h", "c"), ("bias_ih",), ("weight_hh", "bias_hh")]
)
def test_saved_by_hooks(needing: tuple[str, ...]) -> None:
    start = random_arguments(*SHAPE, torch.float64)
    expected = derivatives(torchs, start, needing, 3)
    with torch.autograd.graph.save_on_cpu():
        found = derivatives(cell, start, needing, 3)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize(
    "needing", [("input",), ("h", "c"), ("bias_ih",), ("weight_hh", "bias_hh")]
)
def test_of_many_gradients_at_once(needing: tuple[str, ...]) -> None:
    """And their derivatives, by the rules of both vmaps."""
    results = []
    for step in (torchs, cell):
        given = random_arguments(*SHAPE, torch.float64).map(torch.clone)
        leaves = [getattr(given, name).requires_grad_() for name in needing]
        h, _ = step(given)
        eye = torch.eye(h.numel(), dtype=h.dtype).view(-1, *h.shape)

        def gradients(v: Tensor, h: Tensor = h, leaves: list[Tensor] = leaves) -> Any:
            return torch.autograd.grad(h, leaves, v, create_graph=True)

        old = torch.autograd.grad(h, leaves, eye, is_grads_batched=True, create_graph=True)
        for found in (old, torch.func.vmap(gradients)(eye)):
            total = torch.stack([g.sin().square().sum() for g in found]).sum()
            second = torch.autograd.grad(total, leaves, create_graph=True)
            again = torch.stack([g.sin().square().sum() for g in second]).sum()
            results.append(
                [*found, *second, *torch.autograd.grad(again, leaves, retain_graph=True)]
            )
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize(
    "needing", [("input",), ("h", "c"), ("bias_ih",), ("weight_hh", "bias_hh")]
)
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_of_traced_gradients(needing: tuple[str, ...], mode: Any) -> None:
    """Who differentiates a graph that was traced needs more than who traced it."""
    given = random_arguments(*SHAPE, torch.float64)
    leaves = [getattr(given, name).requires_grad_() for name in needing]

    def gradients(step: Step) -> Callable[..., list[Tensor]]:
        def function(*a: Tensor) -> list[Tensor]:
            h, c = step(Arguments(*a))
            total = h.sin().sum() + c.square().sum()
            inputs = [t for t in a if t.requires_grad]
            return list(torch.autograd.grad(total, inputs, create_graph=True))

        return function

    results = []
    for function in (gradients(torchs), make_fx(gradients(cell), tracing_mode=mode)(*given)):
        first = function(*given)
        second = torch.autograd.grad(
            torch.stack([g.square().sum() for g in first]).sum(), leaves, create_graph=True
        )
        third = torch.autograd.grad(torch.stack([g.square().sum() for g in second]).sum(), leaves)
        results.append([*first, *second, *third])
    torch.testing.assert_close(results[1], results[0], atol=1e-10, rtol=1e-9)


def test_operations_of_double_backward() -> None:
    """Counted by their matrix products, as are those of the reference."""
    B, I, H = SHAPE
    start = random_arguments(*SHAPE).trainable()
    h, c = cell(start)
    with FlopCounterMode(display=False) as counter:
        first = torch.autograd.grad(h.sum() + c.sum(), start.present(), create_graph=True)
        once = counter.get_total_flops()
        torch.autograd.grad(torch.stack([g.sum() for g in first]).sum(), start.present())
    products = 2 * B * 4 * H * (I + H)
    assert once == 2 * products  # for the gradients of rows and those of weights
    assert counter.get_total_flops() - once == 6 * products  # of both factors, and of tangents
