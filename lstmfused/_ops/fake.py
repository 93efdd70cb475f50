"""Shapes and dtypes of what the operators return, for tracing and compilation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .load import _C

__all__: list[str] = []


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
    return _wanted(shapes, output_mask, gates, cx)


def _wanted(
    shapes: list[tuple[Any, ...]], output_mask: list[bool], like: Tensor, cell: Tensor
) -> tuple[Tensor, ...]:
    """The seven gradients, of which that of cx is of the dtype of ``cell``."""
    return tuple(
        (cell if index == 2 else like).new_empty(shape if wanted else (0,))
        for index, (shape, wanted) in enumerate(zip(shapes, output_mask, strict=True))
    )


def _fake_packed(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    input_size: int,
    hidden_size: int,
    format: int,
) -> tuple[Tensor, Tensor]:
    _C.check_lstm_cell_packed(input, hx, cx, weight, bias, scale, input_size, hidden_size, format)
    shape = (*input.shape[:-1], hidden_size)
    return input.new_empty(shape), input.new_empty(shape)


def _fake_layer(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    mask: Tensor | None,
    reverse: bool,
    cell_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _C.check_lstm_layer(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, mask)
    (T, B, _), H = input.shape, weight_hh.shape[1]
    cell = input if cx is None else cx

    def steps(like: Tensor) -> Tensor:  # on the CPU, a part of T + 1 states
        if like.device.type != "cpu":
            return like.new_empty(T, B, H)
        return like.new_empty(T + 1, B, H).narrow(0, 0 if reverse else 1, T)

    every = steps(cell) if cell_states else cell.new_empty(0)
    return steps(input), input.new_empty(B, H), cell.new_empty(B, H), every


def _fake_layer_packed(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    mask: Tensor | None,
    input_size: int,
    hidden_size: int,
    format: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = input_size, hidden_size, format
    _C.check_lstm_layer_packed(input, hx, cx, weight, bias, scale, mask, *sizes)
    T, B, _ = input.shape
    h, c = (input.new_empty(B, hidden_size) for _ in range(2))
    states = input.new_empty(T + 1, B, hidden_size)
    return states[:-1] if reverse else states[1:], h, c


def _fake_layer_forward(
    input: Tensor, hx: Tensor, cx: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    (T, B, _), H = input.shape, hx.shape[1]
    states = (T + 1, B, H)
    return input.new_empty(states), cx.new_empty(states), input.new_empty(T, B, 4 * H)


def _fake_layer_backward(
    grad_output: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    grad_cells: Tensor | None,
    input: Tensor | None,
    hidden: Tensor,
    cells: Tensor,
    gates: Tensor,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    mask: Tensor | None,
    reverse: bool,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    T, B, _ = gates.shape
    wide = input if input is not None else weight_ih
    (H, I) = hidden.shape[2], 0 if wide is None else wide.shape[-1]
    shapes = [(T, B, I), (B, H), (B, H), (4 * H, I), (4 * H, H), (4 * H,), (4 * H,)]
    found = _wanted(shapes, output_mask, hidden, cells)
    halves = hidden.dtype in (torch.bfloat16, torch.float16)
    if halves or weight_hh.is_contiguous() or weight_hh.stride(0) != 1:
        return found
    # Weights that come transposed have such gradients.
    grad_ih, grad_hh = (t.mT.contiguous().mT if t.dim() == 2 else t for t in found[3:5])
    return *found[:3], grad_ih, grad_hh, *found[5:]


torch.library.register_fake("lstmfused::lstm_cell", _fake_step)
torch.library.register_fake("lstmfused::lstm_cell_forward", _fake_forward)
torch.library.register_fake("lstmfused::lstm_cell_backward", _fake_backward)
torch.library.register_fake("lstmfused::lstm_cell_backward_reuse_gates", _fake_backward)
torch.library.register_fake("lstmfused::lstm_cell_packed", _fake_packed)
torch.library.register_fake("lstmfused::lstm_layer", _fake_layer)
torch.library.register_fake("lstmfused::lstm_layer_forward", _fake_layer_forward)
torch.library.register_fake("lstmfused::lstm_layer_backward", _fake_layer_backward)
torch.library.register_fake("lstmfused::lstm_layer_packed", _fake_layer_packed)
