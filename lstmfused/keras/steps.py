"""LSTM cells of Keras over a sequence, by the layer's operator.

Keras's gates come in the order of torch's, i, f, c, o, and ``kernel`` (I, 4H) and
``recurrent_kernel`` (H, 4H) are the transposes of torch's weights: the operator reads them as such,
where they lie.
"""

from __future__ import annotations

from typing import Any

import torch
from keras import activations, layers, ops
from torch import Tensor

from ..functional import lstm_cell
from ..functional.direction import KERNELS, run_layer

__all__ = [
    "cells_of",
    "has_lstm_cells",
    "inner_loop",
    "is_for_cudnn",
    "sequence",
    "why_not",
    "why_not_cell",
]


def cells_of(cell: Any) -> list[Any]:
    """The cells that a layer's cell consists of."""
    return list(cell.cells) if type(cell) is layers.StackedRNNCells else [cell]


def has_lstm_cells(layer: Any) -> bool:
    return any(isinstance(cell, layers.LSTMCell) for cell in cells_of(layer.cell))


def why_not(layer: Any) -> str:
    """Why a layer with LSTM cells goes Keras's own way; empty where it does not."""
    cells = cells_of(layer.cell)
    if len(cells) == 1 and cells[0] is not layer.cell:
        return "its stack has but one cell"
    if getattr(layer, "use_cudnn", None) is True:
        return "use_cudnn=True asks for another implementation"
    return next((why for why in map(why_not_cell, cells) if why), "")


def is_for_cudnn(layer: Any) -> bool:
    """Whether on CUDA Keras has cuDNN take all steps at once, where there is no mask."""
    auto = isinstance(layer, layers.LSTM) and layer.use_cudnn == "auto"
    return auto and layer.use_bias and not (layer.unroll or layer.recurrent_dropout)


def why_not_cell(cell: Any) -> str:
    """The same of a cell."""
    if type(cell) is not layers.LSTMCell:
        return f"its cell is {type(cell).__name__}, not keras.layers.LSTMCell"
    for what, expected in (("activation", "tanh"), ("recurrent_activation", "sigmoid")):
        found = getattr(cell, what)
        if found not in (getattr(activations, expected), getattr(ops, expected)):
            return f"{what} is {getattr(found, '__name__', found)}, not Keras's {expected}"
    dtype = getattr(torch, cell.compute_dtype, None)
    if (dtype, dtype) not in KERNELS:
        return f"there are no kernels for {cell.compute_dtype}"
    if 1 in (cell.dropout, cell.recurrent_dropout):
        return "a dropout of 1, for which Keras has several meanings"
    return ""


def inner_loop(
    layer: Any, x: Tensor, initial_state: Any, mask: Tensor | None, training: bool
) -> tuple[Tensor, Tensor, Any]:
    """What RNN.inner_loop returns, for x (T, B, I) and mask (T, B): the last output (B, H), all
    outputs (B, T, H) in the order in which the steps are taken, and the last states."""
    skip = None if mask is None else (~mask).to(torch.uint8) * 2
    stacked = type(layer.cell) is layers.StackedRNNCells
    h, states = x, list[Any]()
    for cell, state in zip(
        cells_of(layer.cell), initial_state if stacked else [initial_state], strict=True
    ):
        if layer.stateful:  # Keras writes into its states after each call
            state = [t.clone() for t in state]
        h, *state = sequence(cell, h, state[0], state[1], skip, layer.go_backwards, training)
        states.append(state)
    last, output = _outputs(layer, h, states[-1][0], mask)
    return last, output, states if stacked else states[0]


def _outputs(layer: Any, h: Tensor, last: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """h (T, B, H) by time and the last one -> the last output and all, in the order of the steps:
    where one is masked the output is that of the step before, or zero if there is none or zeros are
    asked for. All are but the last where no more is wanted, which backward then has less to do
    for."""
    zeros, backwards = layer.zero_output_for_mask, layer.go_backwards
    if not layer.return_sequences:
        if mask is not None:
            kept = mask[0 if backwards else -1] if zeros else mask.any(0)
            last = last.masked_fill(~kept.unsqueeze(-1), 0)
        return last, last.unsqueeze(1)
    if backwards:
        h, mask = h.flip(0), None if mask is None else mask.flip(0)
    if mask is not None:
        kept = mask if zeros else mask.cumsum(0) > 0
        h = h.masked_fill(~kept.unsqueeze(-1), 0)
    return h[-1], h.transpose(0, 1)


def sequence(
    cell: Any,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    skip: Tensor | None,
    reverse: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, B, I) -> h of each step (T, B, H), by time, and the last h and c. ``skip`` (T, B) is
    the operator's mask."""
    # Inside a call: where the dtype policy says so, what Keras gives is cast.
    kernel, recurrent = map(ops.convert_to_tensor, (cell.kernel, cell.recurrent_kernel))
    bias = None if cell.bias is None else ops.convert_to_tensor(cell.bias)
    x, h, c = (t.to(kernel.dtype) for t in (x, h, c))
    if training and cell.dropout:
        masks = cell.get_dropout_mask(x[0])
        if isinstance(masks, list):  # one for each gate, so each has an input of its own
            x = torch.cat([x * mask for mask in masks], -1)
            kernel = _by_gate(kernel)
        else:
            x = x * masks
    if training and cell.recurrent_dropout:
        kept = torch.stack(cell.get_recurrent_dropout_mask(h), 1)
        return _with_recurrent_dropout(x, h, c, kept, kernel, recurrent, bias, skip, reverse)
    weights = kernel.t(), recurrent.t()
    if not x.is_cpu:  # where each step would copy them
        weights = weights[0].contiguous(), weights[1].contiguous()
    output, h, c, _ = run_layer(True, x, h, c, *weights, bias, None, None, skip, reverse, False)
    return output, h, c


def _by_gate(weight: Tensor) -> Tensor:
    """(K, 4H) -> (4K, 4H), for a left factor (B, 4K) with K columns for each gate."""
    blocks: Tensor = torch.block_diag(*weight.chunk(4, 1))
    return blocks


def _with_recurrent_dropout(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    kept: Tensor,
    kernel: Tensor,
    recurrent: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each gate sees another part of the state, kept (B, 4, H): beside x, the state becomes an
    input of the cell, once for each gate, and the cell's own state is zero."""
    weight_ih = torch.cat([kernel, _by_gate(recurrent)]).t().contiguous()
    weight_hh, zero = recurrent.new_zeros(recurrent.shape[::-1]), torch.zeros_like(h)
    skipped = None if skip is None else (skip != 0).unsqueeze(-1)
    inputs = x.unbind()
    times = range(len(inputs))
    outputs = dict.fromkeys(times, h)
    for t in reversed(times) if reverse else times:
        given = torch.cat([inputs[t], (h.unsqueeze(1) * kept).flatten(1)], 1)
        next_h, next_c = lstm_cell(given, (zero, c), weight_ih, weight_hh, bias, None)
        if skipped is None:
            h, c = next_h, next_c
        else:
            h, c = torch.where(skipped[t], h, next_h), torch.where(skipped[t], c, next_c)
        outputs[t] = h
    return torch.stack(list(outputs.values())), h, c
