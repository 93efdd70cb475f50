"""Loads the extension and registers what is made from Python: fake kernels and the rule of vmap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["_C", "build_info"]

_BUILD = "pip install --no-build-isolation ."


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


try:
    from . import _build
except ImportError:
    raise ImportError(f"lstmfused has not been built here: run `{_BUILD}` in its sources") from None
if _minor(_build.TORCH) != _minor(torch.__version__):
    raise ImportError(
        f"lstmfused was built for torch {_build.TORCH}, but torch {torch.__version__} is loaded: "
        f"run `{_BUILD}` in its sources, or install torch {_build.TORCH}"
    )
try:
    from . import _C
except ImportError as error:
    raise ImportError(f"lstmfused does not load ({error}): run `{_BUILD}` in its sources") from None


def _fake_step(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _C.check_lstm_cell(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh)
    shape = (*input.shape[:-1], weight_hh.shape[1])
    cell = input.dtype if cx is None else cx.dtype
    if _C.has_kernel(input.dtype, cell):
        return input.new_empty(shape), input.new_empty(shape, dtype=cell)
    # What torch's own cell makes of them.
    state = [input.new_zeros(shape) if t is None else t for t in (hx, cx)]
    x, h, c = (t if t.dim() == 2 else t.unsqueeze(0) for t in (input, *state))
    h, c = torch._VF.lstm_cell(x, (h, c), weight_ih, weight_hh, bias_ih, bias_hh)
    return h.view(shape), c.view(shape)


def _fake_forward(
    input: Tensor, hx: Tensor, cx: Tensor, *weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    B, H = hx.shape
    return input.new_empty(B, H), cx.new_empty(B, H), input.new_empty(B, 4 * H)


def _fake_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    gates: Tensor,
    input: Tensor | None,
    hx: Tensor | None,
    cx: Tensor,
    weight_ih: Tensor | None,
    weight_hh: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    B, H = cx.shape
    wide = input if input is not None else weight_ih
    I = 0 if wide is None else wide.shape[1]
    shapes = [(B, I), (B, H), (B, H), (4 * H, I), (4 * H, H), (4 * H,), (4 * H,)]
    return tuple(
        (cx if index == 2 else gates).new_empty(shape if wanted else (0,))
        for index, (shape, wanted) in enumerate(zip(shapes, output_mask, strict=True))
    )


def _fake_frozen(
    input: Tensor, hx: Tensor | None, cx: Tensor | None, *packed: Any
) -> tuple[Tensor, Tensor]:
    _C.check_lstm_cell_frozen(input, hx, cx, *packed)
    shape = (*input.shape[:-1], packed[-1])
    return input.new_empty(shape), input.new_empty(shape)


def _rounded(t: Tensor | None, dtype: torch.dtype) -> Any:
    """What autocast does to an argument."""
    rounds = t is not None and t.is_floating_point() and t.dtype != torch.float64
    return t.to(dtype) if rounds else t  # type: ignore[union-attr]


def _one(t: Any, dim: int | None) -> Any:
    """One step's argument, or another like it, for there may be no step."""
    return t if dim is None else t.new_empty(t.movedim(dim, 0).shape[1:])


def _vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Any, tuple[int, int]]:
    """The rule for vmap over V steps of lstm_cell.

    Every row is computed as if it were alone, so where all steps have the same weights, a stack of
    batches is one batch for the fused kernel. Stacked weights take batched products instead.
    """
    device = given[0].device.type
    if torch.is_autocast_enabled(device):  # which comes after vmap
        dtype = torch.get_autocast_dtype(device)
        cast = [_rounded(t, torch.float32 if i == 2 else dtype) for i, t in enumerate(given)]
        if cast[1] is None and cast[2] is None:  # a state of zeros
            x, weight_hh = _one(cast[0], in_dims[0]), _one(cast[4], in_dims[4])
            h = x.new_zeros(*x.shape[:-1], weight_hh.shape[-1])
            cast[1:3] = h, h.float() if x.dtype == dtype else h
        with torch.autocast(device, enabled=False):
            return _vmap(info, in_dims, *cast)

    V, absent = info.batch_size, (None,) * (7 - len(given))  # biases that were not even named
    given, in_dims = given + absent, in_dims + absent
    dims = list(zip(given, in_dims, strict=True))
    stack = [t if d is None else t.movedim(d, 0) for t, d in dims]
    one = [_one(t, d) for t, d in dims]
    _C.check_lstm_cell(*one)
    batched = one[0].dim() == 2

    if all(d is None for d in in_dims[3:]):
        rows = [
            t if t is None else (t.expand(V, *t.shape) if d is None else t).flatten(0, -2)
            for t, d in zip(stack[:3], in_dims, strict=False)
        ]
        state = torch.ops.lstmfused.lstm_cell(*rows, *stack[3:])
        shape = one[0].shape[:-1]
        return tuple(t.unflatten(0, (V, *shape)) for t in state), (0, 0)

    x, h, c = (t if t is None or batched else t.unsqueeze(-2) for t in stack[:3])
    if h is None:
        h = c = x.new_zeros(x.shape[-2], one[4].shape[1])
    state = _C.lstm_cell_composed(x, h, c, *stack[3:])
    return state if batched else tuple(t.squeeze(-2) for t in state), (0, 0)


torch.library.register_fake("lstmfused::lstm_cell", _fake_step)
torch.library.register_fake("lstmfused::lstm_cell_forward", _fake_forward)
torch.library.register_fake("lstmfused::lstm_cell_backward", _fake_backward)
torch.library.register_fake("lstmfused::lstm_cell_backward_", _fake_backward)
torch.library.register_fake("lstmfused::lstm_cell_frozen", _fake_frozen)
torch.library.register_vmap("lstmfused::lstm_cell", _vmap)


def build_info() -> dict[str, str]:
    """What was built, for which torch, and which kernel this machine runs."""
    from . import __version__

    return {
        "lstmfused": __version__,
        "built for torch": _build.TORCH,
        "running torch": torch.__version__,
        "digest of the sources": _build.SOURCES,
        "compiler": _C.compiler,
        "cpu kernels built": _build.VARIANTS,
        "cpu kernel": _C.cpu_kernel(),
        "cuda kernels built": _C.cuda_architectures or "none",
    }
