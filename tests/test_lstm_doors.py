"""Ways in and out of a model that torch's layer passes, and some that it does not: torch.fx,
TorchScript, torch.compile, torch.export, ONNX, dynamic quantization, vmap, FLOP counters.

torch's own layer is the oracle, or the eager one, which other files test.
"""

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import check_output
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import lstmfused
from lstmfused.functional import lstm

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]*. is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:The TorchScript type system"),
    pytest.mark.filterwarnings("ignore:# The axis name"),
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX"),
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

T, B, I, H = 5, 3, 4, 6
LAYER = torch.ops.lstmfused.lstm_layer

OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.1},
    {"num_layers": 2, "bias": False},
]
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS, ids=str)


class Tagger(nn.Module):
    """A layer, from a state or none, and a head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = nn.LSTM(I, H, **options)
        self.head = nn.Linear(H * (1 + self.layer.bidirectional), 2)

    def forward(
        self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, (h, c) = self.layer(x, hx)
        return self.head(output), h, c


class Stated(nn.Module):
    """As is easiest for TorchScript: both states apart."""

    def __init__(self, tagger: nn.Module) -> None:
        super().__init__()
        self.tagger = tagger

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor, Tensor] = self.tagger(x, (h, c))
        return outputs


class Episodes(nn.Module):
    """A layer with everything that torch's has not."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = lstmfused.LSTM(I, H, **options)

    def forward(self, x: Tensor, reset: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        output, (h, _) = self.layer(x, reset=reset, lengths=lengths)
        return output, h


def pair(**options: Any) -> tuple[Any, Any]:
    """A model of torch's layer, and a fused one of the same weights."""
    plain = Tagger(**options).eval()
    return plain, lstmfused.fuse_(copy.deepcopy(plain))


def inputs(model: Any, steps: int = T, rows: int = B, state: bool = True) -> tuple[Any, ...]:
    layer = model.layer
    x = torch.randn(*((rows, steps) if layer.batch_first else (steps, rows)), I)
    states = layer.num_layers * (1 + layer.bidirectional)
    hx = torch.rand(states, rows, H), torch.randn(states, rows, H)
    return (x, hx) if state else (x,)


def masks(model: Any, steps: int = T, rows: int = B) -> tuple[Tensor, Tensor, Tensor]:
    (x,) = inputs(model, steps, rows, state=False)
    return x, torch.rand(x.shape[:2]) < 0.3, torch.randint(0, steps + 1, (rows,))


def check(found: Any, plain: nn.Module, given: tuple[Any, ...], case: object = None) -> None:
    wanted = copy.deepcopy(plain).double()(*tree_map(Tensor.double, given))
    for actual, want in zip(tree_leaves(found), wanted, strict=True):
        check_output("h", actual, want, case)


def same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(tree_leaves(found), tree_leaves(wanted), rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# torch.fx and TorchScript


@EVERY_OPTION
def test_symbolic_trace(options: dict[str, Any]) -> None:
    """One call of the whole layer, as there is of torch's; the traced model trains the same."""
    _, fused = pair(**options)
    for kept in ({}, {"hx": None}):
        traced = fx.symbolic_trace(fused, concrete_args=kept)
        targets = [n.target for n in traced.graph.nodes if n.op == "call_function"]
        assert targets.count(lstm) == 1
        for steps, rows in ((T, B), (1, 1)):
            given = inputs(fused, steps, rows, state=not kept)
            same(traced(*given, *([None] if kept else [])), fused(*given))
    given = inputs(fused)
    traced(*given[:1], None)[0].sum().backward()
    assert all(p.grad is not None for p in fused.parameters())
    alone = fx.symbolic_trace(fused.layer)
    same(alone(*given), fused.layer(*given))
    same(alone(given[0]), fused.layer(given[0]))
    episodes = Episodes(**options)
    masked = masks(episodes.eval())
    same(fx.symbolic_trace(episodes)(*masked), episodes(*masked))


def script(module: nn.Module) -> Any:
    return torch.jit.script(module)


def through_a_file(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module), file)
    file.seek(0)
    return torch.jit.load(file)


def frozen(module: nn.Module) -> Any:
    return torch.jit.freeze(torch.jit.script(module.eval()))


@EVERY_OPTION
@pytest.mark.parametrize("way", [script, through_a_file, frozen])
def test_script(options: dict[str, Any], way: Callable[[nn.Module], Any]) -> None:
    plain, fused = pair(**options)
    scripted = way(fused)
    assert "lstmfused::lstm_layer" in str(scripted.inlined_graph)
    for steps, rows in ((T, B), (1, 1), (2, 5)):
        for state in (True, False):
            given = inputs(fused, steps, rows, state)
            for _ in range(2):  # the second time, optimized
                check(scripted(*given), plain, given, (steps, rows, state))
    episodes = Episodes(**options).eval()
    given = masks(episodes)
    same(way(episodes)(*given), episodes(*given))


def test_script_trains_and_raises_what_eager_raises() -> None:
    _, fused = pair()
    scripted, (x,) = torch.jit.script(fused), inputs(fused, state=False)
    wanted = torch.autograd.grad(fused(x)[0].sum(), list(fused.layer.parameters()))
    found = torch.autograd.grad(scripted(x)[0].sum(), list(fused.layer.parameters()))
    same(found, wanted)
    with pytest.raises(torch.jit.Error, match=r"Expected hidden\[0\] size"):
        scripted(x, (torch.zeros(2, B, H), torch.zeros(2, B, H)))
    with pytest.raises(torch.jit.Error, match="2D or 3D, got 4D"):
        torch.jit.script(fused.layer)(x[None])


def test_script_of_the_function_and_of_projections() -> None:
    _, fused = pair()
    x, hx = inputs(fused)
    params = [p.detach() for p in fused.layer.parameters()]
    same(torch.jit.script(lstm)(x, hx, params), lstm(x, hx, params))
    layer = lstmfused.LSTM(I, H, proj_size=2)
    same(torch.jit.script(layer)(x), layer(x))


@EVERY_OPTION
def test_jit_trace(options: dict[str, Any]) -> None:
    plain, fused = pair(**options)
    traced = torch.jit.trace(fused, inputs(fused))
    for steps, rows in ((T, B), (2, 5)):
        given = inputs(fused, steps, rows)
        check(traced(*given), plain, given, (steps, rows))
    episodes = Episodes(**options).eval()
    given = masks(episodes)
    traced = torch.jit.trace(episodes, given)
    given = masks(episodes, 2, 7)
    same(traced(*given), episodes(*given))


# --------------------------------------------------------------------------------------------------
# torch.compile and torch.export


@EVERY_OPTION
def test_compile(options: dict[str, Any]) -> None:
    """One graph for every number of steps and rows, forward and backward."""
    from torch._dynamo.testing import CompileCounterWithBackend  # which takes a while

    _, fused = pair(**options)
    episodes = Episodes(**options).eval()
    make: Any = CompileCounterWithBackend
    counter = make("aot_eager")
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend=counter)
    for steps, rows in ((T, B), (7, 4), (3, 2)):
        given = inputs(fused, steps, rows)
        results = []
        for model in (fused, compiled):
            outputs = model(*given)
            loss = torch.stack([t.square().sum() for t in outputs]).sum()
            results.append((outputs, torch.autograd.grad(loss, list(fused.parameters()))))
        torch.testing.assert_close(results[1], results[0])
    assert counter.frame_count == 1
    compiled = torch.compile(episodes, fullgraph=True, dynamic=True, backend=counter)
    for steps, rows in ((T, B), (7, 4), (3, 2)):
        given = masks(episodes, steps, rows)
        same(compiled(*given), episodes(*given))
    assert counter.frame_count == 2


def test_compile_by_inductor() -> None:
    episodes = Episodes(bidirectional=True)
    given = masks(episodes)
    same(torch.compile(episodes, fullgraph=True)(*given), episodes(*given))


def test_compile_of_projections() -> None:
    """Which torch's layer computes, or its operators; in batch-invariant mode nobody does."""
    layer = lstmfused.LSTM(I, H, 2, proj_size=2)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, reset, lengths = torch.randn(T, B, I), torch.rand(T, B) < 0.3, torch.tensor([1, T, 0])
    for masked in ({}, {"reset": reset}, {"lengths": lengths}):
        same(compiled(x, **masked), layer(x, **masked))
    with lstmfused.batch_invariant(), pytest.raises(Exception, match="no batch-invariant kernels"):
        compiled(x)
    same(compiled(x), layer(x))


def test_compile_leaves_torchs_own_layer_alone() -> None:
    plain, _ = pair()
    compiled: Any = torch.compile(plain, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="RNN, GRU, or LSTM"):
        compiled(*inputs(plain))
    assert not torch._dynamo.config.allow_rnn


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compile_of_packed_sequences() -> None:
    layer = lstmfused.LSTM(I, H, bidirectional=True)
    packed = pack_sequence([torch.randn(n, I) for n in (4, 2, 2)])
    found, want = torch.compile(layer, backend="eager")(packed), layer(packed)
    same((found[0].data, found[1]), (want[0].data, want[1]))


@EVERY_OPTION
@pytest.mark.parametrize("strict", [True, False])
def test_export(options: dict[str, Any], strict: bool) -> None:
    plain, fused = pair(**options)
    steps, rows = torch.export.Dim("steps", max=64), torch.export.Dim("rows", max=64)
    first, second = (rows, steps) if fused.layer.batch_first else (steps, rows)
    of_x, of_hx = {0: first, 1: second}, {1: rows}
    program = torch.export.export(
        fused, inputs(fused), dynamic_shapes=(of_x, (of_hx, of_hx)), strict=strict
    )
    assert LAYER.default in {node.target for node in program.graph.nodes}
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for made in (program, torch.export.load(file)):
        for shape in ((T, B), (7, 4), (2, 5)):
            given = inputs(fused, *shape)
            check(made.module()(*given), plain, given, shape)
    episodes = Episodes(**options).eval()
    program = torch.export.export(
        episodes, masks(episodes), dynamic_shapes=(of_x, of_x, {0: rows}), strict=strict
    )
    for shape in ((T, B), (7, 4), (2, 5)):
        masked = masks(episodes, *shape)
        same(program.module()(*masked), episodes(*masked))


def test_core_aten() -> None:
    """On request nothing but torch's own core operators are left, of as many steps as exported."""
    episodes = Episodes(num_layers=2, bidirectional=True).eval()
    given = masks(episodes)
    program = torch.export.export(episodes, given)
    core = program.run_decompositions(lstmfused.decompositions())
    assert not [n for n in core.graph.nodes if "lstmfused" in str(n.target)]
    same(core.module()(*given), episodes(*given))


# --------------------------------------------------------------------------------------------------
# ONNX


def runtime(path: Path, given: tuple[Any, ...]) -> list[Tensor]:
    onnx: Any = pytest.importorskip("onnx")
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    onnx.checker.check_model(path)
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    arrays = [t.numpy() for t in tree_leaves(given)]
    outputs = session.run(None, dict(zip(names, arrays, strict=True)))
    return [torch.from_numpy(output) for output in outputs]


@EVERY_OPTION
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("opset", [11, 18])
def test_onnx_by_torchscript(
    opset: int, state: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    """ONNX's own layer, of any number of steps and rows, traced or scripted."""
    plain, fused = pair(**options)
    names, path = ["x", "h", "c"][: 3 if state else 1], tmp_path / "layer.onnx"
    axes = {"x": {0: "first", 1: "second"}, "h": {1: "rows"}, "c": {1: "rows"}}
    for model in (Stated(fused), torch.jit.script(Stated(fused))) if state else (fused,):
        torch.onnx.export(
            model,
            tuple(tree_leaves(inputs(fused, state=state))),
            path,
            dynamo=False,
            opset_version=opset,
            input_names=names,
            dynamic_axes={name: axes[name] for name in names},
        )
        for shape in ((T, B), (2, 5)):
            given = inputs(fused, *shape, state=state)
            check(runtime(path, given), plain, given, shape)


def test_onnx_by_torchscript_has_no_masks(tmp_path: Path) -> None:
    episodes = Episodes().eval()
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="no resets or lengths"):
        torch.onnx.export(episodes, masks(episodes), tmp_path / "layer.onnx", dynamo=False)


def test_onnx_by_dynamo(tmp_path: Path) -> None:
    """Step by step, of as many steps as exported."""
    pytest.importorskip("onnxscript")
    episodes, path = Episodes(bidirectional=True).eval(), tmp_path / "layer.onnx"
    rows = torch.export.Dim("rows", max=64)
    shapes = ({1: rows}, {1: rows}, {0: rows})
    torch.onnx.export(
        episodes, masks(episodes), path, dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    given = masks(episodes, T, 7)
    same(runtime(path, given), episodes(*given))


# --------------------------------------------------------------------------------------------------
# Dynamic quantization, vmap, FLOP counters


@pytest.fixture
def engine() -> Iterator[None]:
    if not set(torch.backends.quantized.supported_engines) - {"none"}:
        pytest.skip("this torch has no engine for quantized operators on this processor")
    yield


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16], ids=str)
def test_quantize_dynamic(dtype: torch.dtype) -> None:
    """By default, by torch's layer, by ours and by name: torch's quantized layer."""
    quantize: Any = torch.ao.quantization.quantize_dynamic
    plain, fused = pair(num_layers=2, bidirectional=True)
    given = inputs(fused)
    want = quantize(plain, dtype=dtype)(*given)
    for spec in (None, {nn.LSTM, nn.Linear}, {lstmfused.LSTM, nn.Linear}, {"layer", "head"}):
        made = quantize(fused, spec, dtype=dtype)
        assert type(made.layer) is torch.ao.nn.quantized.dynamic.LSTM
        assert all(map(torch.equal, made(*given), want)), spec
        assert type(fused.layer) is lstmfused.LSTM
    assert type(quantize(fused, {nn.Linear}, dtype=dtype).layer) is lstmfused.LSTM


@pytest.mark.parametrize("over", ["sequences", "weights"])
def test_vmap(over: str) -> None:
    layer = lstmfused.LSTM(I, H, bidirectional=True)
    x, reset, lengths = torch.randn(B, T, I), torch.rand(B, T) < 0.3, torch.tensor([T, 0, 2])
    params = [torch.stack([p.detach(), 2 * p.detach(), -p.detach()]) for p in layer.parameters()]

    def call(x: Tensor, reset: Tensor, lengths: Tensor, params: list[Tensor]) -> Any:
        return lstm(x, None, params, bidirectional=True, reset=reset, lengths=lengths)

    stacked = 0 if over == "weights" else None
    weights = params if over == "weights" else [p[0] for p in params]
    found = torch.vmap(call, (0, 0, 0, stacked))(x, reset, lengths, weights)
    for b in range(B):
        of_row = [p[b] for p in params] if over == "weights" else weights
        want = call(x[b], reset[b], lengths[b], of_row)
        same(tree_map(lambda t, b=b: t[b], found), want)


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@EVERY_OPTION
@pytest.mark.parametrize("trained", ["everything", "parameters", "input"])
def test_flops(trained: str, options: dict[str, Any]) -> None:
    """Forward and backward, as torch's layer counts in float64, where it is made of products."""
    counts = []
    for model in pair(**options):
        model.double().requires_grad_(trained != "input")
        x, hx = tree_map(Tensor.double, inputs(model))
        x.requires_grad_(trained != "parameters")
        for t in hx:
            t.requires_grad_(trained == "everything")
        total = torch.stack([t.sum() for t in model.layer(x, hx)[1]]).sum()

        def forward(model: Any = model, given: Any = (x, hx)) -> Any:
            return model.layer(*given)

        counts.append([flops(forward), flops(total.backward)])
    assert counts[1] == counts[0]
    assert min(counts[0]) > 0


# --------------------------------------------------------------------------------------------------
# Errors


def wrong(call: str, layer: Any, x: Tensor, hx: tuple[Tensor, Tensor]) -> Any:
    h, c = hx
    return {
        "features": lambda: layer(x[..., 1:]),
        "no steps": lambda: layer(x[0, 0]),
        "four dimensions": lambda: layer(x[None]),
        "dtype": lambda: layer(x.double()),
        "rows of the state": lambda: layer(x, (h[:, 1:], c[:, 1:])),
        "layers of h": lambda: layer(x, (h[1:], c)),
        "units of c": lambda: layer(x, (h, c[..., 1:])),
        "a state without rows": lambda: layer(x, (h[:, 0], c[:, 0])),
        "a state with rows": lambda: layer(x[:, 0], (h, c)),
    }[call]()


@pytest.mark.parametrize("options", [*OPTIONS, {"proj_size": 2}], ids=str)
@pytest.mark.parametrize(
    "call",
    [
        "features",
        "no steps",
        "four dimensions",
        "dtype",
        "rows of the state",
        "layers of h",
        "units of c",
        "a state without rows",
        "a state with rows",
    ],
)
def test_errors_are_torchs(call: str, options: dict[str, Any]) -> None:
    words = []
    for kind in (nn.LSTM, lstmfused.LSTM):
        layer = kind(I, H, **options)
        x, _ = inputs(Tagger(**options))
        states = layer.num_layers * (1 + layer.bidirectional)
        hx = torch.zeros(states, B, layer.proj_size or H), torch.zeros(states, B, H)
        with pytest.raises((RuntimeError, ValueError)) as raised:
            wrong(call, layer, x, hx)
        words.append((raised.type, str(raised.value)))
    assert words[0] == words[1]


def test_states_that_are_no_pair() -> None:
    layer, x = lstmfused.LSTM(I, H), torch.randn(T, B, I)
    h, c = layer.initial_state(B)
    bad: list[tuple[Any, type[Exception], str]] = [
        (h, TypeError, r"must be a pair \(h, c\) of Tensors, .* not one Tensor of shape"),
        ((h, None), TypeError, "not of Tensor and NoneType"),
        ((h, c, c), RuntimeError, "expects two hidden states"),
    ]
    for hx, error, words in bad:
        with pytest.raises(error, match=words):
            layer(x, hx)
    same(layer(x, [h, c]), layer(x, (h, c)))


def test_a_wrong_number_of_parameters() -> None:
    params, x = [p.detach() for p in lstmfused.LSTM(I, H).parameters()], torch.randn(T, B, I)
    with pytest.raises(RuntimeError, match="incorrect number of RNN parameters"):
        lstm(x, None, params[:3])


def test_batch_invariant() -> None:
    """Stepping by the cell and running the layer agree to the bit, whatever the batch."""
    layer = lstmfused.LSTM(I, H)
    x, cell = torch.randn(T, B, I), layer.cell()
    with lstmfused.batch_invariant(), torch.no_grad():
        output, _ = layer(x)
        state = cell.initial_state(B)
        for t in range(T):
            state = cell(x[t], state)
            assert torch.equal(output[t], state[0])
        assert torch.equal(layer(x[:, :1])[0], output[:, :1])
        others: list[dict[str, Any]] = [{"dtype": torch.complex64}, {"proj_size": 2}]
        for options in others:
            with pytest.raises(NotImplementedError, match="no batch-invariant kernels"):
                lstmfused.LSTM(I, H, **options)(x.to(options.get("dtype", x.dtype)))


def test_autocast() -> None:
    """As the cell: everything in the half type, but c in float32."""
    layer = lstmfused.LSTM(I, H, 2, bidirectional=True)
    x = torch.randn(T, B, I)
    want = layer(x)
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            output, (h, c) = layer(given, layer.initial_state(B))
        assert (output.dtype, h.dtype, c.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        assert (output - want[0]).abs().max() <= 0.02
