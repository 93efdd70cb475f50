"""The outputs of the cell on CUDA tensors."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    HALF,
    Arguments,
    assert_close,
    cell,
    check_autocast_gradients,
    gradients,
    oracle,
    torch_cell,
)
from cuda_cases import (
    BATCHES,
    EVERY_LAYOUT,
    FORMS,
    PATHS,
    SIZES,
    already,
    check_forward,
    check_gradient,
    check_gradients,
    compare_gradients,
    depth_of,
    every_dtype,
    expected_gradients,
    in_dtype,
    incoming,
    like,
    missing,
    on,
    output_bound,
    poisoned,
    same_bits,
    tolerance,
)
from torch import Tensor, nn

import lstmfused
from lstmfused._ops import _C

# What torch has to say of a device is shown, but no error of ours.
pytestmark = pytest.mark.filterwarnings("default")

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

# --------------------------------------------------------------------------------------------------
# Outputs


@pytest.fixture
def path(device: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """Sends every problem along one path, where it can go there."""
    _C.set_cuda_path(request.param)
    yield request.param
    _C.set_cuda_path("")


every_path = pytest.mark.parametrize(
    "path", ["small_batch", "tensor_cores", "warpgroups", "products"], indirect=True
)


@poisoned
@every_dtype
@every_path
def test_every_path(device: str, path: str, dtype: torch.dtype) -> None:
    """Also where another is the faster one."""
    for I, H in ((1, 1), (3, 5), (24, 40), (64, 64), (51, 20), (264, 136), (51, 64), (640, 72)):
        for B in (1, 2, 3, 5, 8, 9, 15, 16, 17, 31, 33, 64, 65, 129):
            check_forward(on(device, B, I, H, dtype), (B, I, H))
        for B in (1, 9, 33, 129):
            check_gradients(on(device, B, I, H, dtype), (B, I, H))


def check_wide_cell(arguments: Arguments, state: tuple[Tensor, Tensor], case: object) -> None:
    """c in float32 beside half types is not rounded at all, h once."""
    dtype = arguments.input.dtype
    assert [t.dtype for t in state] == [dtype, torch.float32]
    error = tolerance(dtype, depth_of(arguments))
    for name, actual, want in zip("hc", state, oracle(arguments.double()), strict=True):
        assert_close(actual, want, output_bound(name, actual.dtype, want, error), (name, case))


@poisoned
@pytest.mark.parametrize("dtype", HALF, ids=str)
@every_path
def test_a_cell_state_in_float32(device: str, path: str, dtype: torch.dtype) -> None:
    for I, H in ((3, 5), (24, 40), (51, 64), (264, 136)):
        for B, use in product((1, 9, 33, 129), ("hc", "h", "c")):
            arguments = on(device, B, I, H, dtype)
            arguments = arguments._replace(c=on(device, B, I, H).c)
            h, c = cell(arguments)
            check_wide_cell(arguments, (h, c), (B, I, H))
            grads = [
                like(t, seed) if name in use else None
                for seed, (name, t) in enumerate((("h", h), ("c", c)))
            ]
            found = gradients(cell, arguments, *grads)
            assert found["c"].dtype == torch.float32
            expected = expected_gradients(arguments, grads)
            depth = max(I + H, 4 * H, B)
            for name, gradient in found.items():  # of gates that were rounded, so all to that
                case = name, use, B, I, H
                check_gradient(name, gradient.to(dtype), expected[name], case, depth, B, False)


@poisoned
@every_dtype
@pytest.mark.parametrize("I", SIZES)
def test_sizes_and_batches(device: str, I: int, dtype: torch.dtype) -> None:
    chosen = random.Random(I)
    for H in SIZES:
        for B in (None, *chosen.sample(BATCHES, 5)):
            check_forward(on(device, B, I, H, dtype), (B, I, H))


@poisoned
@every_dtype
@pytest.mark.parametrize("B", BATCHES)
def test_every_batch(device: str, B: int, dtype: torch.dtype) -> None:
    for I, H in ((64, 64), (20, 51), (2, 130)):
        check_forward(on(device, B, I, H, dtype), (B, I, H))


@poisoned
@every_dtype
def test_edges_of_tiles(device: str, dtype: torch.dtype) -> None:
    """One more and one less than whole blocks of rows, of units and of stretches of a sum."""
    edges = (15, 16, 17, 31, 33, 63, 65, 127, 129)
    for n in edges:
        for B, I, H in ((n, 24, 40), (33, n, 40), (33, 24, n), (5, n, n), (n, 8, n)):
            check_forward(on(device, B, I, H, dtype), (B, I, H))
    for size in (8, 16, 24, 40, 56, 72, 136, 248, 256, 264, 520):  # whole vectors
        for B, I, H in ((9, size, 48), (129, 16, size), (40, size, size), (3, size, size)):
            check_forward(on(device, B, I, H, dtype), (B, I, H))


@poisoned
@every_dtype
@pytest.mark.parametrize(
    "shape", [(1000, 72, 552), (1025, 200, 544), (129, 136, 728), (300, 264, 728)], ids=str
)
def test_edges_of_many_tiles(device: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Enough blocks for every multiprocessor, of which the last are not full."""
    arguments = on(device, *shape, dtype)
    check_forward(arguments, shape)
    check_gradients(arguments, shape)


@functools.lru_cache(maxsize=1)
def large_arguments(device: str, I: int, H: int) -> Arguments:
    return on(device, 1024, I, H, torch.float64)


@poisoned
@pytest.mark.parametrize(
    ("I", "H"),
    [(512, 512), (1024, 1024), (2048, 2048), (768, 1024), (2560, 512), (1030, 70), (33, 1030)],
)
def test_large(device: str, I: int, H: int) -> None:
    for B, dtype in product((1, 4, 32, 128, 1024), DTYPES):
        whole = large_arguments(device, I, H)
        rows = {name: getattr(whole, name)[:B] for name in ("input", "h", "c")}
        arguments = in_dtype(whole._replace(**rows), dtype)
        check_forward(arguments, (B, I, H, dtype))
        check_gradients(arguments, (B, I, H, dtype))
    large_arguments.cache_clear()


@every_dtype
def test_many_rows(device: str, dtype: torch.dtype) -> None:
    """More blocks of rows than a grid has room for in its second dimension."""
    for B, I, H in ((10_001, 20, 20), (600_011, 2, 3)):
        check_forward(on(device, B, I, H, dtype), (B, I, H))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_than_an_int_counts(device: str, dtype: torch.dtype) -> None:
    """Gates beyond the 2^31st element."""
    if torch.cuda.mem_get_info()[1] < 60 << 30:
        pytest.skip("the device has less than 60 GiB of memory")
    B, I, H = 1_050_000, 8, 512
    one = on(device, 1, I, H, dtype)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(B, I, device=device, generator=generator).to(dtype)
    arguments = one._replace(input=x, h=one.h.expand(B, H), c=one.c.expand(B, H))  # type: ignore[union-attr]
    trainable = arguments._replace(input=x.clone().requires_grad_())
    outputs = cell(trainable)
    grads = [like(t).expand(B, H) for t in one[1:3] if t is not None]
    (grad,) = torch.autograd.grad(outputs, [trainable.input], grads)
    for rows in (slice(0, 40), slice(B - 40, B)):
        part = arguments._replace(**{n: getattr(arguments, n)[rows] for n in ("input", "h", "c")})
        check_forward(part, rows, already([t[rows] for t in outputs]))
        expected = expected_gradients(part, [g[rows] for g in grads])
        compare_gradients({"input": grad[rows]}, expected, part, rows)


@poisoned
@every_dtype
@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_every_form(device: str, layout: str, dtype: torch.dtype) -> None:
    small = ((None, 3, 5), (0, 3, 5), (1, 20, 3), (5, 64, 48))
    shapes = (*small, (9, 16, 32), (65, 24, 40), (70, 3, 51))
    for (B, I, H), form in product(shapes, FORMS):
        arguments = on(device, B, I, H, dtype, **form).map(EVERY_LAYOUT[layout])
        check_forward(arguments, (B, I, H, form))


@poisoned
@every_dtype
@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_one_argument_in_another_layout(device: str, layout: str, dtype: torch.dtype) -> None:
    for (B, I, H), name in product(((5, 64, 48), (64, 128, 56)), Arguments._fields):
        arguments = on(device, B, I, H, dtype)
        changed = {name: EVERY_LAYOUT[layout](getattr(arguments, name))}
        check_forward(arguments._replace(**changed), (B, I, H, name))
        check_gradients(arguments._replace(**changed), (B, I, H, name))


def test_negative_bit(device: str) -> None:
    arguments = on(device, 5, 20, 33).map(lambda t: torch.complex(t, -t).conj().imag)
    assert arguments.input.is_neg()
    check_forward(arguments, "every argument a lazy negation")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_module_equals_torch(device: str, dtype: torch.dtype) -> None:
    shapes = ((None, 3, 5), (1, 20, 20), (7, 51, 20), (65, 64, 130))
    for (B, I, H), bias in product(shapes, (True, False)):
        stock = nn.LSTMCell(I, H, bias=bias, dtype=dtype, device=device)
        module = lstmfused.LSTMCell(I, H, bias=bias, dtype=dtype, device=device)
        module.load_state_dict(stock.state_dict())
        arguments = on(device, B, I, H, dtype)
        x = arguments.input * min(1, (H / I) ** 0.5)
        for hx in (None, arguments.hx):
            for actual, want in zip(module(x, hx), stock(x, hx), strict=True):
                bound = 2 * output_bound("h", dtype, want, tolerance(dtype, I + H))
                assert_close(actual, want, bound, (B, I, H, hx is None))


@poisoned
@every_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_special_values(device: str, value: float, dtype: torch.dtype) -> None:
    for (B, I, H), name in product(PATHS, Arguments._fields):
        arguments = on(device, B, I, H, dtype)
        planted = getattr(arguments, name).clone()
        planted.flatten()[planted.numel() // 2] = value
        arguments = arguments._replace(**{name: planted})
        expected = torch_cell(arguments.double())
        error = tolerance(dtype, I + H)
        for output, actual, want in zip("hc", cell(arguments), expected, strict=True):
            bound = output_bound(output, dtype, want, error)
            assert_close(actual, want, bound, (output, B, I, H, name))


@every_dtype
@pytest.mark.parametrize("gate", range(4), ids=["i", "f", "g", "o"])
def test_activations_over_their_whole_range(device: str, gate: int, dtype: torch.dtype) -> None:
    """One unit, whose one gate is the input itself; in one call and in many of few rows."""
    steps = torch.cat([torch.linspace(-120, 120, 24_001), torch.linspace(-1, 1, 20_001)])
    weight_ih = torch.zeros(4, 1)
    weight_ih[gate] = 1
    x, c, bias = steps.unsqueeze(1), torch.full((len(steps), 1), 1.5), torch.full((4,), 0.25)
    zeros = torch.zeros(len(steps), 1), torch.zeros(4, 1)
    arguments = Arguments(x, zeros[0], c, weight_ih, zeros[1], bias, None)
    arguments = arguments.map(lambda t: t.to(device, dtype))
    check_forward(arguments, gate)
    every = slice(None, None, 6000)
    few = {name: getattr(arguments, name)[every] for name in ("input", "h", "c")}
    check_forward(arguments._replace(**few), (gate, "few rows"))


@every_dtype
def test_cell_state_over_a_wide_range(device: str, dtype: torch.dtype) -> None:
    largest = min(1e30, torch.finfo(dtype).max / 4)
    powers = torch.logspace(-12, math.log10(largest), 2000, dtype=torch.float64)
    c = torch.cat([powers, -powers]).unsqueeze(1).to(device, dtype)
    check_forward(on(device, len(c), 3, 1, dtype)._replace(c=c), "c from 1e-12 to the largest")


# --------------------------------------------------------------------------------------------------
# Rows


@poisoned
@every_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_do_not_see_each_other(device: str, value: float, dtype: torch.dtype) -> None:
    """Whatever stands in the other rows, a row keeps its bits, forward and backward."""
    rows = ("input", "h", "c")
    for B, I, H in ((2, 3, 5), *PATHS[1:]):
        arguments = on(device, B, I, H, dtype)
        grads = incoming(arguments)
        expected, back = cell(arguments), gradients(cell, arguments, *grads)
        for row in {0, B // 2, B - 1}:
            others = (torch.arange(B, device=device) != row).unsqueeze(1)
            broken = {n: getattr(arguments, n).masked_fill(others, value) for n in rows}
            changed = arguments._replace(**broken)
            for actual, want in zip(cell(changed), expected, strict=True):
                assert torch.equal(actual[row], want[row]), (B, I, H, row)
            found = gradients(cell, changed, *grads)
            for name in rows:
                assert torch.equal(found[name][row], back[name][row]), (B, I, H, row, name)


@every_dtype
def test_a_row_alone_is_the_row_in_the_batch(device: str, dtype: torch.dtype) -> None:
    for B, I, H in ((7, 20, 33), (33, 64, 64), (300, 136, 72)):
        arguments = on(device, B, I, H, dtype)
        error = tolerance(dtype, I + H)
        together = cell(arguments)
        for row in (0, B // 2, B - 1):
            for alone in (slice(row, row + 1), row):
                part = {n: getattr(arguments, n)[alone] for n in ("input", "h", "c")}
                for name, actual, batch in zip(
                    "hc", cell(arguments._replace(**part)), together, strict=True
                ):
                    want = batch[alone].double()
                    bound = 2 * output_bound(name, dtype, want, error)
                    assert_close(actual, want, bound, (name, B, I, H, row))


# --------------------------------------------------------------------------------------------------
# Precision


@pytest.fixture
def tf32() -> Iterator[Callable[[bool], None]]:
    """Switches tf32 on and off, and leaves it as it was."""
    before = torch.backends.cuda.matmul.allow_tf32

    def switch(allowed: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32 = allowed

    yield switch
    switch(before)


SHAPES_OF_TF32 = ((5, 64, 48), (33, 40, 24), (64, 64, 64), (97, 51, 20), (300, 264, 132))


@poisoned
@every_path
@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_on_every_path(
    device: str, tf32: Callable[[bool], None], path: str, allowed: bool
) -> None:
    tf32(allowed)
    for shape in SHAPES_OF_TF32:
        check_forward(on(device, *shape), shape, tf32=allowed)


@poisoned
@pytest.mark.parametrize("allowed", [False, True])
def test_tf32(device: str, tf32: Callable[[bool], None], allowed: bool) -> None:
    """What torch allows its own products we take, and nothing it does not."""
    tf32(allowed)
    for shape in (*SHAPES_OF_TF32, (1000, 72, 552)):
        arguments = on(device, *shape)
        check_forward(arguments, shape, tf32=allowed)
        check_gradients(arguments, shape, tf32=allowed)
        for layout in ("offset", "sliced"):
            check_forward(arguments.map(EVERY_LAYOUT[layout]), (layout, shape), tf32=allowed)
        check_forward(arguments.double(), shape)
    assert torch.backends.cuda.matmul.allow_tf32 == allowed


def test_tf32_by_its_newer_name(device: str) -> None:
    """Of the two names of this setting torch refuses to read one after the other was set."""
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        for shape in SHAPES_OF_TF32:
            arguments = on(device, *shape)
            check_forward(arguments, shape, tf32=True)
            check_gradients(arguments, shape, tf32=True)
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast(device: str, dtype: torch.dtype) -> None:
    """float32 arguments are rounded to the half type, and h has it; c stays as it is."""
    for B, form in product((None, 3, 40), FORMS):
        arguments = on(device, B, 20, 33, **form)
        with torch.autocast(device, dtype):
            state = cell(arguments.trainable())
        check_wide_cell(in_dtype(arguments, dtype)._replace(c=arguments.c), state, (B, form))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("B", [3, 40])
def test_gradients_of_autocast(device: str, B: int, dtype: torch.dtype) -> None:
    """Errors add up over the rows."""
    check_autocast_gradients(on(device, B, 20, 33), device, dtype, least=math.sqrt(B))


def test_autocast_switched_off_inside(device: str) -> None:
    for dtype in (torch.float64, torch.float32):
        arguments = on(device, 3, 5, 7, dtype)
        with torch.autocast(device, torch.bfloat16), torch.autocast(device, enabled=False):
            inside = cell(arguments)
        assert inside[0].dtype == dtype
        assert same_bits(inside, cell(arguments))
