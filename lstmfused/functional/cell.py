"""The step as a function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy

from .._integrations.script import scripted_as
from .._ops import _C

__all__ = ["lstm_cell"]


def pair(hx: Any, of: str = "lstm_cell", shape: str = "(batch, units)") -> tuple[Tensor, Tensor]:
    """A state that is no tuple of two, as one."""
    if isinstance(hx, Tensor):
        raise TypeError(
            f"{of}(): argument 'hx' must be a pair (h, c) of Tensors, each of shape {shape}, "
            f"not one Tensor of shape {tuple(hx.shape)}"
        )
    if not isinstance(hx, Proxy) and len(hx) != 2:  # torch.fx's knows no length, and unpacks
        raise RuntimeError(f"{of} expects two hidden states, got {len(hx)}")
    h, c = hx
    return h, c


def _scripted(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    h: Tensor | None = None
    c: Tensor | None = None
    if hx is not None:
        h, c = hx
    next_h, next_c = torch.ops.lstmfused.lstm_cell(
        input, h, c, weight_ih, weight_hh, bias_ih, bias_hh
    )
    return next_h, next_c


@scripted_as(_scripted)
def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One LSTM step over (batch, units) state, in one fused kernel::

        i, f, g, o = (x @ W.T + b + h @ V.T + d).chunk(4, -1)
        c' = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h' = sigmoid(o) * tanh(c')

    with the gates' rows of the weights in the order i, f, g, o, as in :class:`torch.nn.LSTMCell`
    (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000).

    B is the batch, I the input size, H the units. The units are fixed by the weights; the batch is
    whatever this call brings. Without the batch dimension everything is one row.

    Args:
        input: (B, I) or (I).
        hx: the state ``(h, c)``, each (B, H) or (H); ``None`` is a state of zeros.
        weight_ih: (4H, I).
        weight_hh: (4H, H).
        bias_ih: (4H) or ``None``.
        bias_hh: (4H) or ``None``.

    All tensors share one dtype (float32, float64, bfloat16 or float16; the half types are summed in
    float32) and one device. They may be non-contiguous. Beside a half type ``c`` may be float32: it
    is then neither rounded nor are its gradients, so that it can count further than a half type.
    Autocast keeps it so: it casts ``c`` to float32 and everything else to its own dtype. Other
    dtypes that :class:`torch.nn.LSTMCell` takes (complex ones, ``c`` of another dtype) are left to
    torch's cell.

    Returns:
        The new state ``(h, c)``, each (B, H) or (H), in the dtypes of ``input`` and ``c``.

    Raises:
        ValueError: ``input``, ``h`` or ``c`` is neither 1D nor 2D.
        TypeError: ``hx`` is one tensor instead of a pair.
        RuntimeError: shapes, dtypes or devices do not fit together; the message says what was
            expected and what came.
    """
    h: Tensor | None
    c: Tensor | None
    if hx is None:
        h = c = None
    else:
        h, c = hx if type(hx) is tuple and len(hx) == 2 else pair(hx)

    # One operator, by the short way or by the one that a graph can see.
    step = torch.ops.lstmfused.lstm_cell if is_dynamo_compiling() else _C.lstm_cell
    return step(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh)
