"""c in float32 beside half types: as given, and under autocast."""

from typing import Any

import pytest
import torch
from cases import (
    HALF,
    Arguments,
    activated_gates,
    assert_close,
    cell,
    check_gradient,
    check_output,
    oracle,
    random_arguments,
    random_like,
    sliced,
    torch_cell,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lstmfused

ops = torch.ops.lstmfused
SHAPES = [(1, 16, 16), (3, 5, 7), (7, 4, 1), (33, 10, 20), (65, 1, 9), (300, 9, 130)]
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]*. is deprecated")


def wide_arguments(B: int | None, I: int, H: int, dtype: torch.dtype, **form: Any) -> Arguments:
    arguments = random_arguments(B, I, H, dtype, **form)
    return arguments._replace(c=random_arguments(B, I, H, **form).c)


def check_wide(function: Any, arguments: Arguments, case: object) -> None:
    """c is not rounded at all, h once."""
    h, c = function(arguments)
    want_h, want_c = oracle(arguments.double())
    assert h.dtype == arguments.input.dtype
    assert c.dtype == torch.float32
    check_output("h", h, want_h, case)
    check_output("c", c, want_c, case)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_step(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for bias in ((True, True), (False, True)):
            arguments = wide_arguments(*shape, dtype, bias=bias)
            check_wide(cell, arguments, shape)
            check_wide(cell, arguments._replace(c=sliced(arguments.c)), shape)  # type: ignore[arg-type]
            # The operator that keeps the gates has the same state.
            *state, gates = ops.lstm_cell_forward(*arguments)
            assert all(map(torch.equal, cell(arguments), state))
            assert gates.dtype == dtype
            check_output("c", gates, activated_gates(arguments.double()), shape)
    check_wide(cell, wide_arguments(None, 5, 7, dtype), "unbatched")


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_as_torch(dtype: torch.dtype) -> None:
    """Which has h in float32, too, that the next step would refuse."""
    arguments = wide_arguments(5, 10, 20, dtype)
    for actual, want in zip(cell(arguments), torch_cell(arguments), strict=True):
        assert want.dtype == torch.float32
        assert_close(actual, want, 4 * torch.finfo(dtype).eps * want.abs().clamp(min=1), dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("use", ["hc", "h", "c"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients(dtype: torch.dtype, use: str) -> None:
    for shape in SHAPES:
        arguments = wide_arguments(*shape, dtype).trainable()
        wide = arguments.double().trainable()
        found: list[Tensor] = []
        expected: list[Tensor] = []
        for function, given, into in ((cell, arguments, found), (oracle, wide, expected)):
            outputs = [t for n, t in zip("hc", function(given), strict=True) if n in use]
            grads = [random_like(t.float(), i).to(dtype).to(t.dtype) for i, t in enumerate(outputs)]
            into += torch.autograd.grad(outputs, given.present(), grads)
        for name, t, actual, want in zip(
            Arguments._fields, arguments, found, expected, strict=True
        ):
            assert t is not None
            assert actual.dtype == t.dtype, name
            rows = shape[0] if name.startswith(("weight", "bias")) else 1
            if name == "c":  # itself not rounded, but made from rounded gates
                assert_close(actual, want, 4 * torch.finfo(dtype).eps * want.abs().max(), shape)
            else:
                check_gradient(name, actual, want, (shape, use), rows)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_sums_of_many_steps_are_kept(dtype: torch.dtype) -> None:
    """Open gates: c counts, and its gradient runs through all steps unrounded."""
    weight = torch.zeros(4, 1, dtype=dtype)
    bias = torch.full((4,), 20.0, dtype=dtype)
    start = torch.zeros(1, 1, requires_grad=True)
    h, c = torch.zeros(1, 1, dtype=dtype), start
    for _ in range(1000):
        h, c = lstmfused.functional.lstm_cell(
            torch.ones(1, 1, dtype=dtype), (h, c), weight, weight, bias, None
        )
    assert c.item() == 1000
    c.backward()
    assert start.grad.item() == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("train", [False, True])
def test_counter_under_autocast(dtype: torch.dtype, train: bool) -> None:
    module = lstmfused.LSTMCell(1, 1)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        module.bias_ih.fill_(20)
    state = None
    with torch.autocast("cpu", dtype), torch.set_grad_enabled(train):
        for _ in range(1000):
            state = module(torch.ones(1, 1), state)
    assert state is not None
    assert state[0].dtype == dtype
    assert state[1].dtype == torch.float32
    assert state[1].item() == 1000


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_derivatives_that_are_composed(dtype: torch.dtype) -> None:
    """Double backward, forward mode, torch.func and vmap."""
    arguments = wide_arguments(4, 5, 7, dtype)
    wide = arguments.double()
    eps = torch.finfo(dtype).eps
    names = Arguments._fields
    tangents = [random_like(t) for t in arguments.present()]

    def loss(function: Any, *given: Tensor) -> Tensor:
        h, c = function(Arguments(*given))
        total: Tensor = h.double().square().sum() + c.double().square().sum()
        return total

    def twice(function: Any, given: Arguments) -> list[Tensor]:
        present = given.trainable().present()
        first = torch.autograd.grad(loss(function, *present), present, create_graph=True)
        total = torch.stack([g.double().square().sum() for g in first]).sum()
        return [*first, *torch.autograd.grad(total, present)]

    def forward_mode(function: Any, given: Arguments, tangents: list[Tensor]) -> Any:
        return torch.func.jvp(lambda *a: function(Arguments(*a)), tuple(given), tuple(tangents))[1]

    def of_func(function: Any, given: Arguments) -> Any:
        return torch.func.grad(lambda *a: loss(function, *a), tuple(range(7)))(*given)

    pairs = [
        *zip(twice(cell, arguments), twice(oracle, wide), strict=True),
        *zip(
            forward_mode(cell, arguments, tangents),
            forward_mode(oracle, wide, [t.double() for t in tangents]),
            strict=True,
        ),
        *zip(of_func(cell, arguments), of_func(oracle, wide), strict=True),
    ]
    for i, (actual, want) in enumerate(pairs):
        assert_close(actual, want, 16 * eps * want.abs().max().clamp(min=1), i)
    assert [t.dtype for t in of_func(cell, arguments)] == [t.dtype for t in arguments.present()]

    for name in names:
        stacked = torch.stack([getattr(arguments, name)] * 2)
        h, c = torch.vmap(lambda t, name=name: cell(arguments._replace(**{name: t})))(stacked)
        assert (h.dtype, c.dtype) == (dtype, torch.float32)
        for actual, want in zip((h[1], c[1]), oracle(wide), strict=True):
            assert_close(actual, want, 4 * eps * want.abs().clamp(min=1), name)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_operators_are_what_their_schemas_say(dtype: torch.dtype) -> None:
    for B in (0, 3):
        arguments = wide_arguments(B, 5, 7, dtype)
        torch.library.opcheck(ops.lstm_cell.default, tuple(arguments))
        torch.library.opcheck(ops.lstm_cell.default, tuple(arguments.trainable()))
        torch.library.opcheck(ops.lstm_cell_forward.default, tuple(arguments))
        *_, gates = ops.lstm_cell_forward(*arguments)
        grads = random_like(arguments.h), random_like(arguments.c)  # type: ignore[arg-type]
        for op in (ops.lstm_cell_backward.default, ops.lstm_cell_backward_reuse_gates.default):
            torch.library.opcheck(op, (*grads, gates, *arguments[:5], [True] * 7))
    with FakeTensorMode() as mode:
        h, c = cell(arguments.map(mode.from_tensor))
        assert (h.dtype, c.dtype) == (dtype, torch.float32)


def test_compiled() -> None:
    """In a graph, too, and under autocast."""
    module = lstmfused.LSTMCell(5, 7)
    x = torch.randn(3, 5)

    def loss_of(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h, c = module(x, module(x))
        total: Tensor = h.float().sum() + c.sum()
        return total

    torch.testing.assert_close(
        torch.compile(loss_of, fullgraph=True, backend="aot_eager")(x), loss_of(x)
    )
