"""Packed layers against torch's own in float64, of the same weights as they are rounded."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from cases import assert_close, run_python
from test_fuse import types
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import lstmfused
from lstmfused import PackedLSTM, PackedLSTMCell, pack, reference
from lstmfused.modules.packing import unpacked

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]*. is deprecated"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.int8)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
T, B, I, H = 6, 3, 10, 20
LAYER = torch.ops.lstmfused.lstm_layer_packed

OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"num_layers": 3},
    {"batch_first": True},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5},
]
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS, ids=str)

LOAD = """
import sys, torch, lstmfused
layer, x, expected = torch.load(sys.argv[1], weights_only=False)
torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=0)
print(lstmfused.build_info()["cpu kernel"])
"""


def rounded(layer: nn.LSTM, dtype: torch.dtype) -> Any:
    """The layer in float64, in evaluation mode, with its weights as they are packed."""
    made = copy.deepcopy(layer).double().eval()
    for name, p in made.named_parameters():
        other = name.replace("_ih", "_hh") if "_ih" in name else name.replace("_hh", "_ih")
        if name.startswith("bias"):
            continue
        weight, beside = (layer.get_parameter(n).detach() for n in (name, other))
        if dtype == torch.int8:
            scale = torch.cat([weight, beside], 1).abs().amax(1, keepdim=True) / 127
            weight = (weight / scale.clamp(min=1e-30)).round().double() * scale.double()
        p.data = weight.to(torch.float64 if dtype == torch.int8 else dtype).double()
    return lstmfused.fuse_(made)


def sequence(layer: Any, steps: int = T, rows: int | None = B) -> Tensor:
    shape: tuple[int, ...] = (steps,) if rows is None else (steps, rows)
    return torch.randn(*(shape[::-1] if layer.batch_first else shape), layer.input_size)


def state(layer: Any, rows: int | None = B) -> tuple[Tensor, Tensor]:
    h, c = layer.initial_state(rows)
    return torch.rand_like(h) * 2 - 1, torch.randn_like(c)


def masks(layer: Any, steps: int = T, rows: int | None = B) -> list[dict[str, Tensor]]:
    shape = sequence(layer, steps, rows).shape[:-1]
    reset, lengths = torch.rand(shape) < 0.3, torch.randint(steps + 1, [rows] if rows else [])
    return [{}, {"reset": reset}, {"lengths": lengths}, {"reset": reset, "lengths": lengths}]


def check(found: Any, want: Any, case: object = None, most: float = 1e-6) -> None:
    for actual, expected in zip(tree_leaves(found), tree_leaves(want), strict=True):
        assert actual.dtype == torch.float32, case
        bound = most * expected.detach().abs().clamp(min=1)
        assert_close(actual, expected.detach(), bound, case)


def same(found: Any, want: Any) -> None:
    torch.testing.assert_close(tree_leaves(found), tree_leaves(want), rtol=0, atol=1e-6)


def double(tree: Any) -> Any:
    return tree_map(lambda t: None if t is None else t.double(), tree)


# --------------------------------------------------------------------------------------------------
# Values


@EVERY_OPTION
@EACH_DTYPE
def test_every_option(dtype: torch.dtype, options: dict[str, Any]) -> None:
    layer = nn.LSTM(I, H, **options)
    packed, plain = PackedLSTM(layer, dtype), rounded(layer, dtype)
    for rows in (None, 1, B, 40):
        x = sequence(layer, rows=rows)
        for hx in (None, state(packed, rows)):
            for masked in masks(layer, rows=rows):
                case = rows, hx is None, list(masked)
                check(packed(x, hx, **masked), plain(double(x), double(hx), **masked), case)


def test_float32_is_torchs_layer() -> None:
    for options in OPTIONS:
        layer = nn.LSTM(I, H, **options).eval()
        x, hx = sequence(layer), state(PackedLSTM(layer))
        same(PackedLSTM(layer)(x, hx), layer(x, hx))


@EVERY_OPTION
@EACH_DTYPE
def test_packed_sequences(dtype: torch.dtype, options: dict[str, Any]) -> None:
    layer = nn.LSTM(I, H, **options)
    packed, plain = PackedLSTM(layer, dtype), rounded(layer, dtype)
    for lengths in ((5, 3, 3, 1), (2, 5, 1, 5), (1,)):
        rows = [torch.randn(length, I) for length in lengths]
        x = pack_sequence(rows, enforce_sorted=lengths[0] == max(lengths))
        for hx in (None, state(packed, len(lengths))):
            found, hn = packed(x, hx)
            want, hn_want = plain(x.double(), double(hx))
            assert isinstance(found, PackedSequence)
            check((found.data, hn), (want.data, hn_want), (lengths, hx is None))
            for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
                indices = getattr(found, name), getattr(want, name)
                assert indices == (None, None) or torch.equal(*indices)
    with pytest.raises(ValueError, match="neither reset nor lengths"):
        packed(x, lengths=torch.tensor([1]))


@EACH_DTYPE
@pytest.mark.parametrize("inputs", [1, 3, 51, 130])
def test_odd_sizes(inputs: int, dtype: torch.dtype) -> None:
    for units, rows in product((1, 3, 17, 51, 130), (0, 1, 2, 5, 33)):
        layer = nn.LSTM(inputs, units, bidirectional=True)
        packed, plain = PackedLSTM(layer, dtype), rounded(layer, dtype)
        for steps in (0, 1, 4):
            x, hx = sequence(layer, steps, rows) / inputs**0.5, state(packed, rows)
            if steps and rows:
                for masked in masks(layer, steps, rows):
                    found, want = packed(x, hx, **masked), plain(double(x), double(hx), **masked)
                    check(found, want, (steps, rows, units, list(masked)), 2e-6)
            else:
                output, (h, c) = packed(x, hx)
                assert output.shape == (steps, rows, 2 * units)
                assert torch.equal(h, hx[0]) and torch.equal(c, hx[1])


@EACH_DTYPE
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    packed = PackedLSTM(nn.LSTM(33, 300, 2), dtype)
    x, hx = sequence(packed, rows=9), state(packed, 9)
    torch.set_num_threads(1)
    one = packed(x, hx)
    torch.set_num_threads(2)
    assert all(map(torch.equal, tree_leaves(packed(x, hx)), tree_leaves(one)))


@EACH_DTYPE
def test_batch_invariant_mode(dtype: torch.dtype) -> None:
    packed = PackedLSTM(nn.LSTM(33, 300, 2), dtype)
    x, hx = sequence(packed, rows=40), state(packed, 40)
    with lstmfused.batch_invariant():
        whole, part = packed(x, hx), packed(x[:, 3:5], tuple(t[:, 3:5] for t in hx))
    assert torch.equal(part[0], whole[0][:, 3:5])


@EACH_DTYPE
def test_steps_of_the_packed_cell(dtype: torch.dtype) -> None:
    layer = lstmfused.LSTM(I, H)
    packed, cell = PackedLSTM(layer, dtype), PackedLSTMCell(layer.cell(), dtype)
    x, step = sequence(layer), cell.initial_state(B)
    with lstmfused.batch_invariant():
        for t, output in enumerate(packed(x)[0]):
            step = cell(x[t], step)
            assert torch.equal(output, step[0])


def test_what_is_reset_or_past_the_end_may_be_anything() -> None:
    packed = PackedLSTM(nn.LSTM(I, H, bidirectional=True))
    x, (h, c), lengths = sequence(packed), state(packed), torch.tensor([2, T, 0])
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[0, 1] = True
    h[0, 1] = c[0, 1] = torch.nan
    past = (torch.arange(T).unsqueeze(1) >= lengths).unsqueeze(2)
    found = packed(x.masked_fill(past, torch.nan), (h, c), reset=reset, lengths=lengths)
    hx = h.nan_to_num(0), c.nan_to_num(0)
    assert all(
        map(
            torch.equal,
            tree_leaves(found),
            tree_leaves(packed(x, hx, reset=reset, lengths=lengths)),
        )
    )


@EACH_DTYPE
@pytest.mark.parametrize("reverse", [False, True])
def test_holes(reverse: bool, dtype: torch.dtype) -> None:
    """Steps may be skipped anywhere."""
    packed = PackedLSTM(nn.LSTM(I, H), dtype)
    for rows, layout in product((1, 4, 40), ("plain", "transposed")):
        x, (h, c) = sequence(packed, rows=rows), (t[0] for t in state(packed, rows))
        if layout == "transposed":
            x, h = x.mT.contiguous().mT, h.mT.contiguous().mT
        mask = (torch.arange(T * rows) * 5 % 7 % 3).to(torch.uint8).view(T, rows)
        given = x, h, c, *arguments(packed, mask, reverse)
        b: Any = packed._buffers
        weights = unpacked(b["weight_l0"], H).double()
        if b["scale_l0"] is not None:
            weights = weights * unpacked(b["scale_l0"], H).double()
        bias = unpacked(b["bias_l0"], H).flatten().double()
        w_ih, w_hh = weights.split([I, H], 1)
        x, h, c = double((x, h, c))
        want = reference.lstm_layer(x, h, c, w_ih, w_hh, bias, None, mask, reverse)
        check(LAYER(*given), want[:3], (rows, layout))


def arguments(packed: PackedLSTM, mask: Tensor | None, reverse: bool) -> tuple[Any, ...]:
    b: Any = packed._buffers
    weights = b["weight_l0"], b["bias_l0"], b["scale_l0"]
    return *weights, mask, packed.input_size, packed.hidden_size, packed.format, reverse


# --------------------------------------------------------------------------------------------------
# Errors


def test_calls_that_raise() -> None:
    packed = PackedLSTM(nn.LSTM(I, H, 2))
    x, (h, c) = sequence(packed), state(packed)
    reset = torch.zeros(T, B)
    bad: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        ((x[..., 1:],), {}, RuntimeError, "inconsistent input_size: got 9 expected 10"),
        ((x[0, 0],), {}, ValueError, "2D or 3D, got 1D"),
        ((x[None],), {}, ValueError, "2D or 3D, got 4D"),
        ((x.double(),), {}, RuntimeError, "expected input to have the dtype of bias"),
        ((x, (h[1:], c)), {}, RuntimeError, r"Expected hidden\[0\] size"),
        ((x, (h, c[..., 1:])), {}, RuntimeError, r"Expected hidden\[1\] size"),
        ((x, (h, c.double())), {}, RuntimeError, r"expected hx\[1\] to have the dtype of bias"),
        ((x, h), {}, TypeError, "must be a pair"),
        ((x,), {"reset": reset}, TypeError, "'reset' must be bool"),
        ((x,), {"reset": reset[1:].bool()}, RuntimeError, "Expected reset size"),
        ((x,), {"lengths": torch.zeros(B)}, TypeError, "'lengths' must be integers"),
        ((x,), {"lengths": torch.full((B,), T + 1)}, RuntimeError, "from 0 to the number"),
    ]
    for given, options, error, words in bad:
        with pytest.raises(error, match=words):
            packed(*given, **options)
    with pytest.raises(RuntimeError, match="keeps the dtypes that it was made with"):
        packed.double()(x.double())


def test_bad_arguments_of_the_operator() -> None:
    packed, x, mask = PackedLSTM(nn.LSTM(I, H), torch.int8), torch.zeros(T, B, I), None
    given = arguments(packed, mask, False)
    h = torch.zeros(B, H)
    LAYER(x, h, h, *given)
    for k in range(3):
        for bad in (given[k][1:], given[k].unsqueeze(0), given[k].to("meta")):
            with pytest.raises(RuntimeError):
                LAYER(x, None, None, *given[:k], bad, *given[k + 1 :])
    for sizes in ((I, H + 4, 1), (I + 1, H, 1), (-1, H, 1), (I, -H, 1), (I, H, 2)):
        with pytest.raises(RuntimeError):
            LAYER(x, None, None, *given[:4], *sizes, False)
    for other in (torch.zeros(T, B), torch.zeros(B, T, dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match="expected mask of shape"):
            LAYER(x, None, None, *given[:3], other, I, H, 1, False)
    for state in ((h, None), (None, h), (h[1:], h), (h, h[:, 1:]), (h[None], h[None])):
        with pytest.raises(RuntimeError):
            LAYER(x, *state, *given)
    with pytest.raises(RuntimeError, match=r"input of shape \[steps, batch, input\]"):
        LAYER(x[0], None, None, *given)


def parametrized() -> nn.LSTM:
    layer = nn.LSTM(I, H)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    return layer


def hooked() -> nn.LSTM:
    layer = nn.LSTM(I, H)
    layer.register_forward_pre_hook(lambda *_: None)
    return layer


def replaced() -> nn.LSTM:
    layer: Any = lstmfused.LSTM(I, H)
    layer.forward = lambda *given: given
    return layer  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "parametrized": (parametrized, "parametrization"),
    "hooks": (hooked, "hooks"),
    "forward of its own": (replaced, "forward has been replaced"),
    "float64": (lambda: nn.LSTM(I, H).double(), "torch.float64"),
    "other device": (lambda: nn.LSTM(I, H, device="meta"), "meta"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_layers_that_cannot_be_packed(kind: str) -> None:
    make, word = REFUSED[kind]
    layer: Any = make()
    with pytest.raises(ValueError, match=word):
        PackedLSTM(layer)
    with pytest.raises(ValueError, match=f"^inner.*{word}"):
        pack(nn.ModuleDict({"inner": layer}))


def test_wrong_arguments() -> None:
    for bad in (torch.float16, "int8", None):
        with pytest.raises(ValueError, match="weight_dtype"):
            PackedLSTM(nn.LSTM(I, H), bad)  # type: ignore[arg-type]
    packed: Any = PackedLSTM(nn.LSTM(I, H))
    others: list[Any] = [nn.GRU(I, H), nn.LSTMCell(I, H), packed, None]
    for other in others:
        with pytest.raises(TypeError, match=r"expected an nn\.LSTM or lstmfused\.LSTM"):
            PackedLSTM(other)
    with pytest.raises(ValueError, match="proj_size"):
        PackedLSTM(nn.LSTM(I, H, proj_size=2))


@pytest.mark.parametrize("index", range(3))
def test_no_gradients(index: int) -> None:
    packed = PackedLSTM(nn.LSTM(I, H))
    given = [sequence(packed), *state(packed)]
    want = packed(given[0], tuple(given[1:]))
    given[index] = given[index].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="a packed LSTM layer computes no gradients"):
        packed(given[0], tuple(given[1:]))
    with torch.no_grad():
        same(packed(given[0], tuple(given[1:])), want)
    with forward_ad.dual_level():
        plain = given[index].detach()
        given[index] = forward_ad.make_dual(plain, torch.ones_like(plain))
        with pytest.raises(RuntimeError, match="computes no gradients"):
            packed(given[0], tuple(given[1:]))


# --------------------------------------------------------------------------------------------------
# Modules


def test_no_training() -> None:
    packed = PackedLSTM(nn.LSTM(I, H, 2, dropout=0.5))
    assert not packed.training and not list(packed.parameters())
    model = nn.ModuleList([packed, nn.Dropout()]).train()
    assert model.training and not packed.training
    x = sequence(packed)
    assert torch.equal(packed(x)[0], packed(x)[0])


class Tagger(nn.Module):
    def __init__(self, kind: type[nn.LSTM] = nn.LSTM, **options: Any) -> None:
        super().__init__()
        self.layer = kind(I, H, **options)
        self.again = self.layer
        self.cell = nn.LSTMCell(H, H)
        self.head = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        output, (h, c) = self.layer(x)
        state: tuple[Tensor, Tensor] = self.cell(output[-1], (h[0], c[0]))
        tags: Tensor = self.head(state[0])
        return tags


class OwnForward(nn.LSTM):
    def forward(self, *given: Any) -> Any:
        return given


@pytest.mark.parametrize("kind", [nn.LSTM, lstmfused.LSTM])
@EACH_DTYPE
def test_model(dtype: torch.dtype, kind: type[nn.LSTM]) -> None:
    model: Any = Tagger(kind)
    x = torch.randn(T, B, I)
    before = types(model)
    packed = pack(model, dtype)
    assert type(packed) is Tagger and packed.layer is packed.again
    assert [type(m) for m in packed.children()] == [PackedLSTM, PackedLSTMCell, nn.Linear]
    assert types(model) == before and model.layer.training
    tags = packed(x)
    off = (tags - model(x)).abs().max()
    assert off <= (1e-6 if dtype == torch.float32 else 0.02)
    assert type(pack(model.layer)) is PackedLSTM
    with torch.no_grad():
        model.layer.weight_ih_l0.zero_()
    assert torch.equal(packed(x), tags)
    assert pack(nn.ModuleList([packed.layer]))[0] is not packed.layer


def test_what_is_left_as_it_is() -> None:
    model = nn.ModuleList([OwnForward(I, H), nn.LSTM(I, H, proj_size=2), nn.LSTM(I, H)])
    words = r"^left as it is: 0 \(a subclass, OwnForward\), 1 \(it has projections\)$"
    with pytest.warns(UserWarning, match=words):
        assert types(pack(model))[1:] == [OwnForward, nn.LSTM, PackedLSTM]


def saved(packed: PackedLSTM) -> PackedLSTM:
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    loaded: PackedLSTM = torch.load(file, weights_only=False)
    return loaded


def from_state(packed: PackedLSTM) -> PackedLSTM:
    file = io.BytesIO()
    torch.save(packed.state_dict(), file)
    file.seek(0)
    sizes = packed.input_size, packed.hidden_size, packed.num_layers
    weight_dtype = packed.get_buffer("weight_l0").dtype
    other = PackedLSTM(nn.LSTM(*sizes, bidirectional=True), weight_dtype)
    other.load_state_dict(torch.load(file))
    return other


@EACH_DTYPE
@pytest.mark.parametrize(
    "again",
    [lambda layer: pickle.loads(pickle.dumps(layer)), copy.deepcopy, saved, from_state],
    ids=["pickle", "deepcopy", "save", "state_dict"],
)
def test_again(again: Callable[[PackedLSTM], PackedLSTM], dtype: torch.dtype) -> None:
    packed = PackedLSTM(nn.LSTM(I, H, 2, bidirectional=True), dtype)
    other, x = again(packed), sequence(packed)
    assert torch.equal(other(x)[0], packed(x)[0])
    said = f"PackedLSTM({I}, {H}, num_layers=2, bidirectional=True, weight_dtype={dtype})"
    assert repr(other) == repr(packed) == said
    packed.get_buffer("bias_l1_reverse").zero_()
    assert not torch.equal(other(x)[0], packed(x)[0])


def test_names_of_the_state() -> None:
    packed = PackedLSTM(nn.LSTM(I, H, 2, bidirectional=True), torch.int8)
    suffixes = ("_l0", "_l0_reverse", "_l1", "_l1_reverse")
    names = [f"{name}{s}" for s in suffixes for name in ("weight", "bias", "scale")]
    assert list(packed.state_dict()) == [*names, "_extra_state"]


def test_weights_of_another_format() -> None:
    packed = PackedLSTM(nn.LSTM(I, H))
    given = packed.state_dict()
    given["_extra_state"] += 1
    with pytest.raises(ValueError, match="expected weights packed in format 1, got format 2"):
        packed.load_state_dict(given)
    packed.format = 2
    with pytest.raises(RuntimeError, match="packed in format 2, but this lstmfused reads format 1"):
        packed(sequence(packed))


@EACH_DTYPE
def test_saved_for_another_instruction_set(dtype: torch.dtype, tmp_path: Any) -> None:
    packed = PackedLSTM(nn.LSTM(51, 51, 2), dtype)
    x = sequence(packed)
    torch.save((packed, x, packed(x)), tmp_path / "layer.pt")
    file = str(tmp_path / "layer.pt")
    assert run_python("-c", LOAD, file, ATEN_CPU_CAPABILITY="default").strip() == "default"


def test_initial_state() -> None:
    packed = PackedLSTM(nn.LSTM(I, H, 2, bidirectional=True))
    assert [t.shape for t in packed.initial_state()] == [(4, H)] * 2
    assert [t.shape for t in packed.initial_state(3)] == [(4, 3, H)] * 2
    x = sequence(packed)
    same(packed(x, packed.initial_state(B)), packed(x))


# --------------------------------------------------------------------------------------------------
# Ways in


@EACH_DTYPE
def test_opcheck(dtype: torch.dtype) -> None:
    packed = PackedLSTM(nn.LSTM(I, H), dtype)
    for steps, rows, masked in ((0, 3, False), (1, 0, False), (4, 1, True), (4, 3, False)):
        x, (h, c) = sequence(packed, steps, rows), (t[0] for t in state(packed, rows))
        mask = torch.randint(3, (steps, rows), dtype=torch.uint8) if masked else None
        given = arguments(packed, mask, steps == 4)
        for hx in ((h, c), (None, None)):
            torch.library.opcheck(LAYER.default, (x, *hx, *given))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@EACH_DTYPE
def test_compile(dtype: torch.dtype) -> None:
    packed = PackedLSTM(nn.LSTM(I, H, 2, bidirectional=True), dtype)
    compiled = torch.compile(packed, fullgraph=True, dynamic=True)
    for steps, rows in ((T, B), (7, 4)):
        x, hx = sequence(packed, steps, rows), state(packed, rows)
        for masked in masks(packed, steps, rows):
            same(compiled(x, hx, **masked), packed(x, hx, **masked))


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_raises() -> None:
    packed = PackedLSTM(nn.LSTM(I, H))
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="inconsistent input_size"):
        compiled(sequence(packed)[..., 1:], state(packed))
    with pytest.raises(Exception, match="computes no gradients"):
        compiled(sequence(packed).requires_grad_(), state(packed))


@EACH_DTYPE
def test_export(dtype: torch.dtype) -> None:
    packed = PackedLSTM(nn.LSTM(I, H, bidirectional=True), dtype)
    given = sequence(packed), state(packed)
    steps, rows = torch.export.Dim("steps", max=64), torch.export.Dim("rows", max=64)
    shapes = {0: steps, 1: rows}, ({1: rows}, {1: rows})
    program = torch.export.export(packed, given, dynamic_shapes=shapes)
    for shape in ((T, B), (7, 4)):
        x, hx = sequence(packed, *shape), state(packed, shape[1])
        same(program.module()(x, hx), packed(x, hx))
    core = torch.export.export(packed, given).run_decompositions(lstmfused.decompositions())
    called = [n.target for n in core.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert called and all(torch.Tag.core in op.tags for op in called)
    same(core.module()(*given), packed(*given))


@EACH_DTYPE
def test_script_and_trace(dtype: torch.dtype) -> None:
    packed = PackedLSTM(nn.LSTM(I, H, 2, bidirectional=True), dtype)
    x, hx = sequence(packed), state(packed)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(packed), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    for made in (scripted, torch.jit.freeze(scripted.eval()), fx.symbolic_trace(packed)):
        for masked in masks(packed):
            same(made(x, hx, **masked), packed(x, hx, **masked))
    traced = torch.jit.trace(packed, (x, hx))
    x, hx = sequence(packed, 2, 7), state(packed, 7)
    same(traced(x, hx), packed(x, hx))


def test_autocast() -> None:
    packed = PackedLSTM(nn.LSTM(I, H, 2))
    x = sequence(packed).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = packed(x)
    same(found, packed(x.float()))
    assert found[0].dtype == torch.float32


def test_flops() -> None:
    packed = PackedLSTM(nn.LSTM(I, H, bidirectional=True))
    with FlopCounterMode(display=False) as counter:
        packed(sequence(packed))
    assert counter.get_total_flops() == 2 * T * B * 2 * 4 * H * (I + H)
