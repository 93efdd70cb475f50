"""The inner operators in graphs that were traced: differentiable like any other, and under vmap."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import (
    Arguments,
    assert_close,
    cell,
    check_gradient,
    oracle,
    random_arguments,
    random_like,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import lstmfused

SHAPE = (4, 5, 7)
ops = torch.ops.lstmfused
# What torch's own tracing and vmap stumble over.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]*. is deprecated")


def parameters(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {n: p.detach() for n, p in nn.LSTMCell(*SHAPE[1:]).named_parameters()}


def trainable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.clone().requires_grad_() for n, t in tensors.items()}


def doubles(seed: int = 0) -> dict[str, Tensor]:
    """For second derivatives: in float32 elements that cancel would differ."""
    return trainable({n: p.double() for n, p in parameters(seed).items()})


def two_steps(kind: type[nn.LSTMCell]) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    module = kind(*SHAPE[1:], device="meta")

    def function(p: dict[str, Tensor], x: Tensor) -> Tensor:
        state = functional_call(module, p, (x,))
        h, c = functional_call(module, p, (x, state))
        return torch.cat([h, c], 1)

    return function


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_trained_after_make_fx(mode: Any, pre_dispatch: bool) -> None:
    x = torch.randn(SHAPE[:2], dtype=torch.float64)
    graph = make_fx(two_steps(lstmfused.LSTMCell), tracing_mode=mode, pre_dispatch=pre_dispatch)(
        doubles(1), x
    )
    results = []
    for function in (two_steps(nn.LSTMCell), graph):
        fresh = doubles()
        inputs = x.clone().requires_grad_()
        first = torch.autograd.grad(
            function(fresh, inputs).square().sum(), [inputs, *fresh.values()], create_graph=True
        )
        second = torch.autograd.grad(
            torch.stack([g.square().sum() for g in first]).sum(), [inputs, *fresh.values()]
        )
        results.append([*first, *second])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_traced_gradients_are_differentiated(mode: Any) -> None:
    """A graph that holds the backward step, too."""
    x = torch.randn(SHAPE[:2], dtype=torch.float64)

    def penalty(
        kind: type[nn.LSTMCell], create_graph: bool = False
    ) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
        step = two_steps(kind)

        def function(p: dict[str, Tensor], x: Tensor) -> Tensor:
            loss = step(p, x).square().sum()
            grads = torch.autograd.grad(loss, [*p.values()], create_graph=create_graph)
            return torch.stack([g.square().sum() for g in grads])

        return function

    graph = make_fx(penalty(lstmfused.LSTMCell), tracing_mode=mode)(doubles(1), x)
    names = {str(node.target) for node in graph.graph.nodes}
    assert "lstmfused.lstm_cell_backward.default" in names
    assert "lstmfused.lstm_cell_backward_reuse_gates.default" not in names
    fresh = doubles()
    found = graph(fresh, x)
    expected = penalty(nn.LSTMCell, create_graph=True)(fresh, x)
    torch.testing.assert_close(found, expected)
    second = torch.autograd.grad(found.sum(), [*fresh.values()])
    torch.testing.assert_close(second, torch.autograd.grad(expected.sum(), [*fresh.values()]))


@pytest.mark.parametrize("use", ["hc", "h", "c"])
def test_inner_operators_pass_gradcheck(use: str) -> None:
    arguments = random_arguments(2, 3, 5, torch.float64).trainable()
    x, h, c, w_ih, w_hh, *_ = arguments

    def step(*a: Tensor) -> Any:
        return ops.lstm_cell_forward(*a)

    assert torch.autograd.gradcheck(step, arguments.present())
    assert torch.autograd.gradgradcheck(step, arguments.present())
    gates = ops.lstm_cell_forward(*arguments)[2].detach().requires_grad_()
    grads = [
        torch.randn_like(gates[:, :5]).requires_grad_() if name in use else None for name in "hc"
    ]
    given = [*grads, gates, x, h, c, w_ih, w_hh]

    def backward(op: Any, *present: Tensor) -> Any:
        rest = iter(present)
        return op(*(t if t is None else next(rest) for t in given), [True] * 7)

    present = [t for t in given if t is not None]
    for op in (ops.lstm_cell_backward, ops.lstm_cell_backward_reuse_gates):
        assert torch.autograd.gradcheck(partial(backward, op), present)
        assert torch.autograd.gradgradcheck(partial(backward, op), present)
    tangents = [torch.randn_like(t) for t in arguments.present()]
    found = torch.func.jvp(step, tuple(arguments.map(torch.detach)), tuple(tangents))[1]
    expected = torch.func.jvp(
        lambda *a: oracle(Arguments(*a)), tuple(arguments.map(torch.detach)), tuple(tangents)
    )[1]
    torch.testing.assert_close(found[:2], expected)


# Many gradients at once


@pytest.mark.parametrize("inputs", [Arguments._fields, ("input", "h", "c"), ("c",), ("weight_hh",)])
@pytest.mark.parametrize("retain_graph", [False, True])
@pytest.mark.parametrize("create_graph", [False, True])
def test_batched_gradients(inputs: tuple[str, ...], retain_graph: bool, create_graph: bool) -> None:
    V = 6
    results = []
    for function, start in (
        (cell, random_arguments(*SHAPE)),
        (oracle, random_arguments(*SHAPE).double()),
    ):
        arguments = start.trainable()
        outputs = function(arguments)
        grads = [
            torch.randn(V, *SHAPE[::2], generator=torch.Generator().manual_seed(i)).to(
                outputs[0].dtype
            )
            for i in range(2)
        ]
        wanted = [getattr(arguments, n) for n in inputs]
        found = torch.autograd.grad(
            outputs, wanted, grads, is_grads_batched=True,
            retain_graph=retain_graph or create_graph, create_graph=create_graph,
        )  # fmt: skip
        if create_graph:
            found += torch.autograd.grad(
                torch.stack([g.square().sum() for g in found]).sum(), wanted, retain_graph=True
            )
        if retain_graph or create_graph:  # the graph is as it was
            found += torch.autograd.grad(outputs, wanted, [g[0] for g in grads])
        results.append(found)
    for actual, want in zip(*results, strict=True):
        check_gradient("", actual, want, (inputs, retain_graph))


@pytest.mark.filterwarnings("error")  # torch warns where it loops
@pytest.mark.parametrize("use", ["h", "c"])
def test_gradients_of_one_output_batched(use: str) -> None:
    arguments = random_arguments(*SHAPE).trainable()
    wide = arguments.double().trainable()
    eye = torch.eye(SHAPE[0] * SHAPE[2]).view(-1, SHAPE[0], SHAPE[2])
    i = "hc".index(use)
    found = torch.autograd.grad(
        cell(arguments)[i], arguments.present(), eye, is_grads_batched=True, allow_unused=True
    )
    expected = torch.autograd.grad(
        oracle(wide)[i], wide.present(), eye.double(), is_grads_batched=True
    )
    for actual, want in zip(found, expected, strict=True):
        check_gradient("", actual, want, use)


@pytest.mark.parametrize("vectorize", [False, True])
def test_jacobian_and_hessian(vectorize: bool) -> None:
    start = random_arguments(*SHAPE)
    functional: Any = torch.autograd.functional  # torch leaves it untyped
    for function in (functional.jacobian, functional.hessian):
        output: Any = torch.sum if function is functional.hessian else torch.clone

        def of(step: Any, *a: Tensor) -> Tensor:
            found: Tensor = output(step(Arguments(*a))[0])  # noqa: B023
            return found

        found = function(lambda *a: of(cell, *a), tuple(start), vectorize=vectorize)
        wide = tuple(start.double())
        expected = function(lambda *a: of(oracle, *a), wide)
        flat_found, flat_expected = (torch.utils._pytree.tree_leaves(t) for t in (found, expected))
        for actual, want in zip(flat_found, flat_expected, strict=True):
            check_gradient("", actual, want, (function.__name__, vectorize))


@pytest.mark.parametrize("name", ["lstm_cell_backward", "lstm_cell_backward_reuse_gates"])
@pytest.mark.parametrize("weights", [True, False])
def test_vmap_over_any_argument_of_backward(name: str, weights: bool) -> None:
    V = 3
    a = random_arguments(*SHAPE)
    _, _, gates = ops.lstm_cell_forward(*a)
    given = [random_like(a.h, 1), random_like(a.h, 2), gates, *a[:5]]  # type: ignore[arg-type]
    stacked = [torch.stack([t * (1 + 0.1 * v) for v in range(V)]) for t in given]
    mask = [True, True, True, *[weights] * 4]

    def call(*t: Tensor) -> Any:
        found = getattr(ops, name)(*t[:2], t[2].clone(), *t[3:], mask)
        return tuple(f for f, wanted in zip(found, mask, strict=True) if wanted)

    for chosen in range(1, 1 << len(given)):
        dims = [0 if chosen >> i & 1 else None for i in range(len(given))]
        arguments = [s if d == 0 else t for s, t, d in zip(stacked, given, dims, strict=True)]
        found = torch.vmap(call, tuple(dims))(*arguments)
        for v in range(V):
            one = call(*(t if d is None else t[v] for t, d in zip(arguments, dims, strict=True)))
            for actual, want in zip(found, one, strict=True):
                assert_close(actual[v], want, torch.tensor(1e-5), (dims, v))
