"""Gradients against finite differences, the float64 reference and each other."""

from itertools import product

import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    Arguments,
    Cell,
    assert_close,
    cell,
    check_gradient,
    check_gradients,
    flat,
    gradients,
    oracle,
    random_arguments,
    random_like,
    torch_cell,
)
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SIZES = (1, 2, 3, 20, 51, 130, 288)
BATCHES = (0, 1, 2, 5, 7, 64, 97)
FORMS: tuple[dict[str, object], ...] = (
    {},
    {"state": False},
    {"bias": (False, False)},
    {"bias": (True, False)},
    {"bias": (False, True)},
    {"state": False, "bias": (False, False)},
)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(None, 3, 2), (0, 2, 3), (1, 1, 1), (3, 2, 3)], ids=str)
def test_finite_differences(shape: tuple[int, int, int], form: dict[str, bool]) -> None:
    function, tensors = flat(random_arguments(*shape, torch.float64, **form))  # type: ignore[arg-type]
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 7, 5), (2, 9, 17)], ids=str)
def test_finite_differences_of_odd_sizes(shape: tuple[int, int, int]) -> None:
    function, tensors = flat(random_arguments(*shape, torch.float64))
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("I", SIZES)
def test_every_size_and_batch(I: int, dtype: torch.dtype) -> None:
    for B, H in product((None, *BATCHES), SIZES):
        check_gradients(random_arguments(B, I, H, dtype), (B, I, H))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_form(layout: str, dtype: torch.dtype) -> None:
    sizes = ((None, 3, 5), (0, 3, 5), (1, 20, 3), (2, 1, 1), (5, 51, 20), (7, 3, 51))
    for (B, I, H), form, use in product(sizes, FORMS, ("hc", "h", "c")):
        arguments = random_arguments(B, I, H, dtype, **form)  # type: ignore[arg-type]
        check_gradients(arguments.map(LAYOUTS[layout]), (B, I, H, form, use), use)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (200, 300, 130),
        (97, 51, 51),
        (300, 512, 128),
        (33, 1030, 70),
        (3, 512, 512),
        (9, 1024, 1024),  # gradients of weights that fit no cache
        (600, 20, 1024),
        (600, 20, 200),  # a batch of more than one stretch
    ],
    ids=str,
)
def test_large(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_gradients(random_arguments(*shape, dtype), shape)


def test_many_rows() -> None:
    check_gradients(random_arguments(5_003, 2, 20), "5003 rows")


def test_gradients_equal_torch() -> None:
    for B, I, H in ((None, 20, 5), (1, 3, 5), (7, 51, 20), (64, 130, 51)):
        arguments = random_arguments(B, I, H, torch.float64)
        shape = oracle(arguments)[0]
        grads = random_like(shape, 1), random_like(shape, 2)
        expected = gradients(torch_cell, arguments, *grads)
        for name, actual in gradients(cell, arguments, *grads).items():
            check_gradient(name, actual, expected[name], (B, I, H))


@pytest.mark.parametrize("shape", [(None, 3, 5), (1, 3, 5), (5, 20, 17), (9, 2, 3)], ids=str)
def test_every_subset_of_arguments(shape: tuple[int, int, int]) -> None:
    """Asking for fewer gradients changes none, whichever output is used."""
    arguments = random_arguments(*shape)
    for use in ("hc", "h", "c"):
        grads = [
            random_like(oracle(arguments)[0], s) if n in use else None for s, n in enumerate("hc")
        ]
        full = gradients(cell, arguments, *grads)
        for wanted in product((True, False), repeat=7):
            chosen = Arguments(*(t.detach().clone() for t in arguments.present()))
            for t, want in zip(chosen.present(), wanted, strict=True):
                t.requires_grad_(want)
            outputs = cell(chosen)
            assert all(output.requires_grad == any(wanted) for output in outputs)
            if any(wanted):
                used = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
                torch.autograd.backward([o for o, _ in used], [g for _, g in used])
            for (name, t), want in zip(chosen._asdict().items(), wanted, strict=True):
                assert (t.grad is not None) == (want and t.requires_grad), (name, wanted)
                if want:
                    check_gradient(name, t.grad, full[name].double(), (use, wanted))


def test_nothing_is_recorded_without_need() -> None:
    arguments = random_arguments(5, 3, 4)
    assert all(output.grad_fn is None for output in cell(arguments))
    with torch.no_grad():
        assert all(output.grad_fn is None for output in cell(arguments.trainable()))
    with torch.inference_mode():
        inferred = cell(arguments.trainable())
        assert all(output.is_inference() for output in inferred)
    for actual, expected in zip(inferred, cell(arguments), strict=True):
        assert torch.equal(actual, expected)


def test_training_gives_the_outputs_of_inference() -> None:
    for B, I, H in ((1, 3, 5), (5, 20, 20), (97, 51, 130)):
        arguments = random_arguments(B, I, H)
        for actual, expected in zip(cell(arguments.trainable()), cell(arguments), strict=True):
            check = (actual.detach() - expected).abs().max()
            assert check <= 1e-6, (B, I, H)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_twice(dtype: torch.dtype) -> None:
    for B, I, H in ((1, 3, 5), (7, 20, 33), (97, 51, 130)):
        arguments = random_arguments(B, I, H, dtype).trainable()
        h, c = cell(arguments)
        grads = random_like(h), random_like(c)
        first = torch.autograd.grad((h, c), arguments.present(), grads, retain_graph=True)
        kept = [t.clone() for t in first]
        for t in first:
            t.zero_()
        second = torch.autograd.grad((h, c), arguments.present(), grads)
        assert all(map(torch.equal, kept, second)), (B, I, H)


USES = pytest.mark.parametrize("use", ["hc", "h", "c"])


@USES
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_finite_differences_of_gradients_of_one_output(form: dict[str, bool], use: str) -> None:
    """The gradient of the other output is None, then."""
    function, tensors = flat(random_arguments(2, 3, 2, torch.float64, **form))  # type: ignore[arg-type]

    def used(*given: Tensor) -> tuple[Tensor, ...]:
        return tuple(t for t, name in zip(function(*given), "hc", strict=True) if name in use)

    assert torch.autograd.gradgradcheck(used, tensors)


def derivatives(
    function: Cell, arguments: Arguments, use: str, wanted: tuple[bool, ...], order: int
) -> list[list[Tensor]]:
    """First the gradients of the wanted arguments; then, up to the given order, those of the ones
    before, along some vectors, for the wanted arguments and for the gradients that come in. Only
    the last ones are not differentiable."""
    chosen = [
        t if t is None else t.detach().clone().requires_grad_(want)
        for t, want in zip(arguments, wanted, strict=True)
    ]
    state = function(Arguments(*chosen))  # type: ignore[arg-type]
    outputs = [t for t, name in zip(state, "hc", strict=True) if name in use]
    incoming = [random_like(t, 7).requires_grad_() for t in outputs]
    leaves = [t for t in chosen if t is not None and t.requires_grad]
    grads = torch.autograd.grad(outputs, leaves, incoming, create_graph=True)
    orders = [list(grads)]
    for k in range(2, order + 1):
        vectors = [random_like(t, seed) for seed, t in enumerate(grads)]
        grads = torch.autograd.grad(
            grads,
            [*leaves, *incoming],
            vectors,
            create_graph=k < order,
            allow_unused=True,
            materialize_grads=True,
        )
        orders.append(list(grads))
    return orders


@USES
def test_double_backward_of_every_subset_of_arguments(use: str) -> None:
    """Whichever first gradients are taken, and of whatever they are differentiated."""
    for state, bias in ((True, (True, True)), (True, (False, True)), (False, (True, False))):
        arguments = random_arguments(3, 4, 5, torch.float64, state=state, bias=bias)
        for wanted in product((True, False), repeat=7):
            present = [w for w, t in zip(wanted, arguments, strict=True) if t is not None]
            if not any(present):
                continue
            both = (derivatives(f, arguments, use, wanted, 2) for f in (cell, torch_cell))
            for actual, want in zip(*(orders[1] for orders in both), strict=True):
                check_gradient("second", actual, want, (use, state, bias, wanted))


@USES
@pytest.mark.parametrize("bias", [(True, True), (False, False)], ids=["bias", "no bias"])
def test_derivatives_of_higher_order_equal_torch(bias: tuple[bool, bool], use: str) -> None:
    for B in (None, 0, 3):
        arguments = random_arguments(B, 4, 5, torch.float64, bias=bias)
        both = (derivatives(f, arguments, use, (True,) * 7, 4) for f in (cell, torch_cell))
        for order, (found, expected) in enumerate(zip(*both, strict=True), 1):
            for actual, want in zip(found, expected, strict=True):
                largest = torch.cat([want.abs().flatten(), want.new_ones(1)]).max()
                bound = 1e-14 * largest * 10 ** (order - 1)  # each order adds up more terms
                assert_close(actual, want, bound, (order, B))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(None, 3, 5), (1, 3, 1), (7, 20, 33), (65, 51, 20), (5, 1, 130), (97, 130, 288)],
    ids=str,
)
def test_double_backward(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """No further from float64 than torch's cell is; in half types this rounds less often."""
    arguments = random_arguments(*shape, dtype)
    wide = derivatives(oracle, arguments.double(), "hc", (True,) * 7, 2)
    own, peer = (derivatives(f, arguments, "hc", (True,) * 7, 2) for f in (cell, torch_cell))
    for found, others, expected in zip(own, peer, wide, strict=True):
        for actual, other, want in zip(found, others, expected, strict=True):
            assert actual.dtype == dtype
            largest = want.abs().max()
            off = (other.double() - want).abs().max()
            bound = 2 * torch.maximum(off, 4 * torch.finfo(dtype).eps * largest)
            assert_close(actual, want, bound, shape)


def test_double_backward_of_strided_arguments() -> None:
    for name, layout in LAYOUTS.items():
        arguments = random_arguments(5, 7, 6, torch.float64).map(layout)
        both = (derivatives(f, arguments, "hc", (True,) * 7, 2) for f in (cell, oracle))
        for actual, want in zip(*(orders[1] for orders in both), strict=True):
            check_gradient("second", actual, want, name)


def test_double_backward_through_many_steps() -> None:
    """A penalty on the gradients of a sequence, each step with a part in every argument's."""

    def penalty(function: Cell, arguments: Arguments) -> list[Tensor]:
        arguments = arguments.trainable()
        h, c = arguments.h, arguments.c
        for _ in range(4):
            h, c = function(arguments._replace(h=h, c=c))
        loss = (h * c).square().sum()  # type: ignore[operator]
        first = torch.autograd.grad(loss, arguments.present(), create_graph=True)
        total = torch.stack([t.square().sum() for t in first]).sum()
        return list(torch.autograd.grad(total, arguments.present()))

    arguments = random_arguments(5, 4, 6, torch.float64)
    pairs = zip(penalty(cell, arguments), penalty(torch_cell, arguments), strict=True)
    for actual, want in pairs:
        check_gradient("penalty", actual, want, "four steps")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_double_backward_under_autocast(dtype: torch.dtype) -> None:
    arguments = random_arguments(5, 7, 6).trainable()

    def penalty(function: Cell, arguments: Arguments) -> list[Tensor]:
        h, c = function(arguments)
        loss = h.double().square().sum() + c.double().square().sum()
        first = torch.autograd.grad(loss, arguments.present(), create_graph=True)
        total = torch.stack([t.double().square().sum() for t in first]).sum()
        return list(torch.autograd.grad(total, arguments.present()))

    with torch.autocast("cpu", dtype):
        found = penalty(cell, arguments)
    expected = penalty(oracle, arguments.double().trainable())
    for actual, want in zip(found, expected, strict=True):
        assert actual.dtype == torch.float32
        bound = 16 * torch.finfo(dtype).eps * want.abs().max()
        assert_close(actual, want, bound, dtype)


def test_many_steps_with_shrinking_batch() -> None:
    """Sentences of a caption decoder end one by one: the units stay, the batch falls."""

    def unroll(function: Cell, arguments: Arguments) -> tuple[Tensor, Tensor]:
        rows = []
        for B in (9, 9, 7, 4, 4, 2, 1):
            kept = {name: getattr(arguments, name)[:B] for name in ("input", "h", "c")}
            h, c = function(arguments._replace(**kept))
            arguments = arguments._replace(h=h, c=c)
            rows.append((h, c))
        h, c = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return h, c

    for dtype in (torch.float32, torch.float64):
        arguments = random_arguments(9, 20, 17, dtype)
        grads = [random_like(output) for output in unroll(oracle, arguments)]
        actual = gradients(lambda a: unroll(cell, a), arguments, *grads)
        wide = [grad.double() for grad in grads]
        expected = gradients(lambda a: unroll(oracle, a), arguments.double(), *wide)
        for name, want in expected.items():
            check_gradient(name, actual[name], want, dtype)
