"""What the tests share: random arguments, memory layouts, the tolerance table and comparisons.

B is the batch, I the input size, H the number of units.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lstmfused
from lstmfused import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

# Absolute error allowed per unit of max(1, |reference|), for outputs and for gradients. Half types
# accumulate in float32, so they have the same error and on top of it the rounding of results.
ERROR = {
    torch.float32: 1e-6,
    torch.float64: 1e-14,
    torch.bfloat16: 1e-6,
    torch.float16: 1e-6,
}
# Roundings to a half type that a result may have seen, each at most eps / 2 of its value: c its
# own, h also that of c (relative error shrinks in tanh), a gradient also that of the saved gates.
ROUNDINGS = {"c": 1, "h": 2, "gradient": 2}


class Arguments(NamedTuple):
    """The arguments of a cell in torch's order, shaped (B, I), (B, H), (B, H), (4H, I), ..."""

    input: Tensor
    h: Tensor | None
    c: Tensor | None
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None

    @property
    def hx(self) -> tuple[Tensor, Tensor] | None:
        return None if self.h is None or self.c is None else (self.h, self.c)

    def map(self, function: Callable[[Tensor], Tensor]) -> Arguments:
        return Arguments(*(None if t is None else function(t) for t in self))  # type: ignore[arg-type]

    def double(self) -> Arguments:
        return self.map(lambda t: t.detach().double())

    def trainable(self) -> Arguments:
        return self.map(lambda t: t.detach().requires_grad_())

    def present(self) -> list[Tensor]:
        return [t for t in self if t is not None]


Cell = Callable[[Arguments], tuple[Tensor, Tensor]]
BuildOnce = Callable[[str, Callable[[Path], None]], Path]  # conftest.build_once

# For a C++ compiler. The address sanitizer notices the use of a pointer that is null, beyond its
# object or has overflowed; the other one's checks of these take a third of the compilation.
SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,object-size,pointer-overflow",
    "-fno-sanitize-recover=all",
)


def random_arguments(
    B: int | None,
    I: int,
    H: int,
    dtype: torch.dtype = torch.float32,
    *,
    state: bool = True,
    bias: Sequence[bool] = (True, True),
    seed: int = 0,
) -> Arguments:
    """Arguments of the size that trained cells see; without a batch dimension where B is None.

    Weights are uniform as torch initialises them, h lies in (-1, 1) as every h does.
    """
    generator = torch.Generator().manual_seed(seed + 7919 * (I + 31 * H))
    rows = () if B is None else (B,)
    scale = 1 / math.sqrt(max(I, H, 1))

    def uniform(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64).uniform_(-1, 1, generator=generator)

    arguments = Arguments(
        torch.randn(*rows, I, generator=generator),
        uniform(*rows, H) if state else None,
        torch.randn(*rows, H, generator=generator) if state else None,
        uniform(4 * H, I) * scale,
        uniform(4 * H, H) * scale,
        uniform(4 * H) * scale if bias[0] else None,
        uniform(4 * H) * scale if bias[1] else None,
    )
    return arguments.map(lambda t: t.to(dtype))


def random_like(t: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(t.shape, generator=generator).to(t.dtype)


def sliced(t: Tensor) -> Tensor:
    """Every second element of a larger tensor, starting at an odd offset."""
    larger = t.new_full([2 * n + 3 for n in t.shape], math.nan)
    view: Tensor = larger[tuple(slice(1, 2 * n + 1, 2) for n in t.shape)]
    return view.copy_(t)


def expanded_columns(t: Tensor) -> Tensor:
    """The first column stands for all, smaller since the sum over equal terms does not cancel."""
    smaller = t[..., :1] / math.sqrt(max(1, t.shape[-1]))
    return smaller.expand(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() == 2 else t,
    "expanded_rows": lambda t: t[:1].expand(t.shape),
    "expanded_columns": expanded_columns,
    "sliced": sliced,
}


def cell(arguments: Arguments) -> tuple[Tensor, Tensor]:
    return lstmfused.functional.lstm_cell(arguments.input, arguments.hx, *arguments[3:])


def oracle(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """The reference in the dtype of its arguments: give it float64."""
    return reference.lstm_cell(arguments.input, arguments.hx, *arguments[3:])


def torch_cell(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """nn.LSTMCell with these weights; a missing bias is zero there."""
    _, _, _, weight_ih, weight_hh, bias_ih, bias_hh = arguments
    zeros = weight_ih.new_zeros(weight_ih.shape[0])
    module = nn.LSTMCell(weight_ih.shape[1], weight_hh.shape[1], device="meta")
    parameters = {
        "weight_ih": weight_ih,
        "weight_hh": weight_hh,
        "bias_ih": zeros if bias_ih is None else bias_ih,
        "bias_hh": zeros if bias_hh is None else bias_hh,
    }
    outputs: tuple[Tensor, Tensor]
    outputs = torch.func.functional_call(module, parameters, (arguments.input, arguments.hx))
    return outputs


def assert_close(actual: Tensor, expected: Tensor, bound: Tensor, case: object) -> None:
    """|actual - expected| <= bound elementwise, with NaN and infinities in the same places."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"{case}: {actual.shape} is not {expected.shape}"
    error = (actual - expected).abs()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    good = same | (expected.isfinite() & (error <= bound))
    if not good.all():
        at = tuple((~good).nonzero()[0].tolist())
        bad = int((~good).sum())
        raise AssertionError(
            f"{case}: {bad} of {good.numel()} wrong, first at {at}: {actual[at]:.9g} is not "
            f"{expected[at]:.9g} within {bound.expand_as(good)[at]:.1e}"
        )


def check_output(name: str, actual: Tensor, expected: Tensor, case: object) -> None:
    """`name` is "h" or "c"; each element is held to the table on its own."""
    dtype = actual.dtype
    rounding = ROUNDINGS[name] * torch.finfo(dtype).eps / 2 if dtype in HALF else 0.0
    size = expected.detach().double().abs()
    assert_close(actual, expected, ERROR[dtype] * size.clamp(min=1) + rounding * size, (name, case))


def check_gradient(
    name: str, actual: Tensor, expected: Tensor, case: object, rows: int = 1
) -> None:
    """A gradient is a sum of terms that cancel: its error is held to its largest element.

    That of a parameter adds up `rows` terms of about a half each, of which every one is made from
    rounded gates: where the terms happen to cancel in all elements, their roundings still do not.
    """
    dtype = actual.dtype
    rounding = ROUNDINGS["gradient"] * torch.finfo(dtype).eps / 2 if dtype in HALF else 0.0
    size = expected.detach().double().abs()
    largest = torch.cat([size.flatten(), size.new_ones(1)]).max()
    bound = ERROR[dtype] * largest + rounding * largest.clamp(min=math.sqrt(rows) / 2)
    assert_close(actual, expected, bound, (name, case))


def check_forward(
    arguments: Arguments,
    case: object,
    function: Cell = cell,
    check: Callable[[str, Tensor, Tensor, object], None] = check_output,
) -> None:
    """h and c of `function`, each by `check`, against the float64 reference."""
    expected = oracle(arguments.double())
    for name, actual, want in zip("hc", function(arguments), expected, strict=True):
        assert actual.dtype == arguments.input.dtype, case
        assert actual.device == arguments.input.device, case
        assert actual.is_contiguous(), case
        check(name, actual, want, case)


def gradients(
    function: Cell,
    arguments: Arguments,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
) -> dict[str, Tensor]:
    """Gradients by name of all arguments; None leaves that output out of the loss."""
    arguments = arguments.trainable()
    pairs = zip(function(arguments), (grad_h, grad_c), strict=True)
    used = [(output, grad) for output, grad in pairs if grad is not None]
    outputs, grads = zip(*used, strict=True)
    named = {name: t for name, t in arguments._asdict().items() if t is not None}
    found = torch.autograd.grad(
        outputs, list(named.values()), grads, allow_unused=True, materialize_grads=True
    )
    return dict(zip(named, found, strict=True))


def check_gradients(arguments: Arguments, case: object, use: str = "hc", seed: int = 1) -> None:
    """Gradients of h (where `use` has "h") and c against the float64 reference."""
    shape = oracle(arguments.double())[0].to(arguments.input.dtype)
    grad_h = random_like(shape, seed) if "h" in use else None
    grad_c = random_like(shape, seed + 1) if "c" in use else None
    actual = gradients(cell, arguments, grad_h, grad_c)
    wide = [None if g is None else g.double() for g in (grad_h, grad_c)]
    expected = gradients(oracle, arguments.double(), *wide)
    for name, want in expected.items():
        assert actual[name].dtype == arguments.input.dtype, case
        rows = len(shape) if shape.dim() == 2 and name in PARAMETERS else 1
        check_gradient(name, actual[name], want, case, rows)


def run_python(*command: str, timeout: float = 300, **environment: str) -> str:
    """Runs python in a process of its own, which sees the same packages and this folder."""
    paths = [str(Path(lstmfused.__file__).parents[1]), str(Path(__file__).parent)]
    inherited = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
    path = os.pathsep.join([*paths, *filter(None, [inherited.get("PYTHONPATH")])])
    env: dict[str, Any] = {**inherited, "PYTHONPATH": path, **environment}
    done = subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def activated_gates(arguments: Arguments) -> Tensor:
    """(B, 4H) in order i, f, g, o"""
    x, h, _, weight_ih, weight_hh, bias_ih, bias_hh = arguments
    assert h is not None
    gates = x @ weight_ih.mT + h @ weight_hh.mT
    for bias in (bias_ih, bias_hh):
        gates = gates if bias is None else gates + bias
    i, f, g, o = gates.chunk(4, 1)
    return torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], 1)


def flat(arguments: Arguments) -> tuple[Callable[..., tuple[Tensor, Tensor]], list[Tensor]]:
    """The cell as a function of the tensors that are there, and these tensors."""
    names = [name for name, t in arguments._asdict().items() if t is not None]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return cell(arguments._replace(**dict(zip(names, tensors, strict=True))))

    return function, arguments.trainable().present()


def check_autocast_gradients(
    arguments: Arguments, device: str, dtype: torch.dtype, least: float = 1
) -> None:
    """Float32 arguments get gradients in float32. All arguments are rounded, too: as many roundings
    again as the gradient's own, relative to its largest element, or to `least`."""
    arguments = arguments.trainable()
    with torch.autocast(device, dtype):
        h, c = cell(arguments)
        mixed, _ = cell(arguments._replace(h=h, c=c))  # float32 input, state of the half type
    torch.autograd.backward([t.float().sum() for t in (h, c, mixed)])
    wide = arguments.double().trainable()
    h, c = oracle(wide)
    torch.autograd.backward([t.sum() for t in (h, c, oracle(wide._replace(h=h, c=c))[0])])
    for name, t in arguments._asdict().items():
        assert t.grad.dtype == torch.float32
        want = getattr(wide, name).grad
        bound = 4 * torch.finfo(dtype).eps * want.abs().max().clamp(min=least)
        assert_close(t.grad, want, bound, name)
