"""Bad arguments: torch's own errors where torch has them, one clear error everywhere else."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import Arguments, cell, random_arguments
from torch import Tensor, nn, zeros

import lstmfused

I, H = 10, 20
NAMES = {
    torch.float32: r"(float32|Float\b)",
    torch.float64: r"(float64|Double)",
    torch.bfloat16: r"BFloat16|bfloat16",
    torch.float16: r"\b(float16|Half)",
}

# Same type and same text as torch.
SAME_TEXT: dict[str, tuple[Any, ...]] = {
    "input size": (zeros(3, 11),),
    "input size, unbatched": (zeros(11),),
    "input size, empty batch": (zeros(0, 11),),
    "h size": (zeros(3, I), (zeros(3, 21), zeros(3, H))),
    "c size": (zeros(3, I), (zeros(3, H), zeros(3, 21))),
    "h size, unbatched": (zeros(I), (zeros(21), zeros(H))),
    "c size, unbatched": (zeros(I), (zeros(H), zeros(21))),
    "batch of both": (zeros(3, I), (zeros(5, H), zeros(5, H))),
    "batch of h": (zeros(3, I), (zeros(5, H), zeros(3, H))),
    "batch of c": (zeros(3, I), (zeros(3, H), zeros(5, H))),
    "state of one row": (zeros(3, I), (zeros(1, H), zeros(1, H))),
    "state of no rows": (zeros(3, I), (zeros(0, H), zeros(0, H))),
    "input 0D": (zeros(()),),
    "input 3D": (zeros(3, 3, I),),
    "h 3D": (zeros(3, I), (zeros(3, 3, H), zeros(3, H))),
    "c 3D": (zeros(3, I), (zeros(3, H), zeros(3, 3, H))),
    "h 0D": (zeros(I), (zeros(()), zeros(H))),
    "wrong in several ways": (zeros(3, 11), (zeros(5, 21), zeros(5, 21))),
}
# Same type as torch; its text speaks of its own insides.
SAME_TYPE: dict[str, tuple[Any, ...]] = {
    "unbatched input, batched state": (zeros(I), (zeros(1, H), zeros(1, H))),
    "batched input, unbatched state": (zeros(3, I), (zeros(H), zeros(H))),
    "batch of one, unbatched state": (zeros(1, I), (zeros(H), zeros(H))),
    "unbatched c alone": (zeros(3, I), (zeros(3, H), zeros(H))),
    "h alone": (zeros(3, I), zeros(3, H)),
    "h alone, of two rows": (zeros(2, I), zeros(2, H)),
    "state stacked": (zeros(2, I), zeros(2, 2, H)),
    "one state": (zeros(3, I), (zeros(3, H),)),
    "three states": (zeros(3, I), (zeros(3, H), zeros(3, H), zeros(3, H))),
    "no state at all": (zeros(3, I), ()),
    "float64 input": (zeros(3, I).double(),),
    "float64 h": (zeros(3, I), (zeros(3, H).double(), zeros(3, H))),
    "integers": (zeros(3, I).long(),),
    "booleans": (zeros(3, I).bool(),),
    "complex numbers": (zeros(3, I).to(torch.complex64),),
    "meta input": (zeros(3, I, device="meta"),),
}


def error_of(function: Callable[..., object], *arguments: Any) -> Exception:
    with pytest.raises(Exception) as caught:
        function(*arguments)
    return caught.value


@pytest.mark.parametrize("bad", SAME_TEXT)
def test_same_text_as_torch(bad: str) -> None:
    expected = error_of(nn.LSTMCell(I, H), *SAME_TEXT[bad])
    actual = error_of(lstmfused.LSTMCell(I, H), *SAME_TEXT[bad])
    assert type(actual) is type(expected)
    assert str(actual).splitlines()[0] == str(expected)


@pytest.mark.parametrize("bad", SAME_TYPE)
def test_same_type_as_torch(bad: str) -> None:
    expected = error_of(nn.LSTMCell(I, H), *SAME_TYPE[bad])
    actual = error_of(lstmfused.LSTMCell(I, H), *SAME_TYPE[bad])
    assert isinstance(actual, type(expected))
    assert str(actual)


@pytest.mark.parametrize("bad", [None, [1.0] * I, np.zeros((3, I), np.float32), "text", 1.0])
def test_input_that_is_no_tensor(bad: object) -> None:
    assert isinstance(error_of(lstmfused.LSTMCell(I, H), bad), (TypeError, AttributeError))
    weights = zeros(4 * H, I), zeros(4 * H, H)
    error = error_of(lstmfused.functional.lstm_cell, bad, None, *weights)
    assert isinstance(error, (TypeError, AttributeError, RuntimeError))


def test_first_argument_that_is_no_tensor_is_named() -> None:
    x, h, c, *weights = random_arguments(2, I, H)
    calls: list[tuple[str, Any]] = [
        (r"'input' must be Tensor, not list", ([1.0], (h, c), *weights)),
        (r"'hx\[0\]' must be Tensor, not int", (x, (1, 2), *weights)),
        (r"'hx\[1\]' must be Tensor, not str", (x, (h, "c"), *weights)),
        (r"'weight_hh' must be Tensor, not NoneType", (x, (h, c), weights[0], None, 1, 2)),
        (r"'bias_hh' must be Tensor, not float", (x, (h, c), *weights[:3], 1.0)),
    ]
    for message, arguments in calls:
        with pytest.raises(TypeError, match=message):
            lstmfused.functional.lstm_cell(*arguments)


def test_bare_state_says_what_is_wanted() -> None:
    arguments = random_arguments(2, I, H)
    with pytest.raises(TypeError, match=r"\(h, c\)"):
        lstmfused.functional.lstm_cell(arguments.input, arguments.h, *arguments[3:])  # type: ignore[arg-type]


WRONG_SHAPES = [
    ("weight_ih", (4 * H + 1, I), (4 * H, I)),
    ("weight_ih", (2 * H, I), (4 * H, I)),
    ("weight_ih", (4 * H,), (4 * H, I)),
    ("weight_ih", (1, 4 * H, I), (4 * H, I)),
    ("weight_hh", (4 * H - 1, H), (4 * H, H)),
    ("weight_hh", (H, 4 * H), (4 * H, H)),
    ("weight_hh", (4 * H,), (4 * H, H)),
    ("bias_ih", (4 * H - 1,), (4 * H,)),
    ("bias_ih", (1,), (4 * H,)),
    ("bias_ih", (1, 4 * H), (4 * H,)),
    ("bias_hh", (4 * H + 1,), (4 * H,)),
    ("bias_hh", (), (4 * H,)),
]


@pytest.mark.parametrize(("name", "got", "wanted"), WRONG_SHAPES)
def test_wrong_parameter_shapes(name: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    for B in (None, 0, 3):
        bad = random_arguments(B, I, H)._replace(**{name: zeros(got)})
        error = error_of(cell, bad)
        assert isinstance(error, RuntimeError)
        if name != "weight_hh":  # H is read off weight_hh, so that its error may name h instead
            assert name in str(error)
            for shape in (got, wanted):
                assert ", ".join(map(str, shape)) in str(error)


@pytest.mark.parametrize("name", [n for n in Arguments._fields if n != "c"])  # torch promotes it
@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_mixed_dtypes_are_both_named(other: torch.dtype, name: str) -> None:
    for B in (None, 3):
        arguments = random_arguments(B, I, H)
        error = error_of(cell, arguments._replace(**{name: getattr(arguments, name).to(other)}))
        assert isinstance(error, RuntimeError)
        for dtype in (torch.float32, other):
            assert re.search(NAMES[dtype], str(error)), str(error)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool], ids=str)
def test_dtypes_that_no_cell_has(dtype: torch.dtype) -> None:
    arguments = random_arguments(3, I, H).map(lambda t: t.to(dtype))
    assert isinstance(error_of(cell, arguments), (RuntimeError, NotImplementedError))


@pytest.mark.parametrize("name", ["input", "h", "c", "weight_ih", "weight_hh"])
def test_sparse_tensors(name: str) -> None:
    arguments = random_arguments(3, I, H)
    sparse: Tensor = getattr(arguments, name).to_sparse()
    assert isinstance(error_of(cell, arguments._replace(**{name: sparse})), RuntimeError)


@pytest.mark.parametrize("name", Arguments._fields)
def test_mixed_devices(name: str) -> None:
    arguments = random_arguments(3, I, H)
    error = error_of(cell, arguments._replace(**{name: getattr(arguments, name).to("meta")}))
    assert isinstance(error, (RuntimeError, NotImplementedError))


@pytest.mark.parametrize("sizes", [(3, -1), (-1, 3), (3, 1.5), ("3", 3)], ids=str)
def test_constructor(sizes: tuple[Any, Any]) -> None:
    expected = error_of(nn.LSTMCell, *sizes)
    actual = error_of(lstmfused.LSTMCell, *sizes)
    assert type(actual) is type(expected)
    assert str(actual) == str(expected)
