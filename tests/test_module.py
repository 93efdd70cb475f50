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
from torch.nn.utils import prune

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


def of_parametrization(module: nn.Module, of: Callable[..., nn.Module]) -> None:
    """Outputs and gradients of a cell with other things in its parameters' places."""
    arguments = random_arguments(5, I, H)
    h, _ = of(module, "weight_hh").eval()(arguments.input, arguments.hx)
    weights = {name: getattr(module, name) for name in PARAMETERS}
    expected, _ = torch_cell(arguments._replace(**weights))
    assert (h - expected).abs().max() <= 2e-6
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad(h.square().sum(), list(parameters.values()), retain_graph=True)
    wanted = torch.autograd.grad(expected.square().sum(), list(parameters.values()))
    for name, actual, want in zip(parameters, found, wanted, strict=True):
        check_gradient(name, actual, want, of)


@pytest.mark.parametrize(
    "of",
    [nn.utils.parametrizations.orthogonal, nn.utils.parametrizations.spectral_norm],
    ids=["orthogonal", "spectral_norm"],
)
def test_parametrizations(of: Callable[..., nn.Module]) -> None:
    of_parametrization(lstmfused.LSTMCell(I, H), of)


def test_pruning() -> None:
    def pruned(module: nn.Module, name: str) -> nn.Module:
        prune.l1_unstructured(module, name, amount=0.3)
        return module

    module = lstmfused.LSTMCell(I, H)
    of_parametrization(module, pruned)
    assert (module.weight_hh == 0).sum() == round(0.3 * module.weight_hh.numel())
    before = outputs(module)
    prune.remove(module, "weight_hh")
    assert (module.weight_hh == 0).sum() == round(0.3 * module.weight_hh.numel())
    assert torch.equal(outputs(module), before)


@pytest.mark.parametrize("frozen", [(name,) for name in PARAMETERS] + [PARAMETERS[1:]], ids=str)
def test_frozen_parameters(frozen: tuple[str, ...]) -> None:
    module, stock = lstmfused.LSTMCell(I, H), nn.LSTMCell(I, H)
    stock.load_state_dict(module.state_dict())
    x = torch.randn(5, I)
    for cells in (module, stock):
        for name in frozen:
            cells.get_parameter(name).requires_grad_(False)
        torch.autograd.backward(torch.stack(cells(x)).square().sum())
    for name, parameter in module.named_parameters():
        want = stock.get_parameter(name).grad
        if name in frozen:
            assert parameter.grad is None and want is None
        else:
            assert parameter.grad is not None and want is not None
            check_gradient(name, parameter.grad, want.double(), frozen)


LAZY = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")


@LAZY
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, I), (I,), (0, I)], ids=str)
def test_lazy(shape: tuple[int, ...], bias: bool) -> None:
    """The first input says its size; from then on it is an LSTMCell made with that size."""
    lazy = lstmfused.LazyLSTMCell(H, bias, dtype=torch.float64)
    assert all(isinstance(p, nn.UninitializedParameter) for p in lazy.parameters())
    assert "LazyLSTMCell(" in repr(lazy)
    x = torch.randn(shape, dtype=torch.float64)
    torch.manual_seed(7)
    found = lazy(x)
    torch.manual_seed(7)
    expected = lstmfused.LSTMCell(I, H, bias, dtype=torch.float64)
    assert type(lazy) is lstmfused.LSTMCell
    assert repr(lazy) == repr(expected)
    assert list(lazy.state_dict()) == list(expected.state_dict())
    for actual, want in zip(found, expected(x), strict=True):
        assert torch.equal(actual, want)
    with pytest.raises(RuntimeError, match=f"input_size: got {I + 1} expected {I}"):
        lazy(torch.randn(5, I + 1, dtype=torch.float64))


@LAZY
def test_lazy_takes_its_size_from_a_checkpoint() -> None:
    stock = nn.LSTMCell(I, H)
    lazy = lstmfused.LazyLSTMCell(H)
    lazy.load_state_dict(stock.state_dict())
    assert_same(lazy, stock)
    assert type(lazy) is lstmfused.LSTMCell
    assert lazy.input_size == I
    wrong = lstmfused.LazyLSTMCell(H)
    wrong.load_state_dict(stock.state_dict())
    with pytest.raises(RuntimeError, match=f"input_size: got {I + 1} expected {I}"):
        wrong(torch.randn(5, I + 1))


@LAZY
def test_lazy_inside_a_model() -> None:
    model = nn.ModuleList([lstmfused.LazyLSTMCell(H), lstmfused.LazyLSTMCell(3)])
    copied = copy.deepcopy(model)
    for cells in (model, copied):
        h = torch.randn(5, I)
        for module in cells:
            h, _ = module(h)
        assert [m.input_size for m in cells] == [I, H]
    assert lstmfused.LazyLSTMCell(H, device="meta")(torch.randn(2, I, device="meta"))[0].is_meta


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


class Halved(nn.Module):
    """As Pyro's PyroModule: a parameter is replaced where it is read."""

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        return value * 0.5 if name.startswith("weight") else value


class Intercepted(nn.Module):
    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return value * 0.5 if name == "bias_hh" else value


def put_in_instance(module: nn.LSTMCell) -> None:
    module.__dict__["weight_hh"] = module.weight_hh.detach() * 0.5


def put_in_place(module: nn.LSTMCell) -> None:
    weight = module.weight_hh.detach()
    del module.weight_hh
    module.weight_hh = weight * 0.5


def put_in_buffers(module: nn.LSTMCell) -> None:
    weight = module.weight_ih.detach()
    del module.weight_ih
    module.register_buffer("weight_ih", weight * 0.5)


def put_in_class(module: nn.LSTMCell) -> None:
    kind = type(module)
    half = property(lambda self: self._parameters["weight_ih"] * 0.5)
    module.__class__ = type(kind.__name__, (kind,), {"weight_ih": half})


@pytest.mark.parametrize("mixin", [None, Halved, Intercepted])
@pytest.mark.parametrize("put", [None, put_in_instance, put_in_place, put_in_buffers, put_in_class])
def test_parameters_are_read_as_torch_reads_them(mixin: Any, put: Any) -> None:
    results = []
    for kind in (nn.LSTMCell, lstmfused.LSTMCell):
        base = kind if mixin is None else type("Mixed", (kind, mixin), {})
        torch.manual_seed(0)
        module = base(I, H)
        if put is not None:
            put(module)
        x, h, c, *_ = random_arguments(5, I, H)
        outputs = torch.stack(module(x, (h, c)))
        trained = [p for p in module.parameters() if p.requires_grad]
        grads = torch.autograd.grad(outputs.sum(), trained, allow_unused=True)
        results.append((outputs, grads))
    torch.testing.assert_close(results[1], results[0])
