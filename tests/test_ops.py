"""The operators under opcheck, fake tensors, torch.compile and autocast."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    Arguments,
    assert_close,
    cell,
    check_autocast_gradients,
    check_gradient,
    check_output,
    oracle,
    random_arguments,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal import composite_compliance

import lstmfused

# What torch's own opcheck and compiler stumble over.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]*. is deprecated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

ops = torch.ops.lstmfused
I, H = 5, 7
FORMS: tuple[dict[str, Any], ...] = ({}, {"bias": (False, False)}, {"bias": (True, False)})


def backward_arguments(B: int, dtype: torch.dtype) -> list[Any]:
    x, h, c, weight_ih, weight_hh, _, _ = random_arguments(B, I, H, dtype)
    grad, gates = torch.randn(B, H, dtype=dtype), torch.rand(B, 4 * H, dtype=dtype)
    return [grad, grad, gates, x, h, c, weight_ih, weight_hh]


@pytest.mark.parametrize("form", [*FORMS, {"state": False}], ids=str)
@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, train: bool, form: dict[str, Any]) -> None:
    for B in (None, 0, 1, 3):
        arguments = random_arguments(B, I, H, dtype, **form)
        torch.library.opcheck(ops.lstm_cell.default, arguments.trainable() if train else arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck_inner(dtype: torch.dtype) -> None:
    for B in (0, 1, 3):
        for form in FORMS:
            arguments = random_arguments(B, I, H, dtype, **form)
            torch.library.opcheck(ops.lstm_cell_forward.default, tuple(arguments))
        given = backward_arguments(B, dtype)
        for mask in ([True] * 7, [False] * 7, [True, False, True, False, True, False, True]):
            for grads in (given[:2], [None, given[1]], [given[0], None]):
                for op in (ops.lstm_cell_backward, ops.lstm_cell_backward_reuse_gates):
                    torch.library.opcheck(op.default, (*grads, *given[2:], mask))


@pytest.mark.parametrize(
    ("dtype", "reverse"),
    [(torch.float32, False), (torch.float64, True), (torch.bfloat16, True)],
    ids=str,
)
def test_opcheck_layer(dtype: torch.dtype, reverse: bool) -> None:
    for T, B in ((3, 2), (1, 1), (2, 0)):
        x, h, c, *weights = random_arguments(B, I, H, dtype)
        x, mask = torch.randn(T, B, I, dtype=dtype), torch.randint(0, 2, (T, B)).to(torch.uint8)
        transposed: list[Any] = [t.mT.contiguous().mT for t in weights[:2] if t is not None]
        for given in (weights, [*transposed, weights[2], None]):
            for row_mask in (None, mask):
                arguments = [x, h, c, *given, row_mask, reverse]
                torch.library.opcheck(ops.lstm_layer.default, (*arguments, True))
                torch.library.opcheck(ops.lstm_layer_forward.default, tuple(arguments))
                grad = torch.randn(T, B, H, dtype=dtype)
                saved = ops.lstm_layer_forward(*arguments)
                for wanted in ([True] * 7, [True, False] * 3 + [False]):
                    known = [grad, None, c, None, x, *saved, *given[:2]]
                    backward = ops.lstm_layer_backward.default
                    torch.library.opcheck(backward, (*known, row_mask, reverse, wanted))


def test_composite_compliance() -> None:
    """Any argument may be a tensor subclass that sees every operator inside, backward and in
    forward mode, too: torch's own check, over all subsets of arguments."""
    equal = torch.testing.assert_close
    for form in (*FORMS, {"state": False}):
        arguments = tuple(random_arguments(3, I, H, torch.float64, **form))
        composite_compliance.check_all_permutations(ops.lstm_cell.default, arguments, {}, equal)
    for form in ({"bias": (False, False)}, {"state": False, "bias": (True, False)}):
        for check in (
            composite_compliance.check_backward_formula,
            composite_compliance.check_forward_ad_formula,
        ):
            trainable = tuple(random_arguments(3, I, H, torch.float64, **form).trainable())
            check(ops.lstm_cell.default, trainable, {}, assert_equal_fn=equal)


def test_composite_compliance_of_inner_operators() -> None:
    equal = torch.testing.assert_close
    forward = tuple(random_arguments(3, I, H, torch.float64))
    backward = (*backward_arguments(3, torch.float64), [True] * 7)
    for op, arguments in (
        (ops.lstm_cell_forward.default, forward),
        (ops.lstm_cell_backward.default, backward),
    ):
        composite_compliance.check_all_permutations(op, arguments, {}, equal)


class Seen(TorchFunctionMode):
    """Notes what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


class Marked(Tensor):
    """A subclass that its results belong to, as is torch's default."""


@pytest.mark.parametrize("name", Arguments._fields)
def test_modes_and_subclasses_see_the_operator(name: str) -> None:
    arguments = random_arguments(3, I, H)
    expected = cell(arguments)
    with Seen() as seen:
        assert all(map(torch.equal, cell(arguments), expected))
    assert ops.lstm_cell in seen.calls
    marked = arguments._replace(**{name: getattr(arguments, name).as_subclass(Marked)})
    for actual, want in zip(cell(marked), expected, strict=True):
        assert type(actual) is Marked
        assert torch.equal(actual, want)


def test_modes_and_subclasses_see_the_packed_operator() -> None:
    arguments = random_arguments(3, I, H)
    x, state = arguments.input, (arguments.h, arguments.c)
    packed = lstmfused.PackedLSTMCell(lstmfused.LSTMCell(I, H))
    expected = packed(x, state)
    with Seen() as seen:
        assert all(map(torch.equal, packed(x, state), expected))
    assert ops.lstm_cell_packed in seen.calls
    for actual, want in zip(packed(x.as_subclass(Marked), state), expected, strict=True):
        assert type(actual) is Marked
        assert torch.equal(actual, want)


def describe(tensors: Any) -> list[tuple[Any, ...]]:
    return [(tuple(t.shape), t.dtype, t.stride()) for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_and_meta_tensors_have_the_real_shapes(dtype: torch.dtype) -> None:
    for B in (None, 0, 1, 3):
        for state in (True, False):
            arguments = random_arguments(B, I, H, dtype, state=state)
            expected = describe(cell(arguments))
            assert describe(cell(arguments.map(lambda t: t.to("meta")))) == expected
            with FakeTensorMode() as mode:
                fake = arguments.map(mode.from_tensor)
                assert describe(cell(fake)) == expected
    for B in (0, 1, 3):
        given = backward_arguments(B, dtype)
        meta = [t.to("meta") for t in given]
        for mask in ([True] * 7, [True, False, False, True, False, True, False], [False] * 7):
            real = ops.lstm_cell_backward(*given, mask)
            for op in (ops.lstm_cell_backward, ops.lstm_cell_backward_reuse_gates):
                assert describe(op(*meta, mask)) == describe(real)
        real = ops.lstm_cell_forward(*random_arguments(B, I, H, dtype))
        fake = random_arguments(B, I, H, dtype).map(lambda t: t.to("meta"))
        assert describe(ops.lstm_cell_forward(*fake)) == describe(real)


@pytest.mark.parametrize("name", ["h", "c", "weight_ih", "weight_hh", "bias_ih"])
def test_meta_tensors_of_wrong_shape(name: str) -> None:
    meta = random_arguments(3, I, H).map(lambda t: t.to("meta"))
    bad = torch.empty([n + 1 for n in getattr(meta, name).shape], device="meta")
    with pytest.raises(RuntimeError):
        cell(meta._replace(**{name: bad}))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def loss_of(module: lstmfused.LSTMCell, x: Tensor) -> Tensor:
    """Three steps, of which each depends on the one before."""
    h, c = module(x)
    for _ in range(2):
        h, c = module(x * 0.5, (h, c))
    return torch.sum(h * c)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    """No graph break, and one graph more, not one for each batch, when the batch varies."""
    counter = CompileCounterWithBackend(backend)
    module = lstmfused.LSTMCell(I, H)
    compiled = torch.compile(loss_of, fullgraph=True, backend=counter)
    for B in (3, 5, 2, 8, 31, 64):
        x = torch.randn(B, I, requires_grad=True)
        parameters = [x, *module.parameters()]
        found = torch.autograd.grad(compiled(module, x), parameters)
        expected = torch.autograd.grad(loss_of(module, x), parameters)
        for actual, want in zip(found, expected, strict=True):
            check_gradient("compiled", actual, want, B)
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
def test_two_compilations_serve_every_batch(train: bool) -> None:
    """The first is for its own batch only: torch learns from the second that batches vary."""
    counter = CompileCounterWithBackend("inductor")
    module = lstmfused.LSTMCell(I, H)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    with torch.set_grad_enabled(train):
        for B in (1, 7, 64, 256):
            x, hx = torch.randn(B, I), module.initial_state(B)
            for actual, want in zip(compiled(x, hx), module(x, hx), strict=True):
                assert torch.equal(actual, want)
                assert actual.requires_grad == train
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_for_inference(backend: str) -> None:
    module = lstmfused.LSTMCell(I, H)
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad():
        for B in (3, 5, 2):
            arguments = random_arguments(B, I, H)
            expected = module(arguments.input, arguments.hx)
            for name, actual, want in zip(
                "hc", compiled(arguments.input, arguments.hx), expected, strict=True
            ):
                check_output(name, actual, want, B)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_unbatched_and_without_bias() -> None:
    module = lstmfused.LSTMCell(I, H, bias=False)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    x = torch.randn(I)
    assert_close(compiled(module, x), loss_of(module, x), torch.tensor(1e-6), "unbatched")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """Inside autocast float32 arguments but c are rounded to the half type, which h has, too."""
    for B, form in ((None, {}), (3, {}), (3, {"state": False}), (3, {"bias": (False, False)})):
        arguments = random_arguments(B, I, H, **form)
        with torch.autocast("cpu", dtype):
            outputs = cell(arguments.trainable())
        rounded = arguments.map(lambda t: t.to(dtype))._replace(c=arguments.c)
        for name, actual, want in zip("hc", outputs, oracle(rounded.double()), strict=True):
            assert actual.dtype == (dtype if name == "h" else torch.float32)
            check_output(name, actual, want, (B, form))


def test_gradients_of_autocast() -> None:
    check_autocast_gradients(random_arguments(3, I, H), "cpu", torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_autocast_switched_off_inside(dtype: torch.dtype) -> None:
    arguments = random_arguments(3, I, H, dtype)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        for actual, want in zip(cell(arguments), cell(arguments), strict=True):
            assert actual.dtype == dtype
            assert torch.equal(actual, want)
