"""Derivatives of the layer, of every order and kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import lstmfused
from lstmfused.functional import lstm

# By torch itself, when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]*. is deprecated")

T, B, I, H = 4, 3, 2, 3
RESET = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 1]], dtype=torch.bool)
LENGTHS = torch.tensor([4, 0, 2])


def layer() -> lstmfused.LSTM:
    torch.manual_seed(0)
    return lstmfused.LSTM(I, H, 2, bidirectional=True, dtype=torch.float64)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def function(x: Tensor, h: Tensor, c: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    output, state, cells = lstm(
        *(x, (h, c), list(parameters), True, 2, 0.0, False, True),
        reset=RESET,
        lengths=LENGTHS,
        return_cell_states=True,
    )
    return output, *state, cells


def test_gradients_of_first_and_second_order() -> None:
    arguments = (normal(T, B, I), normal(4, B, H), normal(4, B, H), *layer().parameters())
    assert gradcheck(function, arguments)
    assert gradgradcheck(function, arguments)


def test_forward_mode() -> None:
    h, c, parameters = normal(4, B, H), normal(4, B, H), list(layer().parameters())
    assert gradcheck(
        lambda x: function(x, h, c, *parameters), (normal(T, B, I),), check_forward_ad=True
    )


# Of what a first gradient does not take nothing is saved; what comes after it must do without.
@pytest.mark.parametrize("wanted", ["input", "state", "weights", "biases"])
def test_second_order_of_some_arguments(wanted: str) -> None:
    x, h, c = (t.detach() for t in (normal(T, B, I), normal(4, B, H), normal(4, B, H)))
    named = {k: p.detach() for k, p in layer().named_parameters()}
    prefix = {"weights": "weight", "biases": "bias"}.get(wanted, "none")
    chosen = [k for k in named if k.startswith(prefix)]

    def of(*given: Tensor) -> tuple[Tensor, ...]:
        if wanted == "input":
            return function(given[0], h, c, *named.values())
        if wanted == "state":
            return function(x, *given, *named.values())
        return function(x, h, c, *(named | dict(zip(chosen, given, strict=True))).values())

    given = {"input": [x], "state": [h, c]}.get(wanted, [named[k] for k in chosen])
    assert gradgradcheck(of, [t.clone().requires_grad_() for t in given])


def test_a_state_that_is_made_from_the_weights() -> None:
    """Its gradient is not mistaken for the layer's own use of the weights."""
    x, c, parameters = normal(T, B, I).detach(), normal(4, B, H).detach(), layer().parameters()
    first, *others = (p.detach() for p in parameters)

    def of(weight: Tensor) -> Tensor:
        return function(x, c * weight.sum(), c, weight, *others)[0]

    assert gradcheck(of, (first.clone().requires_grad_(),))
    assert gradgradcheck(of, (first.clone().requires_grad_(),))


def loss(model: lstmfused.LSTM) -> Callable[..., Tensor]:
    def of(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = functional_call(model, parameters, (x,))[0]
        return output.square().sum()

    return of


def test_functional_gradients_of_each_sample() -> None:
    model = layer()
    parameters, of = dict(model.named_parameters()), loss(model)
    xs = normal(5, T, B, I).detach()
    found = vmap(grad(of), (None, 0))(parameters, xs)
    for index, x in enumerate(xs):
        expected = torch.autograd.grad(of(parameters, x), list(parameters.values()))
        for name, want in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][index], want)


@pytest.mark.parametrize("masks", [{}, {"reset": RESET}, {"lengths": LENGTHS}])
@pytest.mark.parametrize("states", [False, True])
def test_vmap_over_inputs(masks: dict[str, Tensor], states: bool) -> None:
    model, xs = layer(), normal(5, T, B, I)

    def of(x: Tensor) -> tuple[Tensor, ...]:
        output, state, *cells = model(x, **masks, return_cell_states=states)
        return output, *state, *cells

    found = vmap(of)(xs)
    for stack, expected in zip(found, zip(*map(of, xs), strict=True), strict=True):
        torch.testing.assert_close(stack, torch.stack(expected))
    (gradient,) = torch.autograd.grad(found[0].square().sum(), xs)
    (want,) = torch.autograd.grad(torch.stack([of(x)[0] for x in xs]).square().sum(), xs)
    torch.testing.assert_close(gradient, want)


def test_vmap_over_weights() -> None:
    model, x = layer(), normal(T, B, I).detach()
    stacked = {k: torch.stack([p, p / 2]).detach() for k, p in model.named_parameters()}
    found = vmap(lambda p: functional_call(model, p, (x,))[0])(stacked)
    for index, output in enumerate(found):
        one = {k: p[index] for k, p in stacked.items()}
        torch.testing.assert_close(output, functional_call(model, one, (x,))[0])


def test_jacobians_and_hessians() -> None:
    model, x = layer(), normal(T, B, I).detach()

    def of(x: Tensor) -> Tensor:
        output: Tensor = model(x)[0]
        return output.sum((0, 2))

    torch.testing.assert_close(jacrev(of)(x), jacfwd(of)(x))
    expected = torch.autograd.functional.hessian(lambda x: of(x).sum(), x)
    torch.testing.assert_close(hessian(lambda x: of(x).sum())(x), expected)
    batched = torch.autograd.functional.jacobian(of, x, vectorize=True)
    torch.testing.assert_close(batched, jacrev(of)(x))
    tangent = jvp(of, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, jacrev(of)(x).sum((1, 2, 3)))


@pytest.mark.parametrize("what", ["output", "cell states"])
def test_what_backward_needs_is_guarded(what: str) -> None:
    output, _, cells = lstmfused.LSTM(I, H)(torch.randn(T, B, I), return_cell_states=True)
    (output if what == "output" else cells).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (output.sum() + cells.sum()).backward()


def test_states_are_the_callers_to_edit() -> None:
    model, x = lstmfused.LSTM(I, H), torch.randn(T, B, I)
    output, (h, c) = model(x)
    expected = torch.autograd.grad(output.sum(), list(model.parameters()), retain_graph=True)
    kept = output.clone()
    with torch.no_grad():
        h.zero_(), c.zero_()
    assert torch.equal(output, kept)
    found = torch.autograd.grad(output.sum(), list(model.parameters()))
    assert all(map(torch.equal, found, expected))
