"""Gradients on CUDA tensors, the inner operators, and what torch makes of the cell there."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from cases import (
    Arguments,
    Cell,
    activated_gates,
    assert_close,
    cell,
    flat,
    gradients,
    oracle,
)
from cuda_cases import (
    ALL,
    BATCHES,
    EVERY_LAYOUT,
    FORMS,
    PATHS,
    SIZES,
    already,
    check_forward,
    check_gradients,
    compare_gradients,
    every_dtype,
    expected_gradients,
    incoming,
    like,
    missing,
    offset,
    on,
    ops,
    output_bound,
    poisoned,
    same_bits,
    tolerance,
)
from torch import Tensor, func

import lstmfused

# What torch has to say of a device is shown, but no error of ours.
pytestmark = pytest.mark.filterwarnings("default")

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

# --------------------------------------------------------------------------------------------------
# Gradients


@poisoned
@every_dtype
@pytest.mark.parametrize("I", SIZES)
def test_gradients_of_sizes_and_batches(device: str, I: int, dtype: torch.dtype) -> None:
    chosen = random.Random(I + 1)
    for H in SIZES:
        for B in (None, *chosen.sample(BATCHES, 3)):
            check_gradients(on(device, B, I, H, dtype), (B, I, H))


@poisoned
@every_dtype
@pytest.mark.parametrize("B", BATCHES)
def test_gradients_of_every_batch(device: str, B: int, dtype: torch.dtype) -> None:
    for I, H in ((64, 64), (20, 51)):
        check_gradients(on(device, B, I, H, dtype), (B, I, H))


@poisoned
@every_dtype
@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_gradients_of_every_form(device: str, layout: str, dtype: torch.dtype) -> None:
    shapes = ((None, 3, 5), (0, 3, 5), (1, 20, 3), (5, 64, 48), (65, 24, 40))
    for (B, I, H), form, use in product(shapes, FORMS, ("hc", "h", "c")):
        arguments = on(device, B, I, H, dtype, **form).map(EVERY_LAYOUT[layout])
        check_gradients(arguments, (B, I, H, form, use), use)


@pytest.mark.parametrize("shape", [(None, 3, 5), (5, 20, 17), (40, 8, 16), (70, 20, 17)], ids=str)
def test_every_subset_of_arguments(device: str, shape: tuple[int | None, int, int]) -> None:
    """Asking for fewer gradients changes none, whichever output is used."""
    arguments = on(device, *shape)
    for use in ("hc", "h", "c"):
        grads = incoming(arguments, use)
        full = gradients(cell, arguments, *grads)
        for wanted in product((True, False), repeat=7):
            chosen = Arguments(*(t.clone() for t in arguments.present()))
            for t, want in zip(chosen.present(), wanted, strict=True):
                t.requires_grad_(want)
            outputs = cell(chosen)
            assert all(output.requires_grad == any(wanted) for output in outputs)
            if any(wanted):
                used = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
                torch.autograd.backward([o for o, _ in used], [g for _, g in used])
            found = {n: t.grad for n, t in chosen._asdict().items() if t.grad is not None}
            assert list(found) == [n for n, w in zip(Arguments._fields, wanted, strict=True) if w]
            compare_gradients(found, full, arguments, (use, wanted))


@pytest.mark.parametrize("layout", ["expanded", "transposed", "every second", "offset"])
def test_incoming_gradients_of_any_layout(device: str, layout: str) -> None:
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "expanded": lambda t: torch.ones((), device=t.device).expand(t.shape),
        "transposed": lambda t: like(t.mT).mT,
        "every second": lambda t: like(torch.cat([t, t], 1))[:, ::2],
        "offset": lambda t: offset(like(t)),
    }
    for shape in PATHS[1:]:
        arguments = on(device, *shape)
        grads = [views[layout](t) for t in cell(arguments)]
        found = gradients(cell, arguments, *grads)
        compare_gradients(found, expected_gradients(arguments, grads), arguments, shape)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_finite_differences(device: str, form: dict[str, Any]) -> None:
    for B, I, H in ((None, 3, 2), (1, 1, 1), (3, 2, 3)):
        function, tensors = flat(on(device, B, I, H, torch.float64, **form))
        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)
    function, tensors = flat(on(device, 40, 5, 7, torch.float64, **form))
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_many_steps_with_shrinking_batch(device: str) -> None:
    def unroll(function: Cell, arguments: Arguments) -> tuple[Tensor, Tensor]:
        rows = []
        for B in (40, 40, 35, 9, 4, 1):
            kept = {name: getattr(arguments, name)[:B] for name in ("input", "h", "c")}
            h, c = function(arguments._replace(**kept))
            arguments = arguments._replace(h=h, c=c)
            rows.append((h, c))
        h, c = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return h, c

    for dtype in (torch.float32, torch.float64):
        arguments = on(device, 40, 20, 17, dtype)
        grads = [like(output) for output in unroll(oracle, arguments)]
        found = gradients(lambda a: unroll(cell, a), arguments, *grads)
        wide = [grad.double() for grad in grads]
        expected = gradients(lambda a: unroll(oracle, a), arguments.double(), *wide)
        compare_gradients(found, expected, arguments, dtype)


@pytest.mark.parametrize("edited", [0, 1], ids=["h", "c"])
def test_edited_output_leaves_backward_alone(device: str, edited: int) -> None:
    for shape in PATHS:
        arguments = on(device, *shape)
        grads = incoming(arguments)
        expected = gradients(cell, arguments, *grads)
        trainable = arguments.trainable()
        outputs = cell(trainable)
        outputs[edited].data.fill_(torch.nan)
        found = torch.autograd.grad(outputs, trainable.present(), grads)
        assert same_bits(found, list(expected.values())), shape


# --------------------------------------------------------------------------------------------------
# The inner operators


@poisoned
@every_dtype
def test_raw_forward(device: str, dtype: torch.dtype) -> None:
    I, H = 10, 20
    for rows, bias in product((0, 1, 5, 33, 65), product((True, False), repeat=2)):
        arguments = on(device, rows, I, H, dtype, bias=bias)
        h, c, gates = ops.lstm_cell_forward(*arguments)
        check_forward(arguments, (rows, bias), already((h, c)))
        assert gates.shape == (rows, 4 * H)
        assert gates.dtype == dtype
        want = activated_gates(arguments.double())
        assert_close(
            gates, want, output_bound("c", dtype, want, tolerance(dtype, I + H)), (rows, bias)
        )


@poisoned
@every_dtype
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("use", ["hc", "h", "c", ""])
def test_raw_backward(device: str, use: str, rows: int, dtype: torch.dtype) -> None:
    """Every mask; outputs that are not wanted are empty."""
    arguments = on(device, rows, 10, 20, dtype)
    grads = incoming(arguments, use)
    wide = arguments.double()
    gates = activated_gates(wide).to(dtype)
    expected = {n: torch.zeros_like(t) for n, t in wide._asdict().items()}
    if use:
        expected = expected_gradients(arguments, grads)
    for mask in product((True, False), repeat=7):
        found = ops.lstm_cell_backward(*grads, gates, *arguments[:5], list(mask))
        named = dict(zip(Arguments._fields, found, strict=True))
        for (name, t), wanted in zip(named.items(), mask, strict=True):
            assert wanted or t.shape == (0,), (name, mask)
        wanted_ones = {n: t for (n, t), w in zip(named.items(), mask, strict=True) if w}
        compare_gradients(wanted_ones, expected, arguments, (use, mask))


def test_raw_backward_of_strided_arguments(device: str) -> None:
    for rows in (3, 40):
        arguments = on(device, rows, 10, 20)
        grads = [g for g in incoming(arguments) if g is not None]
        gates = activated_gates(arguments.double()).float()
        given = [t.mT.contiguous().mT for t in (*grads, gates, *arguments[:5]) if t is not None]
        assert not any(t.is_contiguous() for t in given)
        found = dict(zip(Arguments._fields, ops.lstm_cell_backward(*given, ALL), strict=True))
        compare_gradients(found, expected_gradients(arguments, grads), arguments, rows)


@pytest.mark.filterwarnings("ignore")  # of torch's own checks and compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(device: str, dtype: torch.dtype) -> None:
    I, H = 5, 7
    for B in (None, 3, 40):
        arguments = on(device, B, I, H, dtype)
        for given in (arguments.trainable(), arguments):
            torch.library.opcheck(ops.lstm_cell.default, tuple(given))
    for B in (0, 3, 40):
        arguments = on(device, B, I, H, dtype)
        torch.library.opcheck(ops.lstm_cell_forward.default, tuple(arguments))
        gates = activated_gates(arguments)
        for mask in (ALL, [False] * 7, [True, False, True, False, True, False, True]):
            for use in ("hc", "c"):
                back = (*incoming(arguments, use), gates, *arguments[:5], mask)
                torch.library.opcheck(ops.lstm_cell_backward.default, back)


# --------------------------------------------------------------------------------------------------
# torch.func and the compiler


def test_vmap(device: str) -> None:
    arguments = on(device, 6 * 4, 5, 7, torch.float64)
    stacked = {n: getattr(arguments, n).unflatten(0, (6, 4)) for n in ("input", "h", "c")}
    mapped = func.vmap(lambda x, h, c: cell(arguments._replace(input=x, h=h, c=c)))
    for actual, want in zip(mapped(*stacked.values()), oracle(arguments), strict=True):
        assert actual.device == arguments.input.device
        assert_close(actual.flatten(0, 1), want, torch.tensor(1e-12), "over inputs")

    weights = torch.stack([arguments.weight_hh, -arguments.weight_hh])
    found = func.vmap(lambda w: cell(arguments._replace(weight_hh=w)))(weights)
    for k, w in enumerate(weights):
        for actual, want in zip(found, oracle(arguments._replace(weight_hh=w)), strict=True):
            assert_close(actual[k], want, torch.tensor(1e-12), "over weights")


def test_func_grad(device: str) -> None:
    arguments = on(device, 4, 5, 7, torch.float64)
    _, tensors = flat(arguments)

    def loss(function: Cell) -> Callable[..., Tensor]:
        return lambda *t: torch.cat(function(Arguments(*t))).square().sum()

    found, want = (func.grad(loss(f), tuple(range(7)))(*tensors) for f in (cell, oracle))
    for actual, expected in zip(found, want, strict=True):
        assert_close(actual, expected, 1e-12 * expected.abs().clamp(min=1), "torch.func.grad")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def skip_without_triton(backend: str) -> None:
    if backend == "inductor" and importlib.util.find_spec("triton") is None:
        pytest.skip("inductor's code for CUDA needs triton, which is not installed")


def three_steps(module: lstmfused.LSTMCell, x: Tensor) -> Tensor:
    h, c = module(x)
    for _ in range(2):
        h, c = module(x * 0.5, (h, c))
    return torch.sum(h * c)


@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(device: str, backend: str) -> None:
    skip_without_triton(backend)
    module = lstmfused.LSTMCell(20, 33, device=device)
    compiled = torch.compile(three_steps, fullgraph=True, backend=backend)
    for B in (3, 5, 64):
        x = like(torch.empty(B, 20, device=device)).requires_grad_()
        parameters = [x, *module.parameters()]
        found = torch.autograd.grad(compiled(module, x), parameters)
        expected = torch.autograd.grad(three_steps(module, x), parameters)
        for actual, want in zip(found, expected, strict=True):
            bound = 4e-6 * want.abs().max().clamp(min=1)
            assert_close(actual, want, bound, (backend, B))


@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_graphs(device: str) -> None:
    """mode="reduce-overhead": the compiler captures the operator in CUDA graphs."""
    skip_without_triton("inductor")
    module = lstmfused.LSTMCell(20, 33, device=device)
    compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(5):
            arguments = on(device, 5, 20, 33, seed=seed)
            found = [t.clone() for t in compiled(arguments.input, arguments.hx)]
            for actual, want in zip(found, module(arguments.input, arguments.hx), strict=True):
                assert_close(actual, want, torch.tensor(2e-6), seed)
