"""torch.func transforms and forward-mode AD against the float64 reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import Arguments, Cell, assert_close, cell, oracle, random_arguments, random_like
from torch import Tensor, func

import lstmfused

# torch's own forward mode compiles its decompositions with what it calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]*. is deprecated")

B, I, H = 4, 5, 7
WRAPPED = pytest.mark.parametrize("bias", [(True, True), (False, False)], ids=["bias", "no bias"])


def arguments_of(bias: tuple[bool, bool] = (True, True), rows: int | None = B) -> Arguments:
    return random_arguments(rows, I, H, torch.float64, bias=bias)


def flat(function: Cell, arguments: Arguments) -> Callable[..., Tensor]:
    """h and c in one tensor, as a function of the tensors that are there."""
    names = [name for name, t in arguments._asdict().items() if t is not None]

    def call(*tensors: Tensor) -> Tensor:
        given = arguments._replace(**dict(zip(names, tensors, strict=True)))
        return torch.cat(function(given), -1)

    return call


def agree(actual: object, expected: object, case: object) -> None:
    pairs = zip(
        torch.utils._pytree.tree_leaves(actual),
        torch.utils._pytree.tree_leaves(expected),
        strict=True,
    )
    for found, want in pairs:
        assert_close(found, want, 1e-12 * want.abs().clamp(min=1), case)


@WRAPPED
@pytest.mark.parametrize("rows", [None, 0, 1, B])
def test_grad(rows: int | None, bias: tuple[bool, bool]) -> None:
    arguments = arguments_of(bias, rows)
    tensors = arguments.present()
    every = tuple(range(len(tensors)))

    def gradient(function: Cell) -> Callable[..., tuple[Tensor, ...]]:
        call = flat(function, arguments)
        return func.grad(lambda *t: call(*t).square().sum(), argnums=every)

    agree(gradient(cell)(*tensors), gradient(oracle)(*tensors), rows)


@WRAPPED
@pytest.mark.parametrize("transform", [func.jacrev, func.jacfwd, func.hessian])
def test_jacobians(transform: Callable[..., Any], bias: tuple[bool, bool]) -> None:
    arguments = arguments_of(bias, 2)
    tensors = arguments.present()
    for k in range(len(tensors)):
        found, want = (transform(flat(f, arguments), argnums=k)(*tensors) for f in (cell, oracle))
        agree(found, want, k)


@WRAPPED
def test_jvp(bias: tuple[bool, bool]) -> None:
    arguments = arguments_of(bias)
    tensors = tuple(arguments.present())
    tangents = tuple(random_like(t, seed) for seed, t in enumerate(tensors))
    found, want = (func.jvp(flat(f, arguments), tensors, tangents) for f in (cell, oracle))
    agree(found, want, "jvp")


def test_dual_tensors() -> None:
    """Forward mode outside torch.func, one argument at a time."""
    arguments = arguments_of()
    for k, t in enumerate(arguments.present()):
        results = []
        for function in (cell, oracle):
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(t, random_like(t))
                outputs = function(arguments._replace(**{Arguments._fields[k]: dual}))
                unpacked = map(forward_ad.unpack_dual, outputs)
                results.append([part.clone() for pair in unpacked for part in pair])
        agree(results[0], results[1], k)


def test_forward_over_reverse() -> None:
    """A Hessian-vector product."""
    arguments = arguments_of()
    tensors = tuple(arguments.present())
    tangents = tuple(random_like(t, seed) for seed, t in enumerate(tensors))
    results = []
    for function in (cell, oracle):
        call = flat(function, arguments)
        gradient = func.grad(lambda *t, call=call: call(*t).square().sum(), tuple(range(7)))
        results.append(func.jvp(gradient, tensors, tangents))
    agree(results[0], results[1], "hessian-vector product")


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("name", Arguments._fields)
def test_vmap_over_one_argument(name: str, axis: int) -> None:
    for rows in (None, B):
        arguments = arguments_of(rows=rows)
        single = getattr(arguments, name)
        stacked = torch.stack([random_like(single, s) for s in range(3)], axis % (single.dim() + 1))

        def call(t: Tensor, arguments: Arguments = arguments) -> tuple[Tensor, Tensor]:
            return cell(arguments._replace(**{name: t}))

        found = func.vmap(call, in_dims=axis)(stacked)
        each = [oracle(arguments._replace(**{name: t})) for t in stacked.unbind(axis)]
        agree(found, tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (rows, axis))


def test_per_sample_gradients() -> None:
    arguments = arguments_of()
    weights = arguments[3:]

    def loss(function: Cell) -> Callable[..., Tensor]:
        def of(weights: tuple[Tensor, ...], x: Tensor, h: Tensor, c: Tensor) -> Tensor:
            return torch.cat(function(Arguments(x, h, c, *weights))).square().sum()

        return of

    in_dims = (None, 0, 0, 0)
    found = func.vmap(func.grad(loss(cell)), in_dims)(weights, *arguments[:3])
    for row in range(B):
        rows = (t[row] for t in arguments[:3] if t is not None)
        expected = func.grad(loss(oracle))(weights, *rows)
        agree([t[row] for t in found], expected, row)


def test_ensemble_of_modules() -> None:
    """Stacked parameters, as torch.func describes model ensembling."""
    members = [lstmfused.LSTMCell(I, H, dtype=torch.float64) for _ in range(3)]
    parameters, buffers = func.stack_module_state(members)
    x, h, c, *_ = arguments_of()

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor]
        outputs = func.functional_call(members[0], (parameters, buffers), (x, (h, c)))
        return outputs

    found = func.vmap(call)(parameters, buffers)
    for k, member in enumerate(members):
        agree([t[k] for t in found], [t.detach() for t in member(x, (h, c))], k)


def test_errors_are_the_same_inside_transforms() -> None:
    arguments = random_arguments(B, I + 1, H)._replace(weight_ih=torch.zeros(4 * H, I))
    with pytest.raises(RuntimeError, match=f"input_size: got {I + 1} expected {I}"):
        func.vmap(lambda x: cell(arguments._replace(input=x)))(torch.zeros(3, B, I + 1))
