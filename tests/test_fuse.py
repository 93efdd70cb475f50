"""fuse and unfuse: the swap of the cells of a model in place."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lstmfused
from lstmfused import fuse, unfuse

I, H = 10, 20


class Decoder(nn.Module):
    """Two cells of which one is used twice, in containers, beside other layers."""

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
    assert fuse(model) is model
    assert nn.LSTMCell not in types(model)
    assert types(model).count(lstmfused.LSTMCell) == 2
    assert model.layers[0] is model.layers[2] is model.shared
    assert (model(x) - expected).abs().max() <= 1e-5
    found = dict(model.named_parameters())
    assert found.keys() == parameters.keys()
    assert all(found[name] is parameters[name] for name in found)
    assert unfuse(model) is model
    assert types(model) == before
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("swap", [fuse, unfuse])
def test_twice_is_once(swap: Callable[[nn.Module], nn.Module]) -> None:
    model = swap(Decoder())
    once = types(model)
    assert types(swap(model)) == once


def test_cell_itself() -> None:
    cell = nn.LSTMCell(I, H)
    weight = cell.weight_ih
    fused = fuse(cell)
    assert type(fused) is lstmfused.LSTMCell
    assert fused.weight_ih is weight
    assert fused.initial_state(3)[0].shape == (3, H)
    assert type(unfuse(fused)) is nn.LSTMCell


def test_subclasses_are_left_alone() -> None:
    model = nn.ModuleList([OwnForward(I, H), nn.LSTMCell(I, H)])
    assert types(fuse(model))[1:] == [OwnForward, lstmfused.LSTMCell]
    assert types(unfuse(model))[1:] == [OwnForward, nn.LSTMCell]


def test_everything_on_a_cell_is_kept() -> None:
    model = nn.Sequential(nn.LSTMCell(I, H)).eval()
    cell: Any = model[0]
    calls: list[str] = []
    cell.register_forward_hook(lambda *_: calls.append("forward"))
    cell.register_full_backward_hook(lambda *_: calls.append("backward"))
    cell.register_buffer("steps", torch.tensor(3))
    cell.note = "decoder"
    cell.weight_hh.requires_grad_(False)
    assert fuse(model)[0].note == "decoder"
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
    for swap in (unfuse, fuse):
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
