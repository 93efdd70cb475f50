"""Outputs against the float64 reference and against nn.LSTMCell."""

from itertools import product

import pytest
import torch
from cases import (
    DTYPES,
    ERROR,
    LAYOUTS,
    Arguments,
    assert_close,
    cell,
    check_forward,
    check_output,
    oracle,
    random_arguments,
    torch_cell,
)

import lstmfused

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SIZES = (1, 2, 3, 20, 51, 130, 288)
BATCHES = (0, 1, 2, 5, 7, 64, 97)
SMALL_SIZES = (1, 2, 3, 20, 51)
SMALL_BATCHES = (None, 0, 1, 2, 5, 7)
ROWS = ("input", "h", "c")
BIASES = tuple(product((True, False), repeat=2))


@pytest.mark.parametrize("I", SIZES)
def test_reference_is_torch(I: int) -> None:
    for B, H in product((None, *BATCHES), SIZES):
        arguments = random_arguments(B, I, H, torch.float64)
        for actual, expected in zip(oracle(arguments), torch_cell(arguments), strict=True):
            assert_close(actual, expected, 1e-14 * expected.abs().clamp(min=1), (B, I, H))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("I", SIZES)
def test_every_size_and_batch(I: int, dtype: torch.dtype) -> None:
    for B, H in product((None, *BATCHES), SIZES):
        check_forward(random_arguments(B, I, H, dtype), (B, I, H))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_form(layout: str, dtype: torch.dtype) -> None:
    sizes = product(SMALL_BATCHES, SMALL_SIZES, SMALL_SIZES)
    for (B, I, H), bias, state in product(sizes, BIASES, (True, False)):
        arguments = random_arguments(B, I, H, dtype, bias=bias, state=state)
        check_forward(arguments.map(LAYOUTS[layout]), (B, I, H, bias, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_argument_in_another_layout(layout: str, dtype: torch.dtype) -> None:
    for (B, I, H), name in product(((1, 51, 20), (7, 20, 33), (64, 130, 51)), Arguments._fields):
        arguments = random_arguments(B, I, H, dtype)
        changed = {name: LAYOUTS[layout](getattr(arguments, name))}
        check_forward(arguments._replace(**changed), (B, I, H, name))


def test_negative_bit() -> None:
    arguments = random_arguments(5, 20, 33)
    negated = arguments.map(lambda t: torch.complex(t, -t).conj().imag)
    assert negated.input.is_neg()
    check_forward(negated, "every argument a lazy negation")


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("I", "H", "batches"),
    [
        (512, 512, (1, 3, 33, 200, 400)),
        (1030, 70, (1, 2, 6, 40, 150)),
        (2600, 33, (1, 4, 9, 65)),
        (33, 1030, (1, 5, 70)),
        (1024, 1024, (2, 9, 10, 18)),  # weights that fit no cache
        (4100, 530, (4, 7, 17)),  # and rows of input that fit no first-level cache
    ],
)
def test_large(I: int, H: int, batches: tuple[int, ...], dtype: torch.dtype) -> None:
    for B in batches:
        check_forward(random_arguments(B, I, H, dtype), (B, I, H))


def test_many_rows() -> None:
    for I, H in ((2, 20), (20, 20), (1, 1)):
        check_forward(random_arguments(10_001, I, H), (I, H))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_module_equals_torch(bias: bool, dtype: torch.dtype) -> None:
    for B, I, H in product((None, *BATCHES), SIZES[:-1], SIZES[:-1]):
        torch.manual_seed(I + H)
        stock = torch.nn.LSTMCell(I, H, bias=bias, dtype=dtype)
        module = lstmfused.LSTMCell(I, H, bias=bias, dtype=dtype)
        module.load_state_dict(stock.state_dict())
        arguments = random_arguments(B, I, H, dtype)
        # torch draws weights up to 1 / sqrt(H): keep sums of many inputs in the usual range.
        x = arguments.input * min(1, (H / I) ** 0.5)
        for hx in (None, arguments.hx):
            for actual, expected in zip(module(x, hx), stock(x, hx), strict=True):
                # Two results, each within its bound of the exact one.
                bound = 2 * ERROR[dtype] * expected.detach().abs().clamp(min=1)
                assert_close(actual, expected, bound, (B, I, H, hx is None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", Arguments._fields)
def test_special_values(name: str, dtype: torch.dtype) -> None:
    huge = torch.finfo(dtype).max / 16
    values = (float("nan"), float("inf"), -float("inf"), huge, -huge)
    for (B, I, H), value in product(((1, 3, 5), (5, 20, 33), (18, 33, 20), (64, 16, 16)), values):
        arguments = random_arguments(B, I, H, dtype)
        planted = getattr(arguments, name)
        for place in (0, planted.numel() // 2, planted.numel() - 1):
            here = planted.clone()
            here.flatten()[place] = value
            changed = arguments._replace(**{name: here})
            case = (B, I, H, value, place)
            expected = torch_cell(changed.double())
            for output, actual, want in zip("hc", cell(changed), expected, strict=True):
                check_output(output, actual, want, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", range(4), ids=["i", "f", "g", "o"])
def test_activations_over_their_whole_range(gate: int, dtype: torch.dtype) -> None:
    """One unit, whose one gate is the input itself."""
    steps = torch.cat([torch.linspace(-120, 120, 24_001), torch.linspace(-1, 1, 20_001)])
    weight_ih = torch.zeros(4, 1, dtype=dtype)
    weight_ih[gate] = 1
    arguments = Arguments(
        steps.to(dtype).unsqueeze(1),
        torch.zeros(len(steps), 1, dtype=dtype),
        torch.full((len(steps), 1), 1.5, dtype=dtype),
        weight_ih,
        torch.zeros(4, 1, dtype=dtype),
        torch.full((4,), 0.25, dtype=dtype),
        None,
    )
    check_forward(arguments, gate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cell_state_over_a_wide_range(dtype: torch.dtype) -> None:
    largest = min(1e30, torch.finfo(dtype).max / 4)
    powers = torch.logspace(-12, torch.tensor(largest).log10().item(), 2000, dtype=torch.float64)
    c = torch.cat([powers, -powers]).to(dtype).unsqueeze(1)
    arguments = random_arguments(len(c), 3, 1, dtype)._replace(c=c)
    check_forward(arguments, "c from 1e-12 to the largest")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_see_each_other(dtype: torch.dtype) -> None:
    for B, I, H in ((2, 3, 5), (7, 51, 20), (64, 20, 33), (97, 130, 51)):
        arguments = random_arguments(B, I, H, dtype)
        expected = cell(arguments)
        for row in (0, B // 2, B - 1):
            others = (torch.arange(B) != row).unsqueeze(1)
            broken = {n: getattr(arguments, n).masked_fill(others, torch.nan) for n in ROWS}
            for actual, want in zip(cell(arguments._replace(**broken)), expected, strict=True):
                assert torch.equal(actual[row], want[row]), (B, I, H, row)
