"""Batch-invariant mode: the oracle of a row is the same row in any other batch, to the bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import (
    DTYPES,
    LAYOUTS,
    Arguments,
    cell,
    check_forward,
    check_gradients,
    random_arguments,
)
from torch import Tensor

import lstmfused

BATCHES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 48, 64, 65, 97, 128, 129, 300)
SHAPES = ((1, 1), (2, 20), (16, 16), (33, 30), (51, 51), (70, 33), (130, 130), (1030, 40), (3, 400))


@pytest.fixture(autouse=True)
def mode() -> Iterator[None]:
    with lstmfused.batch_invariant():
        yield


def rows(arguments: Arguments, begin: int, size: int) -> Arguments:
    """The batch of these rows of arguments with a state."""
    here = slice(begin, begin + size)
    assert arguments.hx is not None
    h, c = arguments.hx
    return arguments._replace(input=arguments.input[here], h=h[here], c=c[here])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("I", "H"), SHAPES)
def test_a_row_is_the_same_in_every_batch(dtype: torch.dtype, I: int, H: int) -> None:
    B = max(BATCHES)
    arguments = random_arguments(B, I, H, dtype)
    check_forward(arguments, (dtype, I, H))
    whole = cell(arguments)
    for batch in BATCHES:
        begin = random.Random(batch).randint(0, B - batch)
        torch.set_num_threads(1 + batch % 2)
        part = cell(rows(arguments, begin, batch))
        for name, every, some in zip("hc", whole, part, strict=True):
            assert torch.equal(every[begin : begin + batch], some), (name, batch, begin)


def test_of_weights_larger_than_the_caches() -> None:
    arguments = random_arguments(40, 2050, 520)
    whole = cell(arguments)
    for batch in (1, 2, 3, 8, 17, 33):
        for every, some in zip(whole, cell(rows(arguments, 5, batch)), strict=True):
            assert torch.equal(every[5 : 5 + batch], some), batch


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_and_gradients_change_nothing(layout: str) -> None:
    arguments = random_arguments(97, 51, 130).map(LAYOUTS[layout])
    expected = cell(arguments.map(torch.Tensor.contiguous))
    for kind in (arguments, arguments.trainable()):
        for want, got in zip(expected, cell(kind), strict=True):
            assert torch.equal(want, got)


def test_gradients_are_right() -> None:
    check_gradients(random_arguments(9, 33, 70), "batch-invariant")


@pytest.mark.parametrize(("I", "H"), SHAPES)
def test_packed_cells_always_are(I: int, H: int) -> None:
    lstmfused.set_batch_invariant(False)
    packed = lstmfused.pack(lstmfused.LSTMCell(I, H))
    x, h, c, *_ = random_arguments(max(BATCHES), I, H)
    assert h is not None
    assert c is not None
    with torch.no_grad():
        whole = packed(x, (h, c))
        for batch in BATCHES:
            for every, some in zip(whole, packed(x[:batch], (h[:batch], c[:batch])), strict=True):
                assert torch.equal(every[:batch], some), batch


@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_compiled() -> None:
    model = lstmfused.LSTMCell(130, 40)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(33, 130)
    with torch.no_grad():
        for every, one in zip(compiled(x), compiled(x[32:]), strict=True):
            assert torch.equal(every[32:], one)


def test_mode_is_kept_and_restored() -> None:
    assert lstmfused.is_batch_invariant()
    with lstmfused.batch_invariant(False):
        assert not lstmfused.is_batch_invariant()
        lstmfused.set_batch_invariant(True)
        assert lstmfused.is_batch_invariant()
    assert lstmfused.is_batch_invariant()

    @lstmfused.batch_invariant(False)
    def fails() -> None:
        assert not lstmfused.is_batch_invariant()
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert lstmfused.is_batch_invariant()
    with pytest.raises(TypeError):
        lstmfused.set_batch_invariant("on")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_refuses_what_would_not_be_invariant() -> None:
    given = random_arguments(3, 4, 5)

    def h(input: Tensor) -> Tensor:
        return cell(given._replace(input=input))[0]

    def of_weights(weight: Tensor) -> Tensor:
        return cell(given._replace(weight_ih=weight))[0]

    stack = torch.stack([given.weight_ih] * 2)

    def both_modes() -> None:
        with forward_ad.dual_level():
            h(forward_ad.make_dual(given.input.requires_grad_(), given.input.detach()))

    per_sample = torch.func.vmap(torch.func.grad(lambda x: h(x).sum()))
    for call in (
        lambda: torch.func.vmap(of_weights)(stack),
        lambda: per_sample(torch.stack([given.input] * 2)),
        both_modes,
    ):
        with pytest.raises(NotImplementedError, match="batch-invariant"):
            call()
    given.input.requires_grad_(False)
    row = given._replace(**{n: getattr(given, n)[1:2] for n in ("input", "h", "c")})
    alone = cell(row)[0]
    assert torch.equal(torch.func.jvp(h, (given.input,), (given.input,))[0][1:2], alone)
    (_, seen) = torch.func.grad(lambda x: (h(x).sum(), h(x)), has_aux=True)(given.input)
    assert torch.equal(seen[1:2], alone)
    inputs = torch.stack([given.input, given.input + 1])
    joined = torch.func.vmap(h)(inputs)
    assert torch.equal(joined[1], h(inputs[1]))


LAYERS = [(1, 1, 3, 5), (9, 20, 33, 17), (12, 2, 130, 70), (3, 140, 16, 64), (300, 3, 64, 64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", LAYERS, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_layer_has_the_bits_of_a_stepped_cell(
    sizes: tuple[int, ...], dtype: torch.dtype, threads: int
) -> None:
    """Whatever the steps, the batch, the threads, resets and lengths; without and with grad."""
    T, B, I, H = sizes
    torch.manual_seed(0)
    layer = lstmfused.LSTM(I, H, bidirectional=True, dtype=dtype)
    x, h, c = (torch.randn(s, dtype=dtype) for s in ((T, B, I), (2, B, H), (2, B, H)))
    reset, lengths = torch.rand(T, B) < 0.2, torch.randint(0, T + 1, (B,))
    torch.set_num_threads(threads)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            output, state, cells = layer(x, (h, c), reset, lengths, return_cell_states=True)
        for direction, stepped in enumerate(map(partial(layer.cell, 0), (0, 1))):
            now = h[direction], c[direction]
            half = slice(direction * H, direction * H + H)
            for t in reversed(range(T)) if direction else range(T):
                # On the way back the boundary before t + 1 is met before step t.
                at = t + 1 if direction else t
                starts = reset[at] & (at < lengths) if at < T else torch.zeros(B).bool()
                before = [s.masked_fill(starts.unsqueeze(1), 0) for s in now]
                with torch.no_grad():
                    after = stepped(x[t], (before[0], before[1]))
                lives = (t < lengths).unsqueeze(1)
                now = torch.where(lives, after[0], now[0]), torch.where(lives, after[1], now[1])
                assert torch.equal(output[t, :, half], now[0] * lives)
                assert torch.equal(cells[t, :, half], now[1] * lives)
            assert all(map(torch.equal, (s[direction] for s in state), now))
