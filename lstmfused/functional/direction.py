"""One direction of one layer: by which operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import reference
from .._integrations.script import scripted_as
from .._ops import _C
from ..invariance import is_batch_invariant

__all__ = ["KERNELS", "has_kernel", "run_direction", "run_layer"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KERNELS = {(x, c) for x in DTYPES for c in DTYPES if _C.has_kernel(x, c)}


def _scripted_has_kernel(input: Tensor, c: Tensor, projected: bool) -> bool:
    return not projected


@scripted_as(_scripted_has_kernel)
def has_kernel(input: Tensor, c: Tensor, projected: bool) -> bool:
    """Whether the operator computes it; what else does has no batch-invariant mode."""
    if not projected and (input.dtype, c.dtype) in KERNELS:
        return True
    if is_batch_invariant():
        what = "a projection" if projected else f"{input.dtype} with a cell state in {c.dtype}"
        raise NotImplementedError(f"lstm: no batch-invariant kernels for {what}")
    return False


def _scripted_run(
    kernel: bool,
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    mask: Tensor | None,
    reverse: bool,
    cell_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output, h_n, c_n, cells = torch.ops.lstmfused.lstm_layer(
        input, h, c, w_ih, w_hh, b_ih, b_hh, mask, reverse, cell_states
    )
    return output, h_n, c_n, cells


@scripted_as(_scripted_run)
def run_layer(
    kernel: bool,
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    mask: Tensor | None,
    reverse: bool,
    cell_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if kernel:
        run = torch.ops.lstmfused.lstm_layer if is_dynamo_compiling() else _C.lstm_layer
        return run(input, h, c, w_ih, w_hh, b_ih, b_hh, mask, reverse, cell_states)
    return reference.lstm_layer(
        input, h, c, w_ih, w_hh, b_ih, b_hh, mask, reverse, cell_states, w_hr
    )


def _scripted_run_packed(
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    mask: Tensor | None,
    input_size: int,
    hidden_size: int,
    format: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    output, h_n, c_n = torch.ops.lstmfused.lstm_layer_packed(
        input, h, c, weight, bias, scale, mask, input_size, hidden_size, format, reverse
    )
    return output, h_n, c_n


@scripted_as(_scripted_run_packed)
def _run_packed(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    compiling = is_dynamo_compiling()
    run = torch.ops.lstmfused.lstm_layer_packed if compiling else _C.lstm_layer_packed
    return run(*given)


def run_direction(
    kernel: bool,
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    params: list[Tensor],
    has_biases: bool,
    projected: bool,
    packed: tuple[int, int, int] | None,
    mask: Tensor | None,
    reverse: bool,
    cell_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One direction of one layer over (T, B, I)."""
    if packed is not None:
        I, H, format = packed
        scale = params[2] if len(params) > 2 else None
        output, h_n, c_n = _run_packed(
            input, h, c, params[0], params[1], scale, mask, I, H, format, reverse
        )
        return output, h_n, c_n, output
    return run_layer(
        kernel,
        input,
        h,
        c,
        params[0],
        params[1],
        params[2] if has_biases else None,
        params[3] if has_biases else None,
        params[-1] if projected else None,
        mask,
        reverse,
        cell_states,
    )
