"""LSTMCell in the place of nn.LSTMCell, and the swap of the cells of a model."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import HALF, PARAMETERS, cell, check_gradient, random_arguments, torch_cell
from torch import Tensor, nn

import lstmfused

I, H = 10, 20


def outputs(module: Any) -> Tensor:
    """(2, 5, H) of any cell of I inputs and H units"""
    x, h, c, *_ = random_arguments(5, I, H)
    return torch.stack(module(x, (h, c))).detach()


def assert_same(actual: Any, expected: Any) -> None:
    assert (outputs(actual) - outputs(expected)).abs().max() <= 2e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
def test_same_seed_gives_the_parameters_of_torch(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(7)
    expected = nn.LSTMCell(I, H, bias, dtype=dtype)
    torch.manual_seed(7)
    actual = lstmfused.LSTMCell(I, H, bias, dtype=dtype)
    assert isinstance(actual, nn.LSTMCell)
    assert (actual.input_size, actual.hidden_size, actual.bias) == (I, H, bias)
    assert list(actual.state_dict()) == list(expected.state_dict())
    for name, parameter in actual.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
        assert parameter.dtype == dtype
    actual.reset_parameters()
    assert not torch.equal(actual.weight_ih, expected.weight_ih)


@pytest.mark.parametrize("arguments", [(10, 20), (10, 20, False), (1, 1, True)], ids=str)
def test_repr(arguments: tuple[Any, ...]) -> None:
    assert repr(lstmfused.LSTMCell(*arguments)) == repr(nn.LSTMCell(*arguments))


def test_checkpoints_go_both_ways() -> None:
    stock, fused = nn.LSTMCell(I, H), lstmfused.LSTMCell(I, H)
    file = io.BytesIO()
    torch.save(stock.state_dict(), file)
    file.seek(0)
    fused.load_state_dict(torch.load(file), strict=True)
    assert_same(fused, stock)
    fused.reset_parameters()
    stock.load_state_dict(fused.state_dict(), strict=True)
    assert_same(fused, stock)


def through_pickle(module: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(module))
    return copied


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, through_pickle])
def test_copies(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    module = lstmfused.LSTMCell(I, H)
    other = duplicate(module)
    assert type(other) is lstmfused.LSTMCell
    assert torch.equal(outputs(other), outputs(module))


def test_to_another_dtype() -> None:
    module = lstmfused.LSTMCell(I, H)
    for dtype in (torch.float64, *HALF, torch.float32):
        assert module.to(dtype) is module
        for t in module(torch.randn(3, I, dtype=dtype)):
            assert t.dtype == dtype


def test_constructed_on_meta_and_filled_later() -> None:
    stock = nn.LSTMCell(I, H)
    module = lstmfused.LSTMCell(I, H, device="meta")
    assert module.weight_ih.is_meta
    h, c = module(torch.empty(3, I, device="meta"))
    assert (h.shape, c.shape, h.device.type) == ((3, H), (3, H), "meta")
    module.load_state_dict(stock.state_dict(), assign=True)
    assert_same(module, stock)
    skipped = nn.utils.skip_init(lstmfused.LSTMCell, I, H)
    skipped.load_state_dict(stock.state_dict())
    assert_same(skipped, stock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_initial_state(dtype: torch.dtype) -> None:
    module = lstmfused.LSTMCell(I, H, dtype=dtype)
    for batch_size, shape in ((3, (3, H)), (0, (0, H)), (None, (H,))):
        state = module.initial_state() if batch_size is None else module.initial_state(batch_size)
        x = torch.randn(*shape[:-1], I, dtype=dtype)
        for given, absent in zip(module(x, state), module(x), strict=True):
            assert torch.equal(given, absent)
        h, c = state
        for t in state:
            assert torch.equal(t, torch.zeros(shape, dtype=dtype))
            assert not t.requires_grad
        assert h.data_ptr() != c.data_ptr() or h.numel() == 0
    assert lstmfused.LSTMCell(I, H, device="meta").initial_state(2)[0].is_meta


def test_state_may_be_a_list_or_keyword() -> None:
    module = lstmfused.LSTMCell(I, H)
    x, h, c, *_ = random_arguments(5, I, H)
    expected = torch.stack(module(x, (h, c)))
    assert torch.equal(torch.stack(module(x, [h, c])), expected)
    assert torch.equal(torch.stack(module(input=x, hx=(h, c))), expected)


def edit_optimizer(module: nn.LSTMCell) -> None:
    torch.optim.SGD(module.parameters(), lr=0.5).step()


def edit_data(module: nn.LSTMCell) -> None:
    module.weight_hh.data.mul_(-1)
    module.weight_ih.data[3] = 2


def edit_numpy(module: nn.LSTMCell) -> None:
    module.weight_ih.detach().numpy()[:] *= -1


def edit_replace(module: nn.LSTMCell) -> None:
    module.weight_ih = nn.Parameter(torch.ones_like(module.weight_ih))


def edit_load(module: nn.LSTMCell) -> None:
    module.load_state_dict({k: -v for k, v in module.state_dict().items()})


@pytest.mark.parametrize("edit", [edit_optimizer, edit_data, edit_numpy, edit_replace, edit_load])
@pytest.mark.parametrize("B", [1, 5, 64])
def test_changed_weights_are_seen(B: int, edit: Callable[[nn.LSTMCell], None]) -> None:
    fused = lstmfused.LSTMCell(I, H)
    stock = nn.LSTMCell(I, H)
    stock.load_state_dict(fused.state_dict())
    x = torch.randn(B, I)
    for module in (fused, stock):
        torch.autograd.backward(torch.stack(module(x)).square().sum())
        for parameter in module.parameters():
            assert parameter.grad is not None
            parameter.grad.fill_(1)
    before = torch.stack(fused(x))
    for module in (fused, stock):
        edit(module)
    after = torch.stack(fused(x))
    assert (after - before).abs().max() > 1e-3
    assert (after - torch.stack(stock(x))).abs().max() <= 1e-5


def test_weight_norm() -> None:
    """The parametrized weight has its own parameters, and takes their gradients."""
    module = nn.utils.parametrizations.weight_norm(lstmfused.LSTMCell(I, H), "weight_hh")
    arguments = random_arguments(5, I, H)
    weights = {name: getattr(module, name) for name in PARAMETERS}
    h, _ = module(arguments.input, arguments.hx)
    expected, _ = torch_cell(arguments._replace(**weights))
    assert (h - expected).abs().max() <= 2e-6
    names = [name for name, _ in module.named_parameters()]
    assert "weight_hh" not in names
    parameters = list(module.parameters())
    found = torch.autograd.grad(h.square().sum(), parameters, retain_graph=True)
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    for name, actual, want in zip(names, found, wanted, strict=True):
        check_gradient(name, actual, want, "weight_norm")


def test_tied_weights() -> None:
    one, other = lstmfused.LSTMCell(H, H), lstmfused.LSTMCell(H, H)
    other.weight_hh = one.weight_hh
    h, c = one(torch.randn(3, H))
    torch.autograd.backward(other(h, (h, c))[0].sum())
    assert one.weight_hh.grad is other.weight_hh.grad
    assert len(list(nn.ModuleList([one, other]).parameters())) == 7


def test_functional_equals_module() -> None:
    module = lstmfused.LSTMCell(I, H)
    arguments = random_arguments(5, I, H)._replace(**dict(module.named_parameters()))
    assert torch.equal(torch.stack(cell(arguments)).detach(), outputs(module))
