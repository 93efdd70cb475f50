"""The LSTM step in plain PyTorch: the oracle of tests and benchmarks, and the formula to read."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

__all__ = ["lstm_cell"]


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
