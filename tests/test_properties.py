"""Random calls, right and wrong, against nn.LSTMCell."""

import os
from typing import Any

import pytest
import torch
from cases import (
    ERROR,
    LAYOUTS,
    Arguments,
    assert_close,
    cell,
    check_forward,
    check_gradients,
    random_arguments,
    torch_cell,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lstmfused

settings.register_profile(
    "lstmfused",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lstmfused")

sizes = st.integers(1, 70)
batches = st.one_of(st.none(), st.integers(0, 70))
dtypes = st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16))
wide = st.sampled_from((torch.float32, torch.float64))


@st.composite
def valid_arguments(draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = dtypes) -> Arguments:
    arguments = random_arguments(
        draw(batches),
        draw(sizes),
        draw(sizes),
        draw(dtypes),
        state=draw(st.booleans()),
        bias=(draw(st.booleans()), draw(st.booleans())),
        seed=draw(st.integers(0, 1000)),
    )
    # Where a row's numbers are equal in weights and state, so are the terms of a sum, and their
    # roundings add up, as those of random terms, which the bounds are for, do not.
    layouts = st.sampled_from(tuple(LAYOUTS))
    of_weights = st.sampled_from([name for name in LAYOUTS if name != "expanded_columns"])
    names = [draw(of_weights if i in (3, 4) else layouts) for i in range(len(arguments))]
    return Arguments(
        *(t if t is None else LAYOUTS[name](t) for t, name in zip(arguments, names, strict=True))  # type: ignore[arg-type]
    )


@given(valid_arguments())
@settings(max_examples=200)
def test_outputs(arguments: Arguments) -> None:
    check_forward(arguments, "drawn")


# Not in half types: where a drawn sum over rows happens to cancel, the roundings of its saved gates
# are left, and no bound relative to the sum holds. test_gradients.py has sums that do not cancel.
@given(valid_arguments(wide), st.sampled_from(("hc", "h", "c")))
@settings(max_examples=150)
def test_gradients(arguments: Arguments, use: str) -> None:
    check_gradients(arguments, use, use)


@given(valid_arguments(wide))
@settings(max_examples=100)
def test_outputs_equal_torch(arguments: Arguments) -> None:
    for actual, expected in zip(cell(arguments), torch_cell(arguments), strict=True):
        bound = 2 * ERROR[expected.dtype] * expected.abs().clamp(min=1)
        assert_close(actual, expected, bound, "drawn")


@given(st.data())
@settings(max_examples=300)
def test_calls_of_any_shape(data: st.DataObject) -> None:
    """Whatever nn.LSTMCell takes we take with the same result, and what it refuses we refuse."""
    small = st.integers(0, 3)
    I, H = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    shapes = st.lists(small, max_size=3)
    kinds = st.sampled_from((torch.float32, torch.float32, torch.float32, torch.int64))

    def tensor(usual: int) -> Tensor:
        rows = st.lists(small, max_size=1).map(lambda rows: [*rows, usual])
        shape = data.draw(st.one_of(rows, rows, shapes))
        return torch.rand(shape).to(data.draw(kinds))

    stock, fused = nn.LSTMCell(I, H), lstmfused.LSTMCell(I, H)
    fused.load_state_dict(stock.state_dict())
    x = tensor(I)
    hx = data.draw(st.sampled_from((None, "pair", "pair", "pair")))
    state = None if hx is None else (tensor(H), tensor(H))
    compare(stock, fused, x, state)


def compare(stock: nn.LSTMCell, fused: nn.LSTMCell, x: Tensor, hx: Any) -> None:
    tensors = (x, *(hx or ()))
    one_rank = len({t.dim() for t in tensors}) == 1
    if not one_rank and all(t.dim() in (1, 2) for t in tensors):
        # Of these torch refuses most, broadcasts some in silence, and crashes on others.
        with pytest.raises(RuntimeError):
            fused(x, hx)
        return
    try:
        expected = stock(x, hx)
    except (RuntimeError, ValueError) as error:
        with pytest.raises(type(error)):
            fused(x, hx)
        return
    for actual, want in zip(fused(x, hx), expected, strict=True):
        assert actual.dtype == want.dtype
        assert_close(actual, want, torch.tensor(2e-6), (x.shape, hx))
