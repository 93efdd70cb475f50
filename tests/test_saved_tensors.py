"""What a step saves for backward: what torch's cell does, and never overwritten unnoticed."""

from itertools import combinations
from typing import Any

import pytest
import torch
from cases import (
    Arguments,
    activated_gates,
    cell,
    check_gradient,
    oracle,
    random_arguments,
    random_like,
)
from torch import Tensor, nn

import lstmfused

SHAPE = (4, 10, 20)
ops = torch.ops.lstmfused


def edited(function: Any, start: Arguments, needing: tuple[str, ...], name: str) -> Any:
    """Gradients by name where argument `name` is edited after the step, or torch's error."""
    given = start.map(lambda t: t.detach().clone())
    # No leaf, which would be bad to edit: as it comes out of a layer before.
    leaves = {n: getattr(given, n).requires_grad_() for n in needing}
    given = given._replace(**{n: leaf * 1 for n, leaf in leaves.items()})
    h, c = function(given)
    with torch.no_grad():
        getattr(given, name).fill_(torch.nan)
    try:
        grads = torch.autograd.grad((h.sum(), c.sum()), list(leaves.values()))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return None
    return dict(zip(needing, grads, strict=True))


def test_edited_argument_is_noticed_only_where_torch_needs_it() -> None:
    start = random_arguments(*SHAPE)
    names = Arguments._fields
    allowed = noticed = 0
    for needing in (s for n in range(1, 8) for s in combinations(names, n)):
        for name in names:
            expected = edited(oracle, start.double(), needing, name)
            actual = edited(cell, start, needing, name)
            if expected is None or (name == "c" and needing == ("c",)):  # tanh(c') is made from it
                assert actual is None, (needing, name)
                noticed += 1
                continue
            assert actual is not None, (needing, name)
            allowed += 1
            for n, want in expected.items():
                check_gradient(n, actual[n], want, (needing, name))
    assert allowed > 100
    assert noticed > 100


@pytest.mark.parametrize("create_graph", [False, True])
def test_frozen_cell_behind_a_learned_state(create_graph: bool) -> None:
    """Its input may be refilled, or an inference tensor."""
    with torch.inference_mode():
        seen = torch.randn(SHAPE[:2])
    refilled = seen.clone()
    found = []
    for kind in (nn.LSTMCell, lstmfused.LSTMCell):
        torch.manual_seed(0)
        module = kind(*SHAPE[1:]).requires_grad_(False)
        for x in (seen, refilled):
            h = torch.ones(4, 20, requires_grad=True)
            y, _ = module(x, (h, torch.ones(4, 20)))
            if x is refilled:
                x.zero_()
            (grad,) = torch.autograd.grad(y.sum(), h, create_graph=create_graph)
            if create_graph:
                (grad,) = torch.autograd.grad(grad.square().sum(), h)
            found.append(grad)
        refilled.copy_(seen)
    torch.testing.assert_close(found[2:], found[:2])


def test_weights_may_change_after_a_step_from_no_state() -> None:
    """One step of a learned optimizer, say: weight_hh met zeros that need no gradient."""
    module = lstmfused.LSTMCell(*SHAPE[1:])
    x = torch.randn(SHAPE[:2])
    h, c = module(x)
    expected = torch.autograd.grad(h.sum() + c.sum(), list(module.parameters()))
    h, c = module(x)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    found = torch.autograd.grad(h.sum() + c.sum(), list(module.parameters()))
    assert all(map(torch.equal, found, expected))


def test_what_is_not_needed_is_not_kept_alive() -> None:
    module = lstmfused.LSTMCell(*SHAPE[1:]).requires_grad_(False)
    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t

    h, c = (torch.randn(4, 20, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(torch.randn(SHAPE[:2]), (h, c))
    assert sorted(tuple(t.shape) for t in packed) == [(4, 20), (4, 80), (80, 20)]


@pytest.mark.parametrize("bias", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("create_graph", [False, True])
def test_absent_biases(bias: tuple[bool, bool], create_graph: bool) -> None:
    """The gradients after them are not shifted."""
    arguments = random_arguments(*SHAPE, bias=bias).trainable()
    wide = arguments.double().trainable()
    found, expected = (
        torch.autograd.grad(function(a)[0].square().sum(), a.present(), create_graph=create_graph)
        for function, a in ((cell, arguments), (oracle, wide))
    )
    for actual, want in zip(found, expected, strict=True):
        check_gradient("", actual, want, bias)


# The gates, which the last backward overwrites


@pytest.mark.parametrize("kind", [nn.LSTMCell, lstmfused.LSTMCell])
def test_gradient_taken_in_a_post_hook(kind: type[nn.LSTMCell]) -> None:
    """A node lets go of what it saved only after its post hooks."""
    torch.manual_seed(0)
    module, x = kind(10, 20), torch.randn(4, 10, requires_grad=True)
    expected = torch.autograd.grad(module(x)[0].sum(), x)[0]
    h, _ = module(x)
    inside: list[Tensor] = []

    def hook(*_: Any) -> None:
        if not inside:
            inside.append(expected)
            inside[0] = torch.autograd.grad(h, x, torch.ones_like(h), retain_graph=True)[0]

    h.grad_fn.register_hook(hook)
    h.sum().backward()
    torch.testing.assert_close(inside[0], expected)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("again", ["post hook of another node", "second backward"])
def test_gates_that_were_used_up_are_not_read_again(again: str) -> None:
    x = torch.randn(4, 10, requires_grad=True)
    h, _ = lstmfused.LSTMCell(10, 20)(x * 1)
    loss = h.sum()
    if again == "second backward":
        loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        if again != "second backward":
            x.register_hook(lambda _: torch.autograd.grad(h, x, torch.ones_like(h)))
        loss.backward()


def test_operator_that_uses_up_the_gates_says_so() -> None:
    """Its schema: who saved them before raises torch's error."""
    arguments = random_arguments(*SHAPE).trainable()
    h, c, gates = ops.lstm_cell_forward(*arguments)
    x, hx, cx, weight_ih, weight_hh, *_ = arguments.map(torch.detach)
    assert cx is not None
    used = gates.detach()
    before = used._version
    ops.lstm_cell_backward_reuse_gates(
        torch.ones_like(cx), None, used, x, hx, cx, weight_ih, weight_hh, [True] * 7
    )
    assert used._version == before + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(h.sum() + c.sum(), arguments.present())


def test_gates_are_those_of_the_step() -> None:
    arguments = random_arguments(*SHAPE).trainable()
    *_, gates = ops.lstm_cell_forward(*arguments)
    grad = random_like(gates)
    wide = arguments.double().trainable()
    names = ("input", "h", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
    found = torch.autograd.grad(gates, [getattr(arguments, n) for n in names], grad)
    expected = torch.autograd.grad(
        activated_gates(wide), [getattr(wide, n) for n in names], grad.double()
    )
    for name, actual, want in zip(names, found, expected, strict=True):
        check_gradient(name, actual, want, "gates")
