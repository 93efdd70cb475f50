"""torch.func transforms and forward-mode AD against the float64 reference."""

from collections.abc import Callable
from itertools import combinations, product
from typing import Any, Literal

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import Arguments, Cell, assert_close, cell, oracle, random_arguments, random_like
from torch import Tensor, func
from torch.fx.experimental.proxy_tensor import make_fx

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


@WRAPPED
def test_gradcheck(bias: tuple[bool, bool]) -> None:
    """Every argument, in reverse and forward mode, batched by vmap, and over each other."""
    for rows in (None, 2):
        arguments = random_arguments(rows, 3, 4, torch.float64, bias=bias).trainable()
        call, tensors = flat(cell, arguments), arguments.present()
        assert torch.autograd.gradcheck(
            call,
            tensors,
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
        )
        assert torch.autograd.gradgradcheck(
            call, tensors, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
        )


# What torch's own linearize says of every constant of a function.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_linearize() -> None:
    arguments = arguments_of()
    tensors = tuple(arguments.present())
    tangents = tuple(random_like(t, seed) for seed, t in enumerate(tensors))
    output, linear = func.linearize(flat(cell, arguments), *tensors)
    found = (output, linear(*tangents))
    agree(found, func.jvp(flat(oracle, arguments), tensors, tangents), "linearize")


def test_vjp() -> None:
    arguments = arguments_of()
    tensors = arguments.present()
    found, pullback = func.vjp(flat(cell, arguments), *tensors)[:2]
    want, expected = func.vjp(flat(oracle, arguments), *tensors)[:2]
    agree((found, pullback(random_like(found))), (want, expected(random_like(want))), "vjp")


STACKED = [names for n in (1, 2, 3, 4) for names in combinations(("x", "hc", "weights", "bias"), n)]


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
@pytest.mark.parametrize("stacked", STACKED, ids="-".join)
def test_vmap_over_any_arguments(stacked: tuple[str, ...], randomness: str) -> None:
    """Each subset of the arguments, at changing axes; with a batch, state, biases or without."""
    V = 3
    groups = {"x": (0,), "hc": (1, 2), "weights": (3, 4), "bias": (5, 6)}
    positions = {k for name in stacked for k in groups[name]}
    for rows, state, bias in product((None, 1, B), (True, False), (True, False)):
        many = [
            random_arguments(rows, I, H, torch.float64, state=state, bias=(bias, bias), seed=seed)
            for seed in range(V)
        ]
        mapped = [k for k in sorted(positions) if many[0][k] is not None]
        if not mapped:
            continue
        axes = [k % (getattr(many[0], Arguments._fields[k]).dim() + 1) for k in mapped]
        tensors = [
            torch.stack([a[k] for a in many], axis)  # type: ignore[misc]
            for k, axis in zip(mapped, axes, strict=True)
        ]
        each = [
            many[0]._replace(**{Arguments._fields[k]: a[k] for k in mapped})  # type: ignore[arg-type]
            for a in many
        ]

        def call(*given: Tensor, rest: Arguments = many[0], at: list[int] = mapped) -> Any:
            return cell(
                rest._replace(**{Arguments._fields[k]: t for k, t in zip(at, given, strict=True)})
            )

        found = func.vmap(call, in_dims=tuple(axes), randomness=randomness)(*tensors)
        expected = tuple(torch.stack(parts) for parts in zip(*map(oracle, each), strict=True))
        agree(found, expected, (rows, state, bias))


def test_nested_vmap() -> None:
    """Steps times members of an ensemble, and a stack of stacks of inputs."""
    _, h, c, *rest = arguments_of()
    weights = [w for w in rest if w is not None]
    xs, members = torch.randn(2, 5, B, I).double(), [torch.stack([w, -w, 2 * w]) for w in weights]

    def one(x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return cell(Arguments(x, h, c, *weights))

    over_inputs = func.vmap(func.vmap(one, (0, *[None] * 4)), (0, *[None] * 4))(xs, *weights)
    both = func.vmap(func.vmap(one, (None, *[0] * 4)), (1, *[None] * 4))(
        xs[0].movedim(0, 1), *members
    )
    for i, k in product(range(2), range(5)):
        agree([t[i, k] for t in over_inputs], oracle(Arguments(xs[i, k], h, c, *weights)), (i, k))
    for k, m in product(range(5), range(3)):
        of_member = Arguments(xs[0, k], h, c, *(w[m] for w in members))
        agree([t[k, m] for t in both], oracle(of_member), (k, m))


@pytest.mark.parametrize("rows", [None, 0, B])
def test_vmap_over_rows_runs_the_fused_kernel(rows: int | None) -> None:
    """Bit by bit what one call on the joined batch gives, in float32; and so are its gradients."""
    arguments = random_arguments(rows, I, H).trainable()
    x, h, c, *weights = arguments
    xs, hs, cs = (torch.stack([t, t / 2, -t]).detach() for t in (x, h, c) if t is not None)

    def call(*rows: Tensor) -> tuple[Tensor, Tensor]:
        return cell(Arguments(*rows, *weights))

    found = func.vmap(call)(xs, hs, cs)
    joined = call(*(t.reshape(-1, t.shape[-1]) for t in (xs, hs, cs)))
    for actual, want in zip(found, joined, strict=True):
        assert torch.equal(actual.reshape(want.shape), want)
    grads = [
        torch.autograd.grad(torch.cat(outputs, -1).square().sum(), weights)  # type: ignore[arg-type]
        for outputs in (found, joined)
    ]
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("V", [0, 1])
def test_vmap_over_none_and_one(V: int) -> None:
    arguments = arguments_of()
    xs = torch.randn(V, B, I).double()
    for given in (arguments, arguments._replace(h=None, c=None)):
        h, c = func.vmap(lambda x, given=given: cell(given._replace(input=x)))(xs)
        assert h.shape == c.shape == (V, B, H)
    weights = arguments.weight_hh.expand(V, -1, -1)
    h, _ = func.vmap(lambda w: cell(arguments._replace(weight_hh=w)))(weights)
    assert h.shape == (V, B, H)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_vmap_under_autocast(dtype: torch.dtype) -> None:
    """As without vmap: all arguments are rounded, also where their dtypes differ."""
    arguments = random_arguments(B, I, H)
    arguments = arguments._replace(h=arguments.h.to(dtype))  # type: ignore[union-attr]
    for name in ("input", "weight_hh"):
        stacked = torch.stack([getattr(arguments, name)] * 2)
        with torch.autocast("cpu", dtype):
            want = cell(arguments)
            found = func.vmap(lambda t, name=name: cell(arguments._replace(**{name: t})))(stacked)
        for actual, expected in zip(found, want, strict=True):
            assert actual.dtype == expected.dtype
            bound = 4 * torch.finfo(dtype).eps * expected.double().abs().clamp(min=1)
            assert_close(actual[1], expected, bound, name)


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
    arguments = random_arguments(B, I, H)
    wrong = f"Input batch size {B + 1} doesn't match hidden0 batch size {B}"
    with pytest.raises(RuntimeError, match=wrong):
        func.vmap(lambda x: cell(arguments._replace(input=x)))(torch.zeros(3, B + 1, I))
    with pytest.raises(RuntimeError, match="For batched 2-D input, hx and cx should also be 2-D"):
        func.vmap(lambda h, c: cell(arguments._replace(h=h, c=c)))(*torch.zeros(2, B, H))
    with pytest.raises(RuntimeError, match="expected weight_hh of shape"):
        func.vmap(lambda w: cell(arguments._replace(weight_hh=w)))(torch.zeros(3, H, H))


Function = Callable[..., Any]
X, HX, CX, W_IH, W_HH, B_IH, B_HH = EVERY = tuple(range(7))
TANGENTS = tuple(random_like(t, 10 + k) for k, t in enumerate(arguments_of().present()))
INPUTS = torch.stack([random_like(arguments_of().input, s) for s in range(3)])


def loss_of(step: Function) -> Function:
    return lambda *t: step(*t).sin().square().sum()


def grad_of(step: Function, *positions: int) -> Function:
    return func.grad(loss_of(step), positions or EVERY)


def total_of(function: Function) -> Function:
    return lambda *t: torch.stack(
        [part.sin().sum() for part in torch.utils._pytree.tree_leaves(function(*t))]
    ).sum()


def jvp_of(function: Function, *positions: int) -> Function:
    """The tangents of a function, in a direction of all its arguments or some."""

    def tangents(*t: Tensor) -> Any:
        chosen = positions or EVERY

        def of(*some: Tensor) -> Any:
            given = list(t)
            for k, value in zip(chosen, some, strict=True):
                given[k] = value
            return function(*given)

        return func.jvp(of, tuple(t[k] for k in chosen), tuple(TANGENTS[k] for k in chosen))[1]

    return tangents


def over_inputs(function: Function) -> Function:
    """Of several inputs at once, with the rest of the arguments for all of them."""
    mapped = func.vmap(function, (0, *[None] * 6))
    return lambda _, *rest: mapped(INPUTS, *rest)


def learned(step: Function) -> Function:
    """The loss after a step of learning, of several tasks: MAML."""

    def task(x: Tensor, *rest: Tensor) -> Tensor:
        gradients = grad_of(step, *EVERY[1:])(x, *rest)
        moved = [t - 0.1 * g for t, g in zip(rest, gradients, strict=True)]
        return loss_of(step)(x, *moved)  # type: ignore[no-any-return]

    return lambda *t: over_inputs(task)(*t)


COMPOSITIONS: dict[str, Callable[[Function], Function]] = {
    "grad of grad": lambda f: func.grad(total_of(grad_of(f)), EVERY),
    "grad of grad of grad": lambda f: func.grad(
        total_of(func.grad(total_of(grad_of(f)), EVERY)), EVERY
    ),
    "jvp of grad": lambda f: jvp_of(grad_of(f)),
    "grad of jvp": lambda f: func.grad(total_of(jvp_of(f)), EVERY),
    "jvp of jvp": lambda f: jvp_of(jvp_of(f)),
    "jvp of grad of grad": lambda f: jvp_of(func.grad(total_of(grad_of(f)), EVERY)),
    "grad of jvp of grad": lambda f: func.grad(total_of(jvp_of(grad_of(f))), EVERY),
    "jvp of jvp of grad": lambda f: jvp_of(jvp_of(grad_of(f))),
    "vmap of grad": lambda f: over_inputs(grad_of(f)),
    "grad of vmap": lambda f: func.grad(total_of(over_inputs(f)), EVERY[1:]),
    "grad of vmap of grad": lambda f: func.grad(total_of(over_inputs(grad_of(f))), EVERY[1:]),
    "jvp of vmap of grad": lambda f: jvp_of(over_inputs(grad_of(f)), *EVERY[1:]),
    "vmap of jvp": lambda f: over_inputs(jvp_of(f, *EVERY[1:])),
    "grad of vmap of jvp": lambda f: func.grad(
        total_of(over_inputs(jvp_of(f, W_HH, CX))), EVERY[1:]
    ),
    "vmap of vmap of grad": lambda f: over_inputs(over_inputs(grad_of(f))),
    "grad of vmap of what grad has learned": lambda f: func.grad(total_of(learned(f)), EVERY[1:]),
}


def by(k: int, *transforms: Any) -> Callable[[Function], Function]:
    """Derivatives of a loss by one argument, one transform after the other."""

    def of(step: Function) -> Function:
        function = loss_of(step)
        for transform in transforms:
            function = transform(function, argnums=k)
        return function

    return of


for k, argument in enumerate(Arguments._fields):
    COMPOSITIONS[f"jacrev of jacrev by {argument}"] = by(k, func.jacrev, func.jacrev)
    COMPOSITIONS[f"jacrev of jacfwd by {argument}"] = by(k, func.jacfwd, func.jacrev)
    COMPOSITIONS[f"hessian by {argument}"] = by(k, func.hessian)


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_compositions(composition: str) -> None:
    arguments = arguments_of()
    compose = COMPOSITIONS[composition]
    found, want = (compose(flat(f, arguments))(*arguments.present()) for f in (cell, oracle))
    agree(found, want, composition)


@pytest.mark.parametrize("composition", ["grad", "jvp", "vmap of grad", "grad of vmap"])
def test_parameters_that_require_gradients_outside(composition: str) -> None:
    """What a transform gives is differentiable with respect to what it was given, too."""
    results = []
    for function in (cell, oracle):
        arguments = arguments_of().trainable()
        step = flat(function, arguments)
        compose = {"grad": grad_of, "jvp": jvp_of, **COMPOSITIONS}[composition]
        total = total_of(compose(step))(*arguments.present())
        results.append(torch.autograd.grad(total, arguments.present(), allow_unused=True))
    given = [k for k, t in enumerate(results[1]) if t is not None]
    found, want = ([result[k] for k in given] for result in results)
    agree(found, want, composition)


@pytest.mark.parametrize("create_graph", [False, True])
def test_dual_gradients(create_graph: bool) -> None:
    """A forward derivative of backward, in what comes in."""
    results = []
    for function in (cell, oracle):
        arguments = arguments_of().trainable()
        outputs = function(arguments)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t.detach(), t.detach().cos()) for t in outputs]
            grads = torch.autograd.grad(
                outputs, arguments.present(), duals, create_graph=create_graph
            )
            results.append([forward_ad.unpack_dual(t).tangent.clone() for t in grads])
    agree(results[0], results[1], "dual gradients")


def test_reverse_over_forward() -> None:
    """Outside torch.func: of the arguments and of their tangents, or of the tangents alone."""
    for train in (True, False):
        results = []
        for function in (cell, oracle):
            start = arguments_of()
            given = start.trainable() if train else start
            tangents = [t.clone().requires_grad_() for t in TANGENTS]
            with forward_ad.dual_level():
                duals = map(forward_ad.make_dual, given.present(), tangents)
                outputs = function(Arguments(*duals))
                parts = [forward_ad.unpack_dual(t).tangent for t in outputs]
                total = torch.cat(parts).sin().sum()
            leaves = [*given.present(), *tangents] if train else tangents
            results.append(torch.autograd.grad(total, leaves))
        agree(results[0], results[1], train)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_traced_transforms(tracing_mode: Literal["real", "fake", "symbolic"]) -> None:
    """A graph of first and second derivatives holds for other numbers, and other batches."""
    arguments = arguments_of()
    composed = [grad_of, COMPOSITIONS["grad of grad"]]
    if tracing_mode == "real":  # torch's forward mode takes no constants but fake ones beside fakes
        composed += [jvp_of, COMPOSITIONS["jvp of grad"]]
    for compose in composed:
        step = compose(flat(cell, arguments))
        graph = make_fx(step, tracing_mode=tracing_mode)(*arguments.present())
        rows = arguments_of(rows=B + 2 if tracing_mode == "symbolic" else B)
        others = [t * 1.1 for t in rows.present()]
        agree(graph(*others), compose(flat(oracle, rows))(*others), tracing_mode)


def test_traced_penalty() -> None:
    def penalty(function: Cell) -> Callable[..., list[Tensor]]:
        def of(*given: Tensor) -> list[Tensor]:
            h, c = function(Arguments(*given))
            total = (h * c).square().sum()
            first = torch.autograd.grad(total, given, create_graph=True)
            return list(torch.autograd.grad([t.sin().sum() for t in first], given))

        return of

    arguments = arguments_of().trainable()
    graph = make_fx(penalty(cell))(*arguments.present())
    others = [t.detach() * 1.1 for t in arguments.present()]
    expected = penalty(oracle)(*(t.clone().requires_grad_() for t in others))
    agree(graph(*others), expected, "penalty")
