"""Packed cells: packed weights of every dtype against float64, and what they refuse."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from cases import (
    LAYOUTS,
    Arguments,
    assert_close,
    check_output,
    oracle,
    random_arguments,
    run_python,
)
from test_errors import SAME_TEXT, SAME_TYPE, error_of
from test_fuse import Decoder, OwnForward, types
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.nn.utils import prune

import lstmfused
from lstmfused import PackedLSTMCell, pack

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]*. is deprecated"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.int8)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SIZES = (1, 2, 3, 20, 51, 130, 288)
BATCHES = (0, 1, 2, 5, 7, 64, 97)
I, H = 10, 20

# Another process, perhaps of another instruction set, computes with a cell that this one has saved.
LOAD = """
import sys, torch, lstmfused
cell, x, expected = torch.load(sys.argv[1], weights_only=False)
for actual, want in zip(cell(x), expected, strict=True):
    torch.testing.assert_close(actual, want, atol=1e-6, rtol=0)
print(lstmfused.build_info()["cpu kernel"])
"""


def made(
    arguments: Arguments, dtype: torch.dtype = torch.float32, cell: type[nn.LSTMCell] = nn.LSTMCell
) -> PackedLSTMCell:
    """A packed cell of the arguments' parameters."""
    weight_ih, weight_hh = arguments.weight_ih, arguments.weight_hh
    module = cell(weight_ih.shape[1], weight_hh.shape[1], bias=arguments.bias_ih is not None)
    named = {k: t for k, t in arguments._asdict().items() if "_" in k and t is not None}
    module.load_state_dict(named)
    return PackedLSTMCell(module, dtype)


def step_of_weights(arguments: Arguments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What PackedLSTMCell says of its weights: (4H, I + H) as they are rounded, and the largest
    error of each of them."""
    weight = torch.cat([arguments.weight_ih, arguments.weight_hh], 1)
    if dtype == torch.int8:
        scale = weight.abs().amax(1, keepdim=True) / 127
        rounded = (weight / scale.clamp(min=1e-30)).round().double() * scale.double()
        return rounded, (scale.double() / 2).expand_as(weight)
    rounded = weight.to(dtype).double()
    unit = {torch.float32: 0.0, torch.bfloat16: 2.0**-9}[dtype]
    return rounded, weight.double().abs() * unit


def check(
    arguments: Arguments, dtype: torch.dtype, case: object, batches: Sequence[int] = ()
) -> None:
    """Against float64 with the same rounded weights, and for any number of threads: as a whole or,
    with a state, in batches of so many first rows."""
    packed = made(arguments, dtype)
    rounded, _ = step_of_weights(arguments, dtype)
    wide = arguments.double()
    inputs = arguments.weight_ih.shape[1]
    expected = oracle(wide._replace(weight_ih=rounded[:, :inputs], weight_hh=rounded[:, inputs:]))
    for rows in map(slice, batches or (None,)):
        hx = arguments.hx and (arguments.hx[0][rows], arguments.hx[1][rows])
        torch.set_num_threads(1)
        outputs = packed(arguments.input[rows], hx)
        for name, actual, want in zip("hc", outputs, expected, strict=True):
            assert actual.dtype == torch.float32 and actual.is_contiguous(), (case, rows)
            check_output(name, actual, want[rows], (case, rows))
        torch.set_num_threads(2)
        for one, two in zip(outputs, packed(arguments.input[rows], hx), strict=True):
            assert torch.equal(one, two), (case, rows)


@EACH_DTYPE
@pytest.mark.parametrize("inputs", SIZES)
def test_every_size_and_batch(inputs: int, dtype: torch.dtype) -> None:
    for units in SIZES:
        case = inputs, units
        check(random_arguments(None, *case), dtype, case)
        check(random_arguments(max(BATCHES), *case), dtype, case, BATCHES)


@EACH_DTYPE
def test_every_width_of_the_last_block(dtype: torch.dtype) -> None:
    for units in range(1, 36):
        check(random_arguments(33, 5, units), dtype, units, (1, 2, 3, 4, 8, 13, 33))


@EACH_DTYPE
@pytest.mark.parametrize(
    ("inputs", "units", "batches"),
    [
        (512, 512, (1, 3, 33, 300)),
        (2600, 33, (1, 4, 9, 65)),
        (33, 1030, (1, 5, 70)),
        (2048, 1040, (1, 2, 3, 4, 9, 18)),  # weights that fit no cache
    ],
)
def test_large(inputs: int, units: int, batches: tuple[int, ...], dtype: torch.dtype) -> None:
    case = inputs, units
    check(random_arguments(max(batches), *case), dtype, case, batches)


@EACH_DTYPE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_form(layout: str, dtype: torch.dtype) -> None:
    forms = product((None, 0, 1, 5), (1, 20), (3, 51), (True, False), (True, False))
    for B, inputs, units, bias, state in forms:
        given = random_arguments(B, inputs, units, bias=(bias, bias), state=state)
        changed = {k: t for k, t in given._asdict().items() if t is not None and "_" not in k}
        changed = {name: LAYOUTS[layout](t) for name, t in changed.items()}
        check(given._replace(**changed), dtype, (B, inputs, units, bias, state))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_error_of_rounded_weights(dtype: torch.dtype) -> None:
    """The error of the weights, carried through the step, bounds that of the results."""
    for B, inputs, units in product((1, 7), (3, 51, 288), (20, 130)):
        arguments = random_arguments(B, inputs, units)
        wide, (_, error) = arguments.double(), step_of_weights(arguments, dtype)
        assert wide.h is not None and wide.c is not None
        sums = torch.cat([wide.input, wide.h], 1).abs() @ error.mT
        i, f, g, o = sums.chunk(4, 1)  # sigmoid is no steeper than 1/4, tanh than 1
        off_c = wide.c.abs() * f / 4 + i / 4 + g
        bounds = o / 4 + off_c, off_c
        outputs = made(arguments, dtype)(arguments.input, arguments.hx)
        for actual, want, bound in zip(outputs, oracle(wide), bounds, strict=True):
            assert_close(actual, want, bound + 1e-6 * want.abs().clamp(min=1), (B, inputs, units))
            assert (actual - want).abs().max() > 1e-6  # rounded they are


@EACH_DTYPE
def test_rows_are_alone(dtype: torch.dtype) -> None:
    """To the bit, whatever else is in the batch."""
    for inputs, units in ((2, 20), (51, 51), (130, 300), (700, 64), (2048, 1040)):
        arguments = random_arguments(64, inputs, units)
        packed = made(arguments, dtype)
        x, h, c = arguments[:3]
        assert h is not None and c is not None
        whole = packed(x, (h, c))
        for rows in (slice(0, 1), slice(5, 7), slice(3, 6), slice(10, 14), slice(60, 64)):
            part = packed(x[rows], (h[rows], c[rows]))
            assert all(torch.equal(p, w[rows]) for p, w in zip(part, whole, strict=True))
        x = x.index_fill(0, torch.tensor([3]), torch.nan)
        h = h.index_fill(0, torch.tensor([8]), torch.inf)
        spoilt = packed(x, (h, c))
        others = torch.ones(64, dtype=torch.bool).index_fill(0, torch.tensor([3, 8]), False)
        for s, w in zip(spoilt, whole, strict=True):
            assert torch.equal(s[others], w[others])
            assert s[3].isnan().all()


def test_batch_invariant_mode() -> None:
    arguments = random_arguments(5, I, H)
    packed = made(arguments)
    expected = packed(arguments.input)
    with lstmfused.batch_invariant():
        assert all(map(torch.equal, packed(arguments.input), expected))


def test_int8_extremes() -> None:
    arguments = random_arguments(3, I, H)
    zero = arguments._replace(
        weight_ih=torch.zeros_like(arguments.weight_ih),
        weight_hh=torch.zeros_like(arguments.weight_hh),
    )
    check(zero, torch.int8, "rows of zeros")
    tiny = arguments.map(lambda t: t * 1e-38)
    outputs = made(tiny, torch.int8)(tiny.input, tiny.hx)
    assert all(t.isfinite().all() for t in outputs)
    for bad in (torch.inf, torch.nan):
        with pytest.raises(ValueError, match="not finite"):
            made(arguments._replace(weight_hh=arguments.weight_hh.fill_(bad)), torch.int8)


# --------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("bad", SAME_TEXT)
def test_same_text_as_the_cell(bad: str) -> None:
    cell = lstmfused.LSTMCell(I, H)
    expected = error_of(cell, *SAME_TEXT[bad])
    for dtype in DTYPES:
        actual = error_of(PackedLSTMCell(cell, dtype), *SAME_TEXT[bad])
        assert type(actual) is type(expected)
        assert str(actual) == str(expected)


@pytest.mark.parametrize("bad", SAME_TYPE)
def test_same_type_as_torch(bad: str) -> None:
    cell = nn.LSTMCell(I, H)
    actual = error_of(PackedLSTMCell(cell), *SAME_TYPE[bad])
    assert isinstance(actual, type(error_of(cell, *SAME_TYPE[bad])))
    assert str(actual)


@pytest.mark.parametrize("convert", [nn.Module.double, nn.Module.half, nn.Module.bfloat16])
@EACH_DTYPE
def test_converted(dtype: torch.dtype, convert: Callable[[nn.Module], nn.Module]) -> None:
    """A dtype it was not made with is refused, also where the input has it, too."""
    packed = convert(PackedLSTMCell(nn.LSTMCell(I, H), dtype))
    for x in (torch.zeros(3, I), torch.zeros(3, I).type_as(packed.state_dict()["bias"])):
        with pytest.raises(RuntimeError, match="keeps the dtypes that it was made with"):
            packed(x)


def test_packed_tensors_of_other_shapes() -> None:
    b: Any = PackedLSTMCell(nn.LSTMCell(I, H), torch.int8)._buffers
    step, x = torch.ops.lstmfused.lstm_cell_packed, torch.zeros(3, I)
    step(x, None, None, b["weight"], b["bias"], b["scale"], I, H, 1)
    for name in b:
        for bad in (b[name][1:], b[name].unsqueeze(0), b[name].to("meta")):
            given = {**b, name: bad}
            with pytest.raises(RuntimeError):
                step(x, None, None, given["weight"], given["bias"], given["scale"], I, H, 1)
    for sizes in ((I, H + 4, 1), (I + 1, H, 1), (-1, H, 1), (I, -H, 1), (I, H, 2)):
        with pytest.raises(RuntimeError):
            step(x, None, None, b["weight"], b["bias"], b["scale"], *sizes)


def parametrized() -> nn.LSTMCell:
    cell = nn.LSTMCell(I, H)
    nn.utils.parametrizations.weight_norm(cell, "weight_hh")
    return cell


def pruned() -> nn.LSTMCell:
    cell = nn.LSTMCell(I, H)
    prune.l1_unstructured(cell, "weight_ih", 3)
    return cell


def hooked() -> nn.LSTMCell:
    cell = nn.LSTMCell(I, H)
    cell.register_forward_hook(lambda *_: None)
    return cell


def replaced() -> nn.LSTMCell:
    """As accelerate's hooks do it."""
    cell: Any = lstmfused.LSTMCell(I, H)
    forward = cell.forward
    cell.forward = lambda *given: tuple(2 * t for t in forward(*given))
    return cell  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "parametrized": (parametrized, "parametrization"),
    "pruned": (pruned, "parametrization"),
    "lazy": (lambda: lstmfused.LazyLSTMCell(H), "lazy"),
    "hooks": (hooked, "hooks"),
    "forward of its own": (replaced, "forward has been replaced"),
    "float64": (lambda: nn.LSTMCell(I, H).double(), "torch.float64"),
    "float16": (lambda: lstmfused.LSTMCell(I, H).half(), "torch.float16"),
    "other device": (lambda: nn.LSTMCell(I, H, device="meta"), "meta"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_cells_that_cannot_be_packed(kind: str) -> None:
    make, word = REFUSED[kind]
    cell: Any = make()
    with pytest.raises(ValueError, match=word):
        PackedLSTMCell(cell)
    with pytest.raises(ValueError, match=f"^inner.*{word}"):  # not left as it is without a word
        pack(nn.ModuleDict({"inner": cell}))


def test_wrong_arguments() -> None:
    for bad in (torch.float16, torch.float64, torch.uint8, "int8", None):
        with pytest.raises(ValueError, match="weight_dtype"):
            PackedLSTMCell(nn.LSTMCell(I, H), bad)  # type: ignore[arg-type]
    packed: Any = PackedLSTMCell(nn.LSTMCell(I, H))
    for other in (nn.GRUCell(I, H), nn.Linear(I, H), packed, None):
        with pytest.raises(TypeError, match="LSTMCell"):
            PackedLSTMCell(other)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------
# Inference alone


@pytest.mark.parametrize("name", ["input", "h", "c"])
def test_no_gradients(name: str) -> None:
    arguments = random_arguments(3, I, H)
    packed = made(arguments)
    expected = packed(arguments.input, arguments.hx)
    given: Tensor = getattr(arguments, name).clone().requires_grad_()
    trainable = arguments._replace(**{name: given})
    with pytest.raises(RuntimeError, match="computes no gradients"):
        packed(trainable.input, trainable.hx)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert all(map(torch.equal, packed(trainable.input, trainable.hx), expected))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(given.detach(), torch.ones_like(given))
        carried = arguments._replace(**{name: dual})
        with pytest.raises(RuntimeError, match="computes no gradients"):
            packed(carried.input, carried.hx)


def test_no_training() -> None:
    packed = PackedLSTMCell(nn.LSTMCell(I, H))
    assert not packed.training
    assert packed.eval() is packed
    assert not list(packed.parameters())
    model = nn.Sequential(packed, nn.Dropout())
    for module in (packed, model):
        assert module.train() is module
        assert not packed.training
    assert model.training and model[1].training
    assert not packed(torch.zeros(3, I))[0].requires_grad
    with pytest.raises(RuntimeError, match="computes no gradients"):
        packed(torch.zeros(3, I, requires_grad=True))


@EACH_DTYPE
def test_nothing_is_shared_with_the_cell(dtype: torch.dtype) -> None:
    """Training the cell does not reach what was packed before, and the other way round."""
    cell, x = lstmfused.LSTMCell(I, H), torch.randn(3, I)
    packed = PackedLSTMCell(cell, dtype)
    before = packed(x)
    optimizer = torch.optim.SGD(cell.parameters(), 0.5)
    torch.sum(cell(x)[0]).backward()
    optimizer.step()
    trained = cell(x)
    assert all(map(torch.equal, packed(x), before))
    again = PackedLSTMCell(cell, dtype)
    assert not torch.equal(again(x)[0], before[0])
    for buffer in again.buffers():
        buffer.zero_()
    assert all(map(torch.equal, cell(x), trained))


# --------------------------------------------------------------------------------------------------
# Modules


def saved(packed: PackedLSTMCell) -> PackedLSTMCell:
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    loaded: PackedLSTMCell = torch.load(file, weights_only=False)
    return loaded


def from_state(packed: PackedLSTMCell) -> PackedLSTMCell:
    file = io.BytesIO()
    torch.save(packed.state_dict(), file)
    file.seek(0)
    sizes = packed.input_size, packed.hidden_size
    other = PackedLSTMCell(nn.LSTMCell(*sizes), packed.weight.dtype)
    other.load_state_dict(torch.load(file))
    return other


def test_weights_of_another_format() -> None:
    packed = PackedLSTMCell(nn.LSTMCell(I, H))
    state = packed.state_dict()
    state["_extra_state"] += 1
    with pytest.raises(ValueError, match="expected weights packed in format 1, got format 2"):
        packed.load_state_dict(state)
    packed.format = 2  # as in a pickle of another version
    with pytest.raises(RuntimeError, match="packed in format 2, but this lstmfused reads format 1"):
        packed(torch.randn(3, I))


def test_names_of_earlier_versions() -> None:
    assert lstmfused.FrozenLSTMCell is PackedLSTMCell and lstmfused.freeze is pack
    assert lstmfused.fuse is lstmfused.fuse_ and lstmfused.unfuse is lstmfused.unfuse_


@EACH_DTYPE
@pytest.mark.parametrize(
    "again",
    [lambda cell: pickle.loads(pickle.dumps(cell)), copy.deepcopy, saved, from_state],
    ids=["pickle", "deepcopy", "save", "state_dict"],
)
def test_again(again: Callable[[PackedLSTMCell], PackedLSTMCell], dtype: torch.dtype) -> None:
    packed, x = PackedLSTMCell(nn.LSTMCell(I, H), dtype), torch.randn(3, I)
    other = again(packed)
    assert all(map(torch.equal, other(x), packed(x)))
    assert repr(other) == repr(packed) == f"PackedLSTMCell({I}, {H}, weight_dtype={dtype})"
    packed.bias.zero_()
    assert not torch.equal(other(x)[0], packed(x)[0])


@EACH_DTYPE
def test_saved_for_another_instruction_set(dtype: torch.dtype, tmp_path: Any) -> None:
    packed, x = PackedLSTMCell(nn.LSTMCell(51, 51), dtype), torch.randn(5, 51)
    torch.save((packed, x, packed(x)), tmp_path / "cell.pt")
    file = str(tmp_path / "cell.pt")
    assert run_python("-c", LOAD, file, ATEN_CPU_CAPABILITY="default").strip() == "default"


def test_initial_state() -> None:
    packed = PackedLSTMCell(nn.LSTMCell(I, H))
    for batch, shape in ((None, (H,)), (3, (3, H)), (0, (0, H))):
        assert [t.shape for t in packed.initial_state(batch)] == [shape, shape]
    x = torch.randn(3, I)
    assert all(map(torch.equal, packed(x, packed.initial_state(3)), packed(x)))


@pytest.mark.parametrize("fused", [False, True])
@EACH_DTYPE
def test_model(dtype: torch.dtype, fused: bool) -> None:
    model = lstmfused.fuse_(Decoder()) if fused else Decoder()
    before, state = types(model), {k: t.clone() for k, t in model.state_dict().items()}
    x = torch.randn(5, I)
    packed = pack(model, dtype)
    assert type(packed) is Decoder and packed is not model
    assert types(packed).count(PackedLSTMCell) == 2
    assert packed.layers[0] is packed.layers[2] is packed.shared
    assert not any(isinstance(m, nn.LSTMCell) for m in packed.modules())
    assert not any(m.training for m in packed.modules())
    assert all(m.training for m in model.modules())
    assert types(model) == before
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    with torch.no_grad():
        first, _ = packed.first(x)
    want, _ = model.first(x)
    assert (first - want).abs().max() <= {torch.float32: 1e-6}.get(dtype, 0.02)
    others = [p.data_ptr() for p in model.parameters()]
    assert not any(p.data_ptr() in others for p in packed.parameters())


def test_cell_itself_and_twice() -> None:
    cell = nn.LSTMCell(I, H)
    packed = pack(cell)
    assert type(packed) is PackedLSTMCell
    assert types(pack(nn.Sequential(packed))) == [nn.Sequential, PackedLSTMCell]


def test_subclasses_are_left_alone() -> None:
    model = nn.ModuleList([OwnForward(I, H), nn.LSTMCell(I, H)])
    with pytest.warns(UserWarning, match=r"^left as it is: 0 \(a subclass, OwnForward\)$"):
        assert types(pack(model))[1:] == [OwnForward, PackedLSTMCell]


# --------------------------------------------------------------------------------------------------
# The operator


@EACH_DTYPE
def test_opcheck(dtype: torch.dtype) -> None:
    for B, state in product((None, 0, 1, 3), (True, False)):
        arguments = random_arguments(B, I, H, state=state)
        b: Any = made(arguments, dtype)._buffers
        packed = b["weight"], b["bias"], b["scale"], I, H, 1
        torch.library.opcheck(
            torch.ops.lstmfused.lstm_cell_packed.default, (*arguments[:3], *packed)
        )


@EACH_DTYPE
def test_decomposition(dtype: torch.dtype) -> None:
    """In torch's own operators, from the packed weights, the same as by the kernel."""
    table, op = lstmfused.decompositions(), torch.ops.lstmfused.lstm_cell_packed.default
    for B, inputs, units in product((None, 0, 1, 5), (1, 3, 51), (1, 4, 7, 16, 20, 33)):
        for state in (True, False):
            arguments = random_arguments(B, inputs, units, state=state)
            b: Any = made(arguments, dtype)._buffers
            given = (*arguments[:3], b["weight"], b["bias"], b["scale"], inputs, units, 1)
            for name, found, want in zip("hc", table[op](*given), op(*given), strict=True):
                check_output(name, found, want.double(), (B, inputs, units, state))


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated")
@EACH_DTYPE
def test_core_aten(dtype: torch.dtype) -> None:
    packed, x = PackedLSTMCell(nn.LSTMCell(I, H), dtype), torch.randn(3, I)
    program = torch.export.export(packed, (x,))
    core = program.run_decompositions(lstmfused.decompositions())
    called = [n.target for n in core.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert called and all(torch.Tag.core in op.tags for op in called)
    for name, found, want in zip("hc", core.module()(x), packed(x), strict=True):
        check_output(name, found, want.double(), dtype)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@EACH_DTYPE
def test_compile(dtype: torch.dtype) -> None:
    counter = CompileCounterWithBackend("inductor")
    packed = PackedLSTMCell(nn.LSTMCell(I, H), dtype)
    compiled = torch.compile(packed, fullgraph=True, backend=counter)
    for B in (1, 7, 64):
        x, hx = torch.randn(B, I), packed.initial_state(B)
        assert all(map(torch.equal, compiled(x, hx), packed(x, hx)))
    assert counter.frame_count <= 2
    with pytest.raises(Exception, match="inconsistent input_size"):
        compiled(torch.randn(7, I + 1), packed.initial_state(7))
    with pytest.raises(Exception, match="computes no gradients"):
        compiled(torch.randn(7, I, requires_grad=True), packed.initial_state(7))


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated")
@EACH_DTYPE
def test_export(dtype: torch.dtype) -> None:
    packed = PackedLSTMCell(nn.LSTMCell(I, H), dtype)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    given = torch.randn(3, I), packed.initial_state(3)
    program = torch.export.export(packed, given, dynamic_shapes=(batch, (batch, batch)))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for B in (1, 2, 3, 17):
        x, hx = torch.randn(B, I), packed.initial_state(B)
        assert all(map(torch.equal, loaded(x, hx), packed(x, hx)))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(half: torch.dtype) -> None:
    """It computes in float32 as ever, and takes the half types that come from other layers."""
    arguments = random_arguments(3, I, H)
    packed = made(arguments)
    given = arguments._replace(input=arguments.input.to(half))
    with torch.autocast("cpu", half):
        outputs = packed(given.input, given.hx)
    assert all(map(torch.equal, outputs, packed(given.input.float(), given.hx)))
