"""What the backward pass holds on to, what it hands out, and how it meets autograd's tools."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    Arguments,
    cell,
    check_gradient,
    gradients,
    oracle,
    random_arguments,
    random_like,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lstmfused

SHAPE = (6, 5, 19)


def plain_gradients(arguments: Arguments) -> dict[str, Tensor]:
    h, c = oracle(arguments)
    return gradients(cell, arguments, random_like(h), random_like(c))


@pytest.mark.parametrize("edited", [0, 1], ids=["h", "c"])
def test_edited_output_leaves_backward_alone(edited: int) -> None:
    arguments = random_arguments(*SHAPE)
    expected = plain_gradients(arguments)
    trainable = arguments.trainable()
    outputs = cell(trainable)
    outputs[edited].data.fill_(torch.nan)
    grads = [random_like(output) for output in outputs]
    found = torch.autograd.grad(outputs, trainable.present(), grads)
    for actual, (name, want) in zip(found, expected.items(), strict=True):
        assert torch.equal(actual, want), name


@pytest.mark.parametrize("edited", [0, 1], ids=["h", "c"])
def test_in_place_operation_on_output_is_differentiated(edited: int) -> None:
    def doubled(arguments: Arguments) -> tuple[Tensor, Tensor]:
        outputs = cell(arguments)
        outputs[edited].mul_(2)
        return outputs

    arguments = random_arguments(*SHAPE)
    grads = [random_like(output) for output in oracle(arguments)]
    actual = gradients(doubled, arguments, *grads)
    grads[edited] = grads[edited] * 2
    for name, want in gradients(cell, arguments, *grads).items():
        assert torch.equal(actual[name], want), name


@pytest.mark.parametrize("name", ["input", "h", "c", "weight_ih", "weight_hh"])
def test_edited_argument_is_noticed(name: str) -> None:
    arguments = random_arguments(*SHAPE).trainable()
    h, c = cell(arguments)
    with torch.no_grad():
        getattr(arguments, name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward((h.sum(), c.sum()))


def test_gradients_do_not_share_memory() -> None:
    arguments = random_arguments(*SHAPE).trainable()
    h, c = cell(arguments)
    torch.autograd.backward((h.sum(), c.sum()))
    grads = {name: t.grad for name, t in arguments._asdict().items()}
    expected = {name: grad.clone() for name, grad in grads.items()}
    for edited, grad in grads.items():
        grad.fill_(torch.nan)
        for name in grads.keys() - {edited}:
            assert torch.equal(grads[name], expected[name]), (edited, name)
        grad.copy_(expected[edited])


def test_gradients_do_not_share_memory_with_incoming_ones() -> None:
    arguments = random_arguments(*SHAPE).trainable()
    outputs = cell(arguments)
    incoming = [random_like(output) for output in outputs]
    before = [t.clone() for t in incoming]
    for grad in torch.autograd.grad(outputs, arguments.present(), incoming):
        grad.zero_()
    assert all(map(torch.equal, incoming, before))


@pytest.mark.parametrize("layout", ["expanded", "transposed", "every second"])
def test_incoming_gradients_of_any_layout(layout: str) -> None:
    arguments = random_arguments(*SHAPE)
    h, c = oracle(arguments)
    views = {
        "expanded": lambda t: torch.ones(()).expand(t.shape),
        "transposed": lambda t: random_like(t.mT).mT,
        "every second": lambda t: random_like(torch.cat([t, t], 1))[:, ::2],
    }
    grads = [views[layout](t) for t in (h, c)]
    assert not any(grad.is_contiguous() for grad in grads)
    expected = gradients(oracle, arguments.double(), *(grad.double() for grad in grads))
    for name, actual in gradients(cell, arguments, *grads).items():
        check_gradient(name, actual, expected[name], layout)


def test_sum_as_loss() -> None:
    """The gradient of a sum is expanded from one number."""
    arguments = random_arguments(*SHAPE).trainable()
    h, c = cell(arguments)
    torch.autograd.backward((h.sum(), c.sum()))
    ones = torch.ones(h.shape, dtype=torch.float64)
    expected = gradients(oracle, arguments.double(), ones, ones)
    for name, t in arguments._asdict().items():
        check_gradient(name, t.grad, expected[name], "sum")


def test_gradients_accumulate() -> None:
    arguments = random_arguments(*SHAPE).trainable()
    for _ in range(2):
        outputs = cell(arguments)
        torch.autograd.backward(outputs, [random_like(output) for output in outputs])
    for name, want in plain_gradients(arguments).items():
        assert torch.equal(getattr(arguments, name).grad, 2 * want), name


def test_one_tensor_as_two_arguments() -> None:
    """x is h and W_ih is W_hh: gradients of both places add up."""
    B, H = 5, 7
    start = random_arguments(B, H, H)

    def tied(arguments: Arguments) -> Arguments:
        return arguments._replace(
            h=arguments.input, c=arguments.input, weight_hh=arguments.weight_ih
        )

    one, wide = start.trainable(), start.double().trainable()
    torch.autograd.backward(cell(tied(one))[0].square().sum())
    torch.autograd.backward(oracle(tied(wide))[0].square().sum())
    for name in ("input", "weight_ih", "bias_ih", "bias_hh"):
        check_gradient(name, getattr(one, name).grad, getattr(wide, name).grad, "tied")


def test_saved_tensors_may_be_offloaded() -> None:
    arguments = random_arguments(*SHAPE)
    expected = plain_gradients(arguments)
    with torch.autograd.graph.save_on_cpu():
        actual = plain_gradients(arguments)
    packed: list[Tensor] = []

    def pack(t: Tensor) -> int:
        packed.append(t.detach().clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda k: packed[k]):
        moved = plain_gradients(arguments)
    assert packed
    for name, want in expected.items():
        assert torch.equal(actual[name], want), name
        assert torch.equal(moved[name], want), name


class Called(TorchDispatchMode):
    """Notes what operators run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def backward_operator(h: Tensor, inputs: list[Tensor], **options: Any) -> tuple[str, list[Tensor]]:
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        found = torch.autograd.grad(h, inputs, torch.ones_like(h), **options)
    (name,) = {e.name for e in profiler.events() if e.name.startswith("lstmfused::lstm_cell_back")}
    return name, list(found)


@pytest.mark.parametrize("shape", [SHAPE, (600, 9, 130)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_are_used_up_by_who_sees_them_last(
    dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """The gate gradients take the gates' place only if the graph is not kept, no hook holds what
    it saved and no mode looks on; whether they do changes no bit."""
    arguments = random_arguments(*shape, dtype).trainable()
    h, _ = cell(arguments)
    first, expected = backward_operator(h, arguments.present(), retain_graph=True)
    assert first == "lstmfused::lstm_cell_backward"
    last, found = backward_operator(h, arguments.present())
    assert last == "lstmfused::lstm_cell_backward_reuse_gates"
    assert all(map(torch.equal, found, expected))

    held: list[tuple[Tensor, Tensor]] = []

    def pack(t: Tensor) -> Tensor:
        held.append((t, t.detach().clone()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        h, _ = cell(arguments)
    name, found = backward_operator(h, arguments.present())
    assert name == first
    assert held
    assert all(torch.equal(t, copy) for t, copy in held)
    assert all(map(torch.equal, found, expected))

    h, _ = cell(arguments)
    with Called() as mode:
        found = list(torch.autograd.grad(h, arguments.present(), torch.ones_like(h)))
    assert first in mode.names
    assert last not in mode.names
    assert all(map(torch.equal, found, expected))


def operators(function: Callable[[], object]) -> list[str]:
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        function()
    return [event.name for event in profiler.events()]


def test_both_backwards_of_a_penalty_are_fused() -> None:
    """The step is not computed again, neither for the first gradients nor for the second."""
    arguments = random_arguments(*SHAPE).trainable()
    h, c = cell(arguments)
    first: list[Tensor] = []
    names = operators(
        lambda: first.extend(
            torch.autograd.grad(h.sum() + c.sum(), arguments.present(), create_graph=True)
        )
    )
    assert names.count("lstmfused::lstm_cell_backward") == 1
    assert not {"aten::mm", "aten::linear", "aten::addmm", "aten::sigmoid"} & set(names)
    penalty = torch.stack([t.square().sum() for t in first]).sum()
    names = operators(lambda: torch.autograd.grad(penalty, arguments.present()))
    assert names.count("lstmfused::lstm_cell_unit_tangents") == 1
    assert not {"aten::linear", "aten::sigmoid", "aten::tanh"} & set(names)
    # four of the sums, four of input and h, one of each weight
    assert sum(names.count(f"aten::{name}") for name in ("mm", "addmm")) == 10


def test_gates_outlive_the_first_graph() -> None:
    """Gradients are differentiated by the gates, whatever becomes of the graph that had them."""

    arguments = random_arguments(6, 5, 32).trainable()
    outputs = cell(arguments)
    total = torch.stack([output.square().sum() for output in outputs]).sum()
    found = []
    for retain in (True, False):
        incoming = [2 * output.detach() for output in outputs]
        first = torch.autograd.grad(
            outputs, arguments.present(), incoming, create_graph=True, retain_graph=True
        )
        if not retain:
            torch.autograd.grad(total, arguments.present())
        vectors = [random_like(t) for t in first]
        found.append(torch.autograd.grad(first, arguments.present(), vectors))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("name", ["input", "h", "c", "weight_ih", "weight_hh"])
def test_argument_edited_before_the_second_backward_is_noticed(name: str) -> None:
    arguments = random_arguments(*SHAPE).trainable()
    h, c = cell(arguments)
    first = torch.autograd.grad((h.sum(), c.sum()), arguments.present(), create_graph=True)
    with torch.no_grad():
        getattr(arguments, name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(first[3].square().sum(), arguments.weight_ih)


def test_second_gradients_do_not_share_memory() -> None:
    arguments = random_arguments(*SHAPE).trainable()
    h, c = cell(arguments)
    first = torch.autograd.grad((h.sum(), c.sum()), arguments.present(), create_graph=True)
    second = torch.autograd.grad([t.square().sum() for t in first], arguments.present())
    expected = [t.clone() for t in second]
    for k, edited in enumerate(second):
        edited.fill_(torch.nan)
        for other, want in zip(second[k + 1 :], expected[k + 1 :], strict=True):
            assert torch.equal(other, want)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant: bool) -> None:
    arguments = random_arguments(*SHAPE)
    module = lstmfused.LSTMCell(5, 19)
    module.load_state_dict(dict(zip(Arguments._fields[3:], arguments[3:], strict=True)))
    x, h, c, *_ = arguments.map(torch.clone).trainable()
    outputs = checkpoint(lambda x, *hx: module(x, hx), x, h, c, use_reentrant=use_reentrant)
    grads = [random_like(output) for output in outputs]
    torch.autograd.backward(outputs, grads)
    named: dict[str, Any] = {"input": x, "h": h, "c": c, **dict(module.named_parameters())}
    for name, want in gradients(cell, arguments, *grads).items():
        assert torch.equal(named[name].grad, want), name


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.filterwarnings("ignore:Error detected in .*Step")
def test_anomaly_mode() -> None:
    """It changes no gradient, and finds the step that makes NaN of an infinite one."""
    arguments = random_arguments(*SHAPE)
    expected = plain_gradients(arguments)
    with torch.autograd.detect_anomaly(check_nan=True):
        for name, want in plain_gradients(arguments).items():
            assert torch.equal(expected[name], want), name
        trainable = arguments.trainable()
        h, _ = cell(trainable)
        with pytest.raises(RuntimeError, match=r"Step>. returned nan values"):
            torch.autograd.grad(h, trainable.present(), torch.full_like(h, torch.inf))


def test_c_is_no_way_to_h() -> None:
    """One node makes both, as torch's fused CUDA cell does: what is seen at c comes from its own
    uses, while the gradients of all arguments are whole."""
    arguments = random_arguments(*SHAPE).trainable()
    h, c = cell(arguments)
    assert h.grad_fn is c.grad_fn
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(h.sum(), c, retain_graph=True)
    seen: list[Tensor] = []
    c.retain_grad()
    c.register_hook(seen.append)
    torch.autograd.backward((h.sum(), 2 * c.sum()))
    assert torch.equal(seen[0], torch.full_like(c, 2))
    assert torch.equal(c.grad, seen[0])  # type: ignore[arg-type]
    wide = arguments.double().trainable()
    h, c = oracle(wide)
    torch.autograd.backward((h.sum(), 2 * c.sum()))
    for name, t in arguments._asdict().items():
        check_gradient(name, t.grad, getattr(wide, name).grad, "h and c")


def test_hooks_on_tensors_and_nodes() -> None:
    arguments = random_arguments(*SHAPE)
    expected = plain_gradients(arguments)
    trainable = arguments.trainable()
    seen: list[str] = []

    def doubled(name: str, grad: Tensor) -> Tensor:
        seen.append(name)
        return 2 * grad

    for name, t in trainable._asdict().items():
        t.register_hook(partial(doubled, name))
        t.register_post_accumulate_grad_hook(lambda t: seen.append("accumulated"))
    outputs = cell(trainable)
    nodes: list[Any] = [output.grad_fn for output in outputs]
    assert nodes[0] is nodes[1]
    nodes[0].register_prehook(lambda grads: seen.append("before"))
    nodes[0].register_hook(lambda grads, _: seen.append("after"))
    torch.autograd.backward(outputs, [random_like(output) for output in outputs])
    assert seen[:2] == ["before", "after"]
    assert sorted(seen[2:]) == sorted([*expected, *["accumulated"] * len(expected)])
    for name, want in expected.items():
        assert torch.equal(getattr(trainable, name).grad, 2 * want), name
