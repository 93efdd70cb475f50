"""Gradients against finite differences, the float64 reference and each other."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    Arguments,
    Cell,
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


@pytest.mark.parametrize("use", ["hc", "h", "c"])
def test_double_backward(use: str) -> None:
    """The gradient of a penalty on gradients, as WGAN-GP and MAML take it."""

    def penalty(
        function: Callable[..., tuple[Tensor, Tensor]], arguments: Arguments
    ) -> list[Tensor]:
        arguments = arguments.trainable()
        outputs = dict(zip("hc", function(arguments), strict=True))
        loss = torch.cat([outputs[name].square() for name in use]).sum()
        first = torch.autograd.grad(loss, arguments.present(), create_graph=True)
        total = torch.stack([t.square().sum() for t in first]).sum()
        return list(torch.autograd.grad(total, arguments.present()))

    for B, I, H in ((None, 3, 5), (1, 3, 5), (7, 20, 33), (65, 51, 20)):
        arguments = random_arguments(B, I, H, torch.float64)
        expected = penalty(oracle, arguments)
        for name, actual, want in zip(
            Arguments._fields, penalty(cell, arguments), expected, strict=True
        ):
            check_gradient(name, actual, want, (B, I, H))


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
