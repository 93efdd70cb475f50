"""Resets, lengths and skipped steps, against a loop over the reference cell in float64.

A row of the batch is the loop's whole world: it steps through the row's own steps, from zeros where
the row is reset, in each layer and direction.
"""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import check_gradient, check_output
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor, nn

import lstmfused
from lstmfused import reference
from lstmfused.functional import lstm

T, B, I, H = 6, 4, 3, 5
LAYER = torch.ops.lstmfused.lstm_layer


def loop(
    module: nn.LSTM,
    x: Tensor,
    hx: tuple[Tensor, Tensor],
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> list[Tensor]:
    """`output`, `h_n`, `c_n` and `cell_states`, row by row and step by step, time first."""
    weights, directions = module.all_weights, 1 + module.bidirectional
    T, B = x.shape[:2]
    rows = []
    for b in range(B):
        length = T if lengths is None else int(lengths[b])
        above, last = list(x[:length, b]), []
        for layer in range(module.num_layers):
            steps, states = [], []
            for direction in range(directions):
                k = layer * directions + direction
                h, c = hx[0][k, b], hx[1][k, b]
                found: dict[int, tuple[Tensor, Tensor]] = {}
                for t in reversed(range(length)) if direction else range(length):
                    boundary = t + 1 if direction else t
                    if reset is not None and boundary < length and reset[boundary, b]:
                        h, c = torch.zeros_like(h), torch.zeros_like(c)
                    h, c = found[t] = reference.lstm_cell(above[t], (h, c), *weights[k])
                steps.append([found[t] for t in range(length)])
                states.append((h, c))
            above = [torch.cat([h for h, _ in at]) for at in zip(*steps, strict=True)]
            cells = [torch.cat([c for _, c in at]) for at in zip(*steps, strict=True)]
            last += states
        width = directions * module.hidden_size
        rest = [x.new_zeros(width)] * (T - length)
        filled = [torch.stack([x.new_zeros(width), *t, *rest])[1:] for t in (above, cells)]
        rows.append((filled[0], *(torch.stack(t) for t in zip(*last, strict=True)), filled[1]))
    return [torch.stack(t, 1) for t in zip(*rows, strict=True)]


def drawn(
    seed: int = 0, T: int = T, B: int = B, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Any, Tensor, tuple[Tensor, Tensor]]:
    """A module, its input (T, B, I) and a state."""
    torch.manual_seed(seed)
    module = lstmfused.LSTM(I, H, **options, dtype=dtype)
    h, c = module.initial_state(B)
    return module, torch.randn(T, B, I, dtype=dtype), (torch.rand_like(h), torch.randn_like(c))


def check(
    module: Any,
    x: Tensor,
    hx: tuple[Tensor, Tensor],
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> None:
    """Outputs, states and every gradient."""
    x, h, c = (t.requires_grad_() for t in (x, *hx))

    def swapped(t: Any) -> Any:
        return t.transpose(0, 1) if t is not None and module.batch_first else t

    output, (h_n, c_n), cells = module(
        swapped(x), (h, c), reset=swapped(reset), lengths=lengths, return_cell_states=True
    )
    found = [swapped(output), h_n, c_n, swapped(cells)]
    wanted = loop(module, x, (h, c), reset, lengths)
    case = (module, reset, lengths)
    for name, actual, want in zip("hhcc", found, wanted, strict=True):
        check_output(name, actual, want, case)
    of = [x, h, c, *module.parameters()]
    weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape) for t in wanted]
    losses = (
        torch.stack([(t * w).sum() for t, w in zip(outputs, weights, strict=True)]).sum()
        for outputs in (found, wanted)
    )
    gradients = (
        torch.autograd.grad(loss, of, allow_unused=True, materialize_grads=True) for loss in losses
    )
    for actual, want in zip(*gradients, strict=True):
        check_gradient("gradient", actual, want, case, rows=T * B)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bias": False, "batch_first": True},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
]
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS, ids=str)

RESETS = {
    "none": torch.zeros(T, B, dtype=torch.bool),
    "all": torch.ones(T, B, dtype=torch.bool),
    "some": (torch.arange(T * B) * 7 % 5 < 2).view(T, B),
    "first and last": (torch.arange(T) % (T - 1) == 0).unsqueeze(1).expand(T, B),
}
LENGTHS = {
    "full": torch.full((B,), T),
    "any order": torch.tensor([2, T, 0, 3]),
    "int32": torch.tensor([1, 1, 5, 6], dtype=torch.int32),
    "empty": torch.zeros(B, dtype=torch.int64),
}


@EVERY_OPTION
@pytest.mark.parametrize("reset", RESETS)
def test_resets(reset: str, options: dict[str, Any]) -> None:
    check(*drawn(**options), reset=RESETS[reset])


@EVERY_OPTION
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths(lengths: str, options: dict[str, Any]) -> None:
    check(*drawn(**options), lengths=LENGTHS[lengths])


@EVERY_OPTION
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_resets_and_lengths(lengths: str, reset: str, options: dict[str, Any]) -> None:
    check(*drawn(**options), RESETS[reset], LENGTHS[lengths])


@pytest.mark.parametrize("T", [0, 1, 3])
@pytest.mark.parametrize("B", [0, 1, 3])
def test_small_sizes(B: int, T: int) -> None:
    for bidirectional in (False, True):
        module, x, hx = drawn(T=T, B=B, bidirectional=bidirectional)
        reset = torch.arange(T * B).view(T, B) % 2 == 0
        lengths = torch.arange(B).clamp(max=T)
        masks: tuple[dict[str, Any], ...] = {}, {"reset": reset}, {"lengths": lengths}
        for masked in masks:
            output, (h, c), cells = module(x, hx, **masked, return_cell_states=True)
            assert output.shape == cells.shape == (T, B, H * (1 + bidirectional))
            if B and T:
                check(module, x, hx, **masked)
            else:
                assert torch.equal(h, hx[0]) and torch.equal(c, hx[1])
                (output.sum() + h.sum() + c.sum()).backward()


def test_without_a_batch() -> None:
    module, x, hx = drawn(bidirectional=True, num_layers=2)
    reset, lengths = RESETS["some"], LENGTHS["any order"]
    want = module(x, hx, reset=reset, lengths=lengths, return_cell_states=True)
    for b in range(B):
        state = hx[0][:, b], hx[1][:, b]
        for length in (lengths[b], int(lengths[b])):
            output, (h, c), cells = module(
                x[:, b], state, reset=reset[:, b], lengths=length, return_cell_states=True
            )
            torch.testing.assert_close(output, want[0][:, b])
            torch.testing.assert_close((h, c), (want[1][0][:, b], want[1][1][:, b]))
            torch.testing.assert_close(cells, want[2][:, b])


def test_lists_do() -> None:
    module, x, _ = drawn()
    lengths, reset = LENGTHS["any order"], RESETS["some"]
    found = module(x, reset=reset.tolist(), lengths=lengths.tolist())[0]
    assert torch.equal(found, module(x, reset=reset, lengths=lengths)[0])


@EVERY_OPTION
def test_lengths_are_packed_sequences(options: dict[str, Any]) -> None:
    module, x, _ = drawn(**options)
    lengths = torch.tensor([2, T, 1, 3])
    rows = [x[:length, b] for b, length in enumerate(lengths)]
    packed, state = module(nn.utils.rnn.pack_sequence(rows, enforce_sorted=False))
    first = module.batch_first
    output, other = module(x.transpose(0, 1) if first else x, lengths=lengths)
    torch.testing.assert_close(other, state)
    padded, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=first)
    torch.testing.assert_close(output, padded)


def test_padding_may_be_anything() -> None:
    """What stands past the ends reaches neither outputs nor gradients."""
    module, x, hx = drawn(bidirectional=True, num_layers=2)
    lengths = LENGTHS["any order"]
    past = torch.arange(T).unsqueeze(1) >= lengths
    results = []
    for padding in (0.0, math.nan):
        padded = x.masked_fill(past.unsqueeze(2), padding).requires_grad_()
        output, state = module(padded, hx, lengths=lengths)
        of = [padded, *module.parameters()]
        gradients = torch.autograd.grad([output.sum(), state[1].sum()], of)
        assert (gradients[0][past] == 0).all()
        results.append((output, state, gradients))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("cut", range(T + 1))
def test_two_pieces_are_one(cut: int) -> None:
    module, x, hx = drawn(num_layers=2)
    reset = RESETS["some"]
    output, state = module(x, hx, reset=reset)
    one, between = module(x[:cut], hx, reset=reset[:cut])
    other, end = module(x[cut:], between, reset=reset[cut:])
    torch.testing.assert_close(torch.cat([one, other]), output)
    torch.testing.assert_close(end, state)


def test_the_cell_goes_on() -> None:
    module, x, hx = drawn()
    _, (h, c) = module(x[:-1], hx)
    h, c = module.cell()(x[-1], (h[0], c[0]))
    torch.testing.assert_close(h, module(x, hx)[0][-1])


def test_second_backward() -> None:
    module, x, hx = drawn(bidirectional=True)
    x.requires_grad_()
    output, _ = module(x, hx, reset=RESETS["some"], lengths=LENGTHS["any order"])
    of = [x, *module.parameters()]
    once, again = (torch.autograd.grad(output.sum(), of, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradcheck(bidirectional: bool) -> None:
    module, x, hx = drawn(T=3, B=2, bidirectional=bidirectional)
    reset, lengths = RESETS["some"][:3, :2], torch.tensor([3, 2])

    def function(x: Tensor, h: Tensor, c: Tensor, *params: Tensor) -> Any:
        output, state, cells = lstm(
            x,
            (h, c),
            list(params),
            bidirectional=bidirectional,
            reset=reset,
            lengths=lengths,
            return_cell_states=True,
        )
        return output, *state, cells

    inputs = [t.detach().requires_grad_() for t in (x, *hx, *module.parameters())]
    assert torch.autograd.gradcheck(function, inputs)


@settings(deadline=None, max_examples=40)
@given(
    shape=some.tuples(some.integers(1, 6), some.integers(1, 4)),
    num_layers=some.integers(1, 2),
    flags=some.fixed_dictionaries(
        dict.fromkeys(("bias", "batch_first", "bidirectional"), some.booleans())
    ),
    masked=some.tuples(some.booleans(), some.booleans()),
    seed=some.integers(0, 99),
)
def test_whatever_the_masks(
    shape: tuple[int, int],
    num_layers: int,
    flags: dict[str, Any],
    masked: tuple[bool, bool],
    seed: int,
) -> None:
    module, x, hx = drawn(seed, *shape, num_layers=num_layers, **flags)
    reset = torch.rand(shape) < 0.3 if masked[0] else None
    lengths = torch.randint(0, shape[0] + 1, shape[1:]) if masked[1] else None
    check(module, x, hx, reset, lengths)


# --------------------------------------------------------------------------------------------------
# The operator: steps may be skipped anywhere


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("B", [B, 40])  # of 40 rows, input and state are multiplied together
def test_holes(B: int, state: bool, reverse: bool) -> None:
    module, x, (h, c) = drawn(B=B)
    mask = (torch.arange(T * B) * 5 % 7 % 3).to(torch.uint8).view(T, B)
    assert mask.unique().tolist() == [0, 1, 2]
    start = (h[0], c[0]) if state else (None, None)
    arguments = [
        None if t is None else t.detach().requires_grad_()
        for t in (x, *start, *module.parameters())
    ]
    of = [t for t in arguments if t is not None]
    results = []
    layers: tuple[Any, ...] = LAYER, reference.lstm_layer
    for layer in layers:
        outputs = layer(*arguments, mask, reverse, True)
        results.append((outputs, torch.autograd.grad([t.cos().sum() for t in outputs], of)))
    (found, actual), (wanted, gradients) = results
    for name, output, want in zip("hhcc", found, wanted, strict=True):
        check_output(name, output, want, (state, reverse))
    for gradient, want in zip(actual, gradients, strict=True):
        check_gradient("gradient", gradient, want, (state, reverse))
    order = range(T)[::-1] if reverse else range(T)
    for before, t in pairwise(order):
        skipped = mask[t] == 2
        assert torch.equal(found[0][t][skipped], found[0][before][skipped])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_are_as_few(dtype: torch.dtype) -> None:
    """With the cell state in float32; what a reset drops may be anything."""
    module, x, (h, c) = drawn(B=40, dtype=dtype)
    mask = (torch.arange(T * 40) * 5 % 7 % 3).to(torch.uint8).view(T, 40)
    h = h[0].masked_fill((mask[0] == 1).unsqueeze(1), torch.nan)
    weights, c = [p.detach() for p in module.parameters()], c[0].float()
    whole = LAYER(x, h, c, *weights, mask, False, True)
    for rows in torch.arange(40).split(5):
        part = LAYER(x[:, rows], h[rows], c[rows], *weights, mask[:, rows], False, True)
        for found, want in zip(whole, part, strict=True):
            found = found[:, rows] if found.dim() == 3 else found[rows]
            eps = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(found, want, rtol=eps, atol=eps)


# --------------------------------------------------------------------------------------------------
# Errors


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"reset": torch.zeros(T, B)}, TypeError, "'reset' must be bool, not torch.float32"),
    ({"reset": torch.zeros(B, T, dtype=torch.bool)}, RuntimeError, r"reset size \[6, 4\], got"),
    ({"reset": torch.zeros(T, dtype=torch.bool)}, RuntimeError, r"reset size .* got \[6\]"),
    ({"lengths": torch.zeros(B)}, TypeError, "'lengths' must be integers, not torch.float32"),
    ({"lengths": torch.ones(B, dtype=torch.bool)}, TypeError, "integers, not torch.bool"),
    ({"lengths": torch.tensor(3)}, RuntimeError, r"lengths size \[4\], got \[\]"),
    ({"lengths": torch.tensor([1, 2, 3, T + 1])}, RuntimeError, "from 0 to the number of steps"),
    ({"lengths": torch.tensor([1, 2, 3, -1])}, RuntimeError, "from 0 to the number of steps"),
]


@pytest.mark.parametrize(("masks", "error", "words"), BAD)
def test_errors(masks: dict[str, Any], error: type[Exception], words: str) -> None:
    module, x, hx = drawn()
    with pytest.raises(error, match=words):
        module(x, hx, **masks)


def test_packed_sequences_have_their_lengths() -> None:
    module, x, _ = drawn()
    packed = nn.utils.rnn.pack_sequence(list(x.unbind(1)))
    for masked in ({"reset": RESETS["none"]}, {"lengths": LENGTHS["full"]}):
        with pytest.raises(ValueError, match="PackedSequence takes neither reset nor lengths"):
            module(packed, **masked)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_projections() -> None:
    """Step by step in torch's operators, where torch's own layer has no masks."""
    module, x, hx = drawn(proj_size=2, num_layers=2, bidirectional=True)
    reset, lengths = RESETS["some"], LENGTHS["any order"]
    full = module(x, hx, reset=RESETS["none"], lengths=LENGTHS["full"])
    torch.testing.assert_close(full, module(x, hx))
    output, _ = module(x, hx, reset=reset, lengths=lengths)
    for b in range(B):
        row = slice(0, lengths[b]), slice(b, b + 1)
        state = hx[0][:, b : b + 1], hx[1][:, b : b + 1]
        alone, _ = module(x[row], state, reset=reset[row])
        torch.testing.assert_close(output[row], alone)
    with lstmfused.batch_invariant(), pytest.raises(NotImplementedError, match="a projection"):
        module(x, hx)
