"""The LSTM in plain PyTorch: the oracle of tests and benchmarks, and the formula to read."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["lstm_cell", "lstm_layer"]


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Equivalent to :func:`lstmfused.functional.lstm_cell`, without its checks."""
    if hx is None:
        zeros = input.new_zeros(*input.shape[:-1], weight_hh.shape[1])
        hx = zeros, zeros
    h, c = hx
    i, f, g, o = (linear(input, weight_ih, bias_ih) + linear(h, weight_hh, bias_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def lstm_layer(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    mask: Tensor | None = None,
    reverse: bool = False,
    cell_states: bool = False,
    weight_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Equivalent to the operator ``lstmfused::lstm_layer``, one layer in one direction over (T, B,
    I), without its checks; and with ``weight_hr`` (P, H), the projection of ``h`` that torch has.

    ``mask`` (T, B): where it is 1, the state is zero before the step; where it is 2, the step is
    skipped.

    Returns:
        ``h`` of every step, (T, B, H) or (T, B, P), the last ``h`` and ``c``, and, where asked for,
        ``c`` of every step.
    """
    T, B = input.shape[:2]
    h = input.new_zeros(B, weight_hh.shape[1]) if hx is None else hx
    c = input.new_zeros(B, weight_ih.shape[0] // 4) if cx is None else cx
    outputs, cells = [h] * T, [c] * T
    for t in reversed(range(T)) if reverse else range(T):
        before = h, c
        if mask is not None:
            reset, skip = ((mask[t] == k).unsqueeze(1) for k in (1, 2))
            h, c = h.masked_fill(reset, 0), c.masked_fill(reset, 0)
        h, c = lstm_cell(input[t], (h, c), weight_ih, weight_hh, bias_ih, bias_hh)
        h = h if weight_hr is None else linear(h, weight_hr)
        h, c = h.to(before[0].dtype), c.to(before[1].dtype)
        if mask is not None:
            h, c = torch.where(skip, before[0], h), torch.where(skip, before[1], c)
        outputs[t], cells[t] = h, c
    return _stack(outputs, h), h, c, _stack(cells, c) if cell_states else c.new_empty(0)


def _stack(steps: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(steps) if steps else like.new_empty(0, *like.shape)
