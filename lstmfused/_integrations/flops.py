"""The arithmetic of step and layer, for who counts it: in each counter's own way, for which most
take no more than the matrix products."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from ..modules.convert import FUSED

__all__ = ["fvcore", "ptflops_modules", "ptflops_operators", "register", "thop"]

Shape = tuple[int, ...]


def step(
    input: Shape, hx: Any, cx: Any, weight_ih: Shape, weight_hh: Shape, *_: Any, **__: Any
) -> int:
    """A step from no state counts as one from zeros, as it does in torch's cell; a layer as its
    steps."""
    return 2 * prod(input[:-1]) * (prod(weight_ih) + prod(weight_hh))


def backward(
    grad_h: Any,
    grad_c: Any,
    gates: Any,
    input: Shape | None,
    hx: Shape | None,
    cx: Shape,
    weight_ih: Shape | None,
    weight_hh: Shape | None,
    output_mask: list[bool],
    **__: Any,
) -> int:
    """A product for each gradient wanted of input, hx, weight_ih and weight_hh."""
    (B, H), (_, I) = cx, input or weight_ih or (0, 0)
    of_ih, of_hh = (output_mask[k] + output_mask[k + 3] for k in (0, 1))
    return 2 * B * 4 * H * (of_ih * I + of_hh * H)


def layer_backward(
    grad_output: Any,
    grad_h: Any,
    grad_c: Any,
    grad_cells: Any,
    input: Shape | None,
    hidden: Any,
    cells: Any,
    gates: Shape,
    weight_ih: Shape | None,
    weight_hh: Shape,
    mask: Any,
    reverse: Any,
    output_mask: list[bool],
    **__: Any,
) -> int:
    """As of its steps, of which all but the first owe a gradient to their state."""
    (T, B, _), (rows, H) = gates, weight_hh
    I = (input or weight_ih or (0,))[-1]
    of_input = T * (output_mask[0] + output_mask[3]) * I
    of_state = (max(T - 1, 0) + (T > 0 and output_mask[1]) + T * output_mask[4]) * H
    return 2 * B * rows * (of_input + of_state)


def gradients(
    grad_h: Any, grad_c: Any, arguments: list[Any], gates: Any, output_mask: list[bool], **_: Any
) -> int:
    input, hx, cx, weight_ih, weight_hh, *_biases = arguments
    return backward(grad_h, grad_c, gates, input, hx, cx, weight_ih, weight_hh, output_mask)


def tangents(
    grad_h: Any,
    grad_c: Any,
    arguments: list[Any],
    gates: Shape,
    tangents: list[Any],
    grad_h_tangent: Any,
    grad_c_tangent: Any,
    output_mask: list[bool],
    **_: Any,
) -> int:
    """By the product rule: a product for each factor's tangent, in the step and in each gradient
    wanted, and one for the tangent of the gates' gradients there."""
    count = 0
    for k, weight in ((0, 3), (1, 4)):
        of_rows, of_weight = tangents[k] is not None, tangents[weight] is not None
        products = of_rows + of_weight
        products += output_mask[k] * (1 + of_weight) + output_mask[weight] * (1 + of_rows)
        size = (arguments[k] or arguments[weight] or (0,))[-1]
        count += 2 * prod(gates) * size * products
    return count


def packed(
    input: Shape,
    hx: Any,
    cx: Any,
    weight: Any,
    bias: Any,
    scale: Any,
    input_size: int,
    hidden_size: int,
    *_: Any,
    **__: Any,
) -> int:
    return 2 * prod(input[:-1]) * 4 * hidden_size * (input_size + hidden_size)


def packed_layer(
    input: Shape,
    hx: Any,
    cx: Any,
    weight: Any,
    bias: Any,
    scale: Any,
    mask: Any,
    input_size: int,
    hidden_size: int,
    *_: Any,
    **__: Any,
) -> int:
    return packed(input, hx, cx, weight, bias, scale, input_size, hidden_size)


def register(flop_counter: Any) -> None:
    """With :class:`torch.utils.flop_counter.FlopCounterMode`: two for each multiply-add."""
    ops, of = torch.ops.lstmfused, flop_counter.register_flop_formula
    of([ops.lstm_cell, ops.lstm_cell_forward, ops.lstm_layer, ops.lstm_layer_forward])(step)
    of(ops.lstm_layer_backward)(layer_backward)
    of([ops.lstm_cell_backward, ops.lstm_cell_backward_reuse_gates])(backward)
    of(ops.lstm_cell_gradients)(gradients)
    of(ops.lstm_cell_tangents)(tangents)
    of(ops.lstm_cell_packed)(packed)
    of(ops.lstm_layer_packed)(packed_layer)


# Other counters take a multiply-add for one.


def fvcore(flop_count: Any) -> None:
    def count(inputs: list[Any], outputs: list[Any]) -> int:
        x, weight_ih, weight_hh = (inputs[k].type().sizes() for k in (0, 3, 4))
        return step(x, None, None, weight_ih, weight_hh) // 2

    for name in ("lstm_cell", "lstm_layer"):
        flop_count._DEFAULT_SUPPORTED_OPS[f"lstmfused::{name}"] = count


def thop(profile: Any) -> None:
    for plain, fused in FUSED.items():
        profile.register_hooks[fused] = profile.register_hooks[plain]


def ptflops_modules(pytorch_ops: Any) -> None:
    for plain, fused in FUSED.items():
        pytorch_ops.MODULES_MAPPING[fused] = pytorch_ops.MODULES_MAPPING[plain]


def ptflops_operators(aten_ops: Any) -> None:
    def count(inputs: list[Any], outputs: list[Any]) -> int:
        x, _, _, weight_ih, weight_hh, *others = inputs
        rows: int = prod(x.shape[:-1])
        added: int = sum(rows * len(bias) for bias in others[:2] if bias is not None)
        return added + step(x.shape, None, None, weight_ih.shape, weight_hh.shape) // 2

    ops = torch.ops.lstmfused
    for op in (ops.lstm_cell, ops.lstm_cell_forward, ops.lstm_layer, ops.lstm_layer_forward):
        aten_ops.ATEN_OPS_MAPPING[op] = count
