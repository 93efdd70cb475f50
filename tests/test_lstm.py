"""LSTM in the place of nn.LSTM: outputs, states and every gradient, over the table of options."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import HALF, check_gradient, check_output
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_leaves, tree_map

import lstmfused

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

T, B, I, H = 5, 3, 4, 6


def pair(*given: Any, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """torch's layer in float64, and a fused one of the same weights in `dtype`."""
    fused = lstmfused.LSTM(*(given or (I, H)), **options, dtype=dtype)
    plain = nn.LSTM(*(given or (I, H)), **options, dtype=torch.float64)
    plain.load_state_dict(fused.state_dict())
    return plain, fused


def sequence(module: nn.LSTM, steps: int = T, rows: int | None = B) -> Tensor:
    """(T, B, I), (B, T, I) or (T, I)"""
    shape: tuple[int, ...] = (steps,) if rows is None else (steps, rows)
    if rows is not None and module.batch_first:
        shape = rows, steps
    return torch.randn(*shape, module.input_size)


def state(module: Any, rows: int | None = B) -> tuple[Tensor, Tensor]:
    h, c = module.initial_state(rows)
    return torch.rand_like(h) * 2 - 1, torch.randn_like(c)


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """The same numbers in `dtype`, to be differentiated by."""
    packed = isinstance(tree, PackedSequence)
    tensors = [tree.data] if packed else tree_leaves(tree)
    made = [t.detach().to(dtype).requires_grad_() for t in tensors]
    if packed:
        return tree._replace(data=made[0]), made
    given = iter(made)
    return tree_map(lambda _: next(given), tree), made


def leaves(outputs: Any) -> list[Tensor]:
    found = [t for t in tree_leaves(outputs) if t is not None]
    return [t for t in found if t.is_floating_point() or t.is_complex()]


def check(plain: Any, fused: Any, x: Any, hx: Any = None, case: object = None) -> None:
    """Outputs, states and the gradients of everything."""
    dtype, results = fused.weight_ih_l0.dtype, []
    x, hx = x.to(dtype), hx and tuple(t.to(dtype) for t in hx)
    for module in (plain, fused):
        wide = torch.float64 if module is plain else dtype
        (here, of_x), (start, of_hx) = cast(x, wide), cast(hx, wide) if hx else (None, [])
        outputs = leaves(module(here, start))
        weights = [torch.linspace(-1, 1, t.numel(), dtype=wide).view(t.shape) for t in outputs]
        of = [*of_x, *of_hx, *module.parameters()]
        results.append((outputs, torch.autograd.grad(outputs, of, weights)))
    (wanted, gradients), (found, actual) = results
    for name, output, want in zip("hhc", found, wanted, strict=True):
        assert output.dtype == dtype and output.stride() == want.stride(), case
        check_output(name, output, want, case)
    for gradient, want in zip(actual, gradients, strict=True):
        check_gradient("gradient", gradient, want, case, rows=T * B)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"num_layers": 3},
    {"batch_first": True},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "bias": False},
    {"num_layers": 2, "dropout": 0.5},
    {"proj_size": 2},
    {"proj_size": 2, "num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
]
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS, ids=str)


@EVERY_OPTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_option(options: dict[str, Any], dtype: torch.dtype) -> None:
    plain, fused = (module.eval() for module in pair(dtype=dtype, **options))
    for rows in (None, 1, B):
        x = sequence(fused, rows=rows)
        for hx in (None, state(fused, rows)):
            check(plain, fused, x, hx, (rows, hx is None))


@EVERY_OPTION
def test_packed_sequences(options: dict[str, Any]) -> None:
    plain, fused = (module.eval() for module in pair(**options))
    for lengths in ((5, 3, 3, 1), (2, 5, 1, 5), (1,)):
        rows = [torch.randn(length, I) for length in lengths]
        x = pack_sequence(rows, enforce_sorted=lengths[0] == max(lengths))
        for hx in (None, state(fused, len(lengths))):
            check(plain, fused, x, hx, (lengths, hx is None))
        found, want = fused(x)[0], plain(x.double())[0]
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            indices = getattr(found, name), getattr(want, name)
            assert indices == (None, None) or torch.equal(*indices)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_half_types(packed: bool, dtype: torch.dtype) -> None:
    """Every step's h and c are rounded, so that the sequence is held to a multiple of that."""
    plain, fused = pair(bidirectional=True, dtype=dtype)
    x: Any = sequence(fused).to(dtype)
    if packed:
        x = pack_sequence(list(x.unbind(1)))
    found, want = fused(x), plain(x.double())
    for actual, expected in zip(leaves(found), leaves(want), strict=True):
        assert actual.dtype == dtype
        assert (actual - expected).abs().max() <= 4 * torch.finfo(dtype).eps


def test_complex_numbers() -> None:
    plain = nn.LSTM(I, H, 2, bidirectional=True, dtype=torch.complex128)
    fused = lstmfused.LSTM(I, H, 2, bidirectional=True, dtype=torch.complex128)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(T, B, I, dtype=torch.complex128)
    for found, want in zip(leaves(fused(x)), leaves(plain(x)), strict=True):
        assert torch.equal(found, want)
    output, _ = fused(x, lengths=torch.tensor([T, 2, 0]))
    assert torch.allclose(output[:2, 1, :H], fused(x[:2])[0][:, 1, :H])
    assert (output[2:, 1] == 0).all()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_draws_what_torch_draws(bidirectional: bool) -> None:
    plain, fused = pair(I, H, 3, dropout=0.5, bidirectional=bidirectional, dtype=torch.float64)
    x = sequence(fused).double()
    outputs = []
    for module in (plain, fused):
        torch.manual_seed(3)
        outputs.append(module(x)[0])
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-14)
    assert not torch.equal(fused(x)[0], outputs[1])
    assert torch.equal(fused.eval()(x)[0], fused(x)[0])


def test_a_row_alone_is_a_row_of_the_batch() -> None:
    _, fused = pair(I, H, 2, bidirectional=True)
    x = sequence(fused)
    torch.testing.assert_close(fused(x[:, 1])[0], fused(x)[0][:, 1], rtol=0, atol=1e-6)


@EVERY_OPTION
def test_cell_states(options: dict[str, Any]) -> None:
    """Those of the last layer: its cell finds them step by step."""
    _, fused = (module.eval() for module in pair(**options))
    for rows in (None, B):
        x, hx = sequence(fused, rows=rows), state(fused, rows)
        output, (h, c), cells = fused(x, hx, return_cell_states=True)
        plain, (h_n, c_n) = fused(x, hx)
        for found, want in zip((output, h, c), (plain, h_n, c_n), strict=True):
            torch.testing.assert_close(found, want, rtol=0, atol=1e-6)
        directions = 1 + fused.bidirectional
        assert cells.shape == (*output.shape[:-1], directions * H)
        steps = cells.transpose(0, 1) if rows and fused.batch_first else cells
        assert torch.equal(steps[-1, ..., :H], c[-directions])
        if fused.bidirectional:
            assert torch.equal(steps[0, ..., H:], c[-1])
    if not fused.proj_size and fused.num_layers == 1 and not fused.bidirectional:
        steps = x.unbind(1 if fused.batch_first else 0)
        h, c = (t[0] for t in hx)
        for t, step in enumerate(steps):
            h, c = fused.cell()(step, (h, c))
            found = cells.select(1 if fused.batch_first else 0, t)
            torch.testing.assert_close(found, c, rtol=0, atol=1e-6)


def test_cell_states_of_packed_sequences() -> None:
    _, fused = pair(bidirectional=True)
    rows = [torch.randn(length, I) for length in (2, 5, 1)]
    output, (_, c), cells = fused(
        pack_sequence(rows, enforce_sorted=False), return_cell_states=True
    )
    assert isinstance(cells, PackedSequence)
    assert torch.equal(cells.batch_sizes, output.batch_sizes)
    for k, (row, found) in enumerate(zip(rows, nn.utils.rnn.unpack_sequence(cells), strict=True)):
        torch.testing.assert_close(found, fused(row, return_cell_states=True)[2])
        assert torch.equal(found[-1, :H], c[0, k]) and torch.equal(found[0, H:], c[1, k])


@settings(deadline=None, max_examples=40)
@given(
    sizes=some.tuples(*(some.integers(1, 9) for _ in "IH")),
    shape=some.tuples(some.integers(1, 7), some.none() | some.integers(1, 5)),
    num_layers=some.integers(1, 3),
    flags=some.fixed_dictionaries(
        dict.fromkeys(("bias", "batch_first", "bidirectional"), some.booleans())
    ),
    stated=some.booleans(),
    seed=some.integers(0, 99),
)
def test_whatever_the_options(
    sizes: tuple[int, int],
    shape: tuple[int, int | None],
    num_layers: int,
    flags: dict[str, Any],
    stated: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    plain, fused = pair(*sizes, num_layers, **flags)
    x = sequence(fused, *shape)
    check(plain, fused, x, state(fused, shape[1]) if stated else None)


# --------------------------------------------------------------------------------------------------
# The module


@EVERY_OPTION
def test_same_seed_gives_the_parameters_of_torch(options: dict[str, Any]) -> None:
    made = []
    for kind in (nn.LSTM, lstmfused.LSTM):
        torch.manual_seed(7)
        made.append(kind(I, H, **options))
    plain, fused = made
    assert isinstance(fused, nn.LSTM) and repr(fused) == repr(plain)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert all(map(torch.equal, fused.parameters(), plain.parameters()))
    assert fused.all_weights[0][0] is fused.weight_ih_l0


def through_pickle(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


def through_a_file(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = lstmfused.LSTM(I, H, 2, bidirectional=True)
    other.load_state_dict(torch.load(file))
    return other


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, through_pickle, through_a_file])
def test_copies(copied: Callable[[nn.Module], Any]) -> None:
    fused = lstmfused.LSTM(I, H, 2, bidirectional=True)
    other, x = copied(fused), sequence(fused)
    assert type(other) is lstmfused.LSTM
    assert torch.equal(other(x)[0], fused(x)[0])
    other.flatten_parameters()
    want = fused(x)[0]
    torch.testing.assert_close(other.double()(x.double())[0].float(), want, rtol=0, atol=1e-6)


def halved(module: Any) -> None:
    module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0 / 2)


def normed(module: nn.LSTM) -> None:
    parametrizations.weight_norm(module, "weight_hh_l0")


def pruned(module: nn.LSTM) -> None:
    prune.l1_unstructured(module, "weight_ih_l0", amount=0.3)


def edited(module: Any) -> None:
    module.weight_hh_l0.data.mul_(-1)


def put_in_place(module: Any) -> None:
    weight = module.weight_hh_l0.detach()
    del module.weight_hh_l0
    module.weight_hh_l0 = weight / 2


def put_in_buffers(module: Any) -> None:
    weight = module.weight_hh_l0.detach()
    del module.weight_hh_l0
    module.register_buffer("weight_hh_l0", weight / 2)


def put_in_class(module: Any) -> None:
    kind = type(module)
    half = property(lambda self: self._parameters["weight_hh_l0"] / 2)
    module.__class__ = type(kind.__name__, (kind,), {"weight_hh_l0": half})


CHANGES = [halved, normed, pruned, edited, put_in_place, put_in_buffers, put_in_class]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_seen(change: Callable[[nn.LSTM], None]) -> None:
    plain, fused = pair(dtype=torch.float64)
    x = sequence(fused).double()
    before = fused(x)[0]
    for module in (plain, fused):
        change(module)
    torch.testing.assert_close(fused(x)[0], plain(x)[0], rtol=0, atol=1e-12)
    assert change is normed or not torch.allclose(fused(x)[0], before)
    wanted, found = (
        torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
        for module in (plain, fused)
    )
    for gradient, want in zip(found, wanted, strict=True):
        check_gradient("gradient", gradient, want, change)


def test_functional_call() -> None:
    plain, fused = pair()
    x = sequence(fused).double()
    weights = {name: 2 * p.detach() for name, p in plain.named_parameters()}
    found, want = (torch.func.functional_call(m, weights, (x,))[0] for m in (fused, plain))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    assert fused(x.float())[0].dtype == torch.float32


@EVERY_OPTION
def test_cells_share_their_parameters(options: dict[str, Any]) -> None:
    _, fused = (module.eval() for module in pair(**options))
    if fused.proj_size:
        with pytest.raises(ValueError, match="proj_size"):
            fused.cell()
        return
    for layer in range(fused.num_layers):
        cell = fused.cell(layer)
        assert type(cell) is lstmfused.LSTMCell and not cell.training
        for name, parameter in cell.named_parameters():
            assert parameter is fused.get_parameter(f"{name}_l{layer}")
        assert repr(cell) == repr(lstmfused.LSTMCell(cell.weight_ih.shape[1], H, fused.bias))
    if fused.bidirectional:
        assert fused.cell(0, 1).weight_hh is fused.weight_hh_l0_reverse
    for wrong in ((fused.num_layers,), (-1,), (0, 1 + fused.bidirectional)):
        with pytest.raises(IndexError, match="there is no layer"):
            fused.cell(*wrong)


@pytest.mark.parametrize("options", [{}, {"proj_size": 2, "num_layers": 2, "bidirectional": True}])
def test_initial_state(options: dict[str, Any]) -> None:
    fused = lstmfused.LSTM(I, H, **options, dtype=torch.float64)
    for rows in (None, 0, B):
        x = sequence(fused, rows=rows).double()
        given, absent = leaves(fused(x, fused.initial_state(rows))), leaves(fused(x))
        assert all(map(torch.equal, given, absent))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_transposed_weights(dtype: torch.dtype, reverse: bool, masked: bool) -> None:
    """Weights that lie as Keras has them, (I, 4H) and (H, 4H), and gradients that do, too."""
    operator = torch.ops.lstmfused.lstm_layer
    sizes = [(1, 1, 3, 5), (4, 3, 1, 1), (7, 2, 5, 17), (3, 40, 20, 33), (0, 2, 3, 5)]
    # Where backward packs the states' weights, whose units come in fours: transposed ones always,
    # others where rows are many or weights large.
    sizes += [(1, 1, 3, 4), (3, 5, 2, 20), (3, 49, 5, 36), (47, 2, 3, 364)]
    for T, B, I, H in sizes:
        plain = [torch.randn(4 * H, I), torch.randn(4 * H, H), torch.randn(4 * H)]
        mask = torch.randint(0, 3, (T, B), dtype=torch.uint8) if masked else None
        x, w = torch.randn(T, B, I).to(dtype), torch.randn(T, B, H).to(dtype)
        found = []
        for transposed in (False, True):
            weights = [t.mT.contiguous().mT if transposed else t for t in plain[:2]]
            given = [x.clone(), *(t.to(dtype) for t in [*weights, plain[2]])]
            given = [t.requires_grad_() for t in given]
            arguments = given[0], None, None, *given[1:], None, mask, reverse, False
            out, h, c, _ = operator(*arguments)
            loss = (out * w).sum() + (h * c).sum()
            grads = torch.autograd.grad(loss, given)
            given = [t.detach() for t in given]
            out, h, c = (t.detach() for t in (out, h, c))
            if dtype != torch.bfloat16:
                assert [t.stride() for t in grads[1:3]] == [t.stride() for t in given[1:3]]
            found.append([out, h, c, *grads])
        bound = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
        for got, want in zip(found[1], found[0], strict=True):
            scale = max(want.abs().max().item(), 1) if want.numel() else 1
            torch.testing.assert_close(got, want, rtol=0, atol=bound * scale)
