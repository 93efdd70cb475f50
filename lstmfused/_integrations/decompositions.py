"""Step and layer in torch's own operators, for who can run no other."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._ops import _C
from ..modules.packing import unpacked

__all__ = ["decompositions", "register"]


def lstm_cell(
    input: Tensor, hx: Tensor | None, cx: Tensor | None, *weights: Any
) -> tuple[Tensor, Tensor]:
    weights += (None,) * (4 - len(weights))  # biases that were not even named
    _C.check_lstm_cell(input, hx, cx, *weights)
    if hx is None or cx is None:
        return reference.lstm_cell(input, None, *weights)
    h, c = reference.lstm_cell(input, (hx, cx), *weights)
    return h.to(input.dtype), c.to(cx.dtype)


def lstm_layer(
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
    weights = weight_ih, weight_hh, bias_ih, bias_hh
    _C.check_lstm_layer(input, hx, cx, *weights, mask)
    return reference.lstm_layer(input, hx, cx, *weights, mask, reverse, cell_states)


def lstm_cell_packed(
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
    state = None if hx is None or cx is None else (hx, cx)
    return reference.lstm_cell(
        input, state, *_weights(weight, bias, scale, input_size, hidden_size)
    )


def lstm_layer_packed(
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
    sizes = input_size, hidden_size
    _C.check_lstm_layer_packed(input, hx, cx, weight, bias, scale, mask, *sizes, format)
    weights = _weights(weight, bias, scale, *sizes)
    return reference.lstm_layer(input, hx, cx, *weights, None, mask, reverse)[:3]


def _weights(
    weight: Tensor, bias: Tensor, scale: Tensor | None, input_size: int, hidden_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`weight_ih`, `weight_hh` and the sum of both biases."""
    rows = unpacked(weight, hidden_size).float()
    if scale is not None:
        rows = rows * unpacked(scale, hidden_size)
    weight_ih, weight_hh = rows.split([input_size, hidden_size], 1)
    return weight_ih, weight_hh, unpacked(bias, hidden_size).flatten()


DECOMPOSITIONS: dict[str, Callable[..., Any]] = {
    "lstm_cell": lstm_cell,
    "lstm_cell_packed": lstm_cell_packed,
    "lstm_layer": lstm_layer,
    "lstm_layer_packed": lstm_layer_packed,
}


def decompositions() -> dict[torch._ops.OperatorBase, Callable[..., Any]]:
    """Torch's default decompositions, :func:`torch.export.default_decompositions`, and those of the
    step, of the layer and of packed ones: a table for ``ExportedProgram.run_decompositions``
    that leaves nothing but core ATen. A layer becomes a step for each of its steps, the number of
    which must not be dynamic.

    Without it a program keeps the fused operator, which ``torch.compile`` and AOTInductor want and
    runtimes that know only torch's own operators do not.

    Example::

        >>> program = torch.export.export(LSTMCell(10, 20), (torch.randn(3, 10),))
        >>> program = program.run_decompositions(lstmfused.decompositions())
    """
    table = torch.export.default_decompositions()
    table.update(_ours())
    return table


def _ours() -> dict[torch._ops.OperatorBase, Callable[..., Any]]:
    return {getattr(torch.ops.lstmfused, name).default: d for name, d in DECOMPOSITIONS.items()}


def register(exporter: Any) -> None:
    """With the table that torch's ONNX exporter makes, not with torch's own: from that one symbolic
    shapes would be computed, too, which a loop over the steps fixes."""
    create = exporter.create_onnx_friendly_decomposition_table

    @wraps(create)
    def with_ours(*given: Any, **named: Any) -> Any:
        return {**create(*given, **named), **_ours()}

    exporter.create_onnx_friendly_decomposition_table = with_ours
