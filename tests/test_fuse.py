"""fuse_ and unfuse_: the swap of the cells and layers of a model in place."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import run_python
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lstmfused
from lstmfused import fuse_, unfuse_

I, H = 10, 20
FUSED = (lstmfused.LSTMCell, lstmfused.LSTM)


class Decoder(nn.Module):
    """Two cells of which one is used twice, in containers, beside other layers, and a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTMCell(I, H)
        self.shared = nn.LSTMCell(H, H, bias=False)
        self.layers = nn.ModuleList([self.shared, nn.Linear(H, H), self.shared])
        self.named = nn.ModuleDict({"gru": nn.GRUCell(H, H), "lstm": nn.LSTM(H, H)})

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor
        h, c = self.first(x)
        for layer in self.layers:
            h, c = layer(h, (h, c)) if isinstance(layer, nn.LSTMCell) else (layer(h), c)
        h, _ = self.named["lstm"](h)
        return h


class OwnForward(nn.LSTMCell):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(input, hx)


def types(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_model_there_and_back() -> None:
    model = Decoder()
    before = types(model)
    parameters = dict(model.named_parameters())
    x = torch.randn(5, I)
    expected = model(x)
    assert fuse_(model) is model
    assert nn.LSTMCell not in types(model) and nn.LSTM not in types(model)
    assert types(model).count(lstmfused.LSTMCell) == 2
    assert types(model).count(lstmfused.LSTM) == 1
    assert model.layers[0] is model.layers[2] is model.shared
    assert (model(x) - expected).abs().max() <= 1e-5
    found = dict(model.named_parameters())
    assert found.keys() == parameters.keys()
    assert all(found[name] is parameters[name] for name in found)
    assert unfuse_(model) is model
    assert types(model) == before
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("swap", [fuse_, unfuse_])
def test_twice_is_once(swap: Callable[[nn.Module], nn.Module]) -> None:
    model = swap(Decoder())
    once = types(model)
    assert types(swap(model)) == once


def test_cell_itself() -> None:
    cell = nn.LSTMCell(I, H)
    weight = cell.weight_ih
    fused = fuse_(cell)
    assert type(fused) is lstmfused.LSTMCell
    assert fused.weight_ih is weight
    assert fused.initial_state(3)[0].shape == (3, H)
    assert type(unfuse_(fused)) is nn.LSTMCell


# --------------------------------------------------------------------------------------------------
# Cells that are no plain nn.LSTMCell


class Named(nn.LSTMCell):
    """Without a forward of its own: it computes what torch's cell computes."""

    def describe(self) -> str:
        return f"{super().extra_repr()}!"


class NamedLayer(nn.LSTM):
    pass


class OurNamed(lstmfused.LSTMCell):
    pass


class Seen(TorchDispatchMode):
    """The operators that are run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def runs_fused(cell: nn.Module) -> bool:
    with Seen() as seen, torch.no_grad():
        cell(torch.randn(3, I))
    return any(name.startswith("lstmfused.") for name in seen.names)


def outputs(cell: nn.Module, x: Tensor) -> Tensor:
    """Of a cell, or of a layer without a batch."""
    return torch.cat([t.flatten() for t in tree_leaves(cell(x))])


def check_swap(cell: Any) -> None:
    """There and back, with the same numbers and gradients."""
    before, parameters = type(cell), list(cell.parameters())
    x = torch.randn(3, I)
    cell.eval()  # a spectral norm would go on with its power iteration
    want = outputs(cell, x)
    wanted = torch.autograd.grad(want.square().sum(), parameters)
    assert not runs_fused(cell)
    assert fuse_(cell) is cell
    assert isinstance(cell, FUSED) and isinstance(cell, before.__bases__)
    assert type(cell).__name__ == before.__name__
    assert runs_fused(cell)
    assert list(map(id, cell.parameters())) == list(map(id, parameters))
    found = outputs(cell, x)
    assert (found - want).abs().max() <= 1e-6
    gradients = torch.autograd.grad(found.square().sum(), parameters)
    for actual, expected in zip(gradients, wanted, strict=True):
        assert (actual - expected).abs().max() <= 1e-5
    assert unfuse_(cell) is cell
    assert not runs_fused(cell)
    assert torch.equal(outputs(cell, x), want)


PARAMETRIZATIONS = pytest.mark.parametrize(
    "of",
    [parametrizations.weight_norm, parametrizations.orthogonal, parametrizations.spectral_norm],
    ids=["weight_norm", "orthogonal", "spectral_norm"],
)


@PARAMETRIZATIONS
@pytest.mark.parametrize("kind", [nn.LSTMCell, Named, nn.LSTM, NamedLayer])
def test_parametrized(kind: type[nn.Module], of: Callable[..., nn.Module]) -> None:
    cell = of(kind(I, H), "weight_hh_l0" if issubclass(kind, nn.LSTM) else "weight_hh")
    check_swap(cell)
    assert not isinstance(cell, FUSED)
    if isinstance(cell, nn.LSTM):
        return  # of which torch cannot copy a parametrized one
    other = copy.deepcopy(fuse_(cell))
    unfuse_(cell)
    assert runs_fused(other) and not runs_fused(cell)  # each has its own class


@PARAMETRIZATIONS
def test_parametrizations_come_and_go(of: Callable[..., nn.Module]) -> None:
    """torch's own bookkeeping still finds what it put into the class."""
    cell: Any = fuse_(of(nn.LSTMCell(I, H), "weight_hh").eval())  # no power iteration goes on
    weight = cell.weight_hh.detach()
    of(cell, "weight_ih")
    assert parametrize.type_before_parametrizations(cell) is lstmfused.LSTMCell
    for name in ("weight_hh", "weight_ih"):
        parametrize.remove_parametrizations(cell, name)
    assert type(cell) is lstmfused.LSTMCell
    assert (cell.weight_hh - weight).abs().max() <= 1e-6
    assert type(unfuse_(cell)) is nn.LSTMCell


def test_subclasses_without_a_forward() -> None:
    one, two = Named(I, H), Named(I, H)
    check_swap(one)
    check_swap(NamedLayer(I, H))
    assert type(one) is Named
    fuse_(nn.ModuleList([one, two]))
    assert isinstance(one, Named) and type(one) is type(two)
    assert one.describe() == f"{I}, {H}!"
    x = torch.randn(3, I)
    for other in (copy.deepcopy(one), copy.copy(one), pickle.loads(pickle.dumps(one))):
        assert type(other) is type(one)
        assert all(map(torch.equal, other(x), one(x)))
        assert type(unfuse_(other)) is Named
    ours = OurNamed(I, H)
    assert type(fuse_(ours)) is OurNamed and runs_fused(ours)
    assert not runs_fused(unfuse_(ours)) and isinstance(ours, OurNamed)
    assert not runs_fused(copy.deepcopy(ours))
    assert type(fuse_(ours)) is OurNamed and runs_fused(ours)


FULLY_SHARDED = """
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from test_fuse import Named, runs_fused
from lstmfused import fuse_, unfuse_

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = dist.init_device_mesh("cpu", (1,))
x = torch.randn(3, 10)
for kind in (nn.LSTMCell, Named):
    model = nn.ModuleList([kind(10, 20)])
    fully_shard(model[0], mesh=mesh)
    want = model[0](x)
    before = type(model[0])
    fuse_(model)
    assert isinstance(model[0], FSDPModule) and isinstance(model[0], kind), type(model[0])
    assert runs_fused(model[0])
    for actual, expected in zip(model[0](x), want, strict=True):
        torch.testing.assert_close(actual, expected)
    torch.cat(model[0](x)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    unfuse_(model)
    assert type(model[0]).__mro__[1:] == before.__mro__[1:] and not runs_fused(model[0])
dist.destroy_process_group()
print("swapped")
"""


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no torch.distributed with gloo",
)
def test_fully_sharded() -> None:
    assert run_python("-W", "ignore", "-c", FULLY_SHARDED).strip() == "swapped"


def test_subclasses_with_a_forward_are_left_alone() -> None:
    model = nn.ModuleList([OwnForward(I, H), nn.LSTMCell(I, H)])
    with pytest.warns(
        UserWarning, match=r"^left alone: 0 \(OwnForward has a forward of its own\)$"
    ):
        fuse_(model)
    assert types(model)[1:] == [OwnForward, lstmfused.LSTMCell]
    assert types(unfuse_(model))[1:] == [OwnForward, nn.LSTMCell]
    own = OwnForward(I, H)
    with pytest.warns(UserWarning, match="left alone: the model"):
        assert fuse_(own) is own


def test_our_subclasses_with_a_forward_are_left_alone() -> None:
    class Doubled(lstmfused.LSTMCell):
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            return super().forward(2 * input, hx)

    model = nn.ModuleList([Doubled(I, H)])
    assert types(fuse_(model))[1:] == [Doubled]
    with pytest.warns(UserWarning, match="left alone: 0 .Doubled has a forward"):
        assert types(unfuse_(model))[1:] == [Doubled]


@pytest.mark.parametrize("swap", [fuse_, unfuse_])
def test_a_forward_of_the_instance_is_left_alone(swap: Callable[[nn.Module], nn.Module]) -> None:
    """Such as hooks of accelerate put there: it has the old one inside."""
    model: Any = nn.ModuleDict({"cell": nn.LSTMCell(I, H)})
    if swap is unfuse_:
        fuse_(model)
    before, forward = type(model.cell), model.cell.forward
    model.cell.forward = lambda *given: tuple(2 * t for t in forward(*given))
    with pytest.warns(UserWarning, match="left alone: cell .its forward has been replaced"):
        swap(model)
    assert type(model.cell) is before
    del model.cell.forward
    swap(model)
    assert type(model.cell) is not before


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy() -> None:
    lazy = lstmfused.LazyLSTMCell(H)
    with pytest.warns(UserWarning, match="left alone: the model .it is lazy"):
        unfuse_(lazy)
    lazy(torch.randn(3, I))
    assert type(unfuse_(lazy)) is nn.LSTMCell


def test_everything_on_a_cell_is_kept() -> None:
    model = nn.Sequential(nn.LSTMCell(I, H)).eval()
    cell: Any = model[0]
    calls: list[str] = []
    cell.register_forward_hook(lambda *_: calls.append("forward"))
    cell.register_full_backward_hook(lambda *_: calls.append("backward"))
    cell.register_buffer("steps", torch.tensor(3))
    cell.note = "decoder"
    cell.weight_hh.requires_grad_(False)
    assert fuse_(model)[0].note == "decoder"
    assert not model[0].training
    assert not model[0].weight_hh.requires_grad
    assert model[0].steps == 3
    assert "0.steps" in model.state_dict()
    x = torch.randn(2, I, requires_grad=True)
    model(x)[0].sum().backward()
    assert calls == ["forward", "backward"]


def test_optimizer_goes_on() -> None:
    """An optimizer made before the swap trains the model after it, as if nothing had happened."""
    losses = []
    for swap in (unfuse_, fuse_):
        torch.manual_seed(5)
        model = Decoder().double()
        optimizer = torch.optim.Adam(model.parameters())
        swap(model)
        x = torch.randn(5, I, dtype=torch.float64)
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
