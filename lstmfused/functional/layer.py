"""The layer, over a sequence, as a function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import handle_torch_function, has_torch_function_unary

from .._integrations.script import scripted_as
from .._ops import _C
from .cell import pair
from .stack import of_packed, of_tensor

__all__ = ["lstm", "packed_lstm"]

STATE = "(layers * directions, batch, units)"


def _scripted(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: list[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    return_cell_states: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    assert not return_cell_states, "TorchScript knows no third output: return_cell_states"
    output, h_n, c_n, _ = of_tensor(
        input,
        hx,
        params,
        has_biases,
        num_layers,
        dropout,
        train,
        bidirectional,
        batch_first,
        reset,
        lengths,
        False,
    )
    return output, (h_n, c_n)


@scripted_as(_scripted)
def lstm(
    input: Any,
    hx: tuple[Tensor, Tensor] | None,
    params: list[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    reset: Any = None,
    lengths: Any = None,
    return_cell_states: bool = False,
) -> Any:
    r"""Layers of LSTM over a sequence, as :class:`torch.nn.LSTM` computes them, each layer and
    direction by one operator.

    T is the number of steps, B the batch, I the input size, H the units, D the directions.

    Args:
        input: (T, B, I), with ``batch_first`` (B, T, I), or (T, I) without a batch; or a
            :class:`~torch.nn.utils.rnn.PackedSequence`.
        hx: the state ``(h, c)`` before the first step, each (``num_layers`` * D, B, H), or without
            a batch (``num_layers`` * D, H); ``None`` is a state of zeros.
        params: of each layer and direction ``weight_ih`` (4H, I), ``weight_hh`` (4H, H) and, with
            ``has_biases``, ``bias_ih`` and ``bias_hh`` (4H), one after the other as
            :class:`torch.nn.LSTM` has them; the projections of ``proj_size``, too.
        dropout: the probability by which the output of each layer but the last is dropped where
            ``train``.
        reset: bool, (T, B), with ``batch_first`` (B, T), or (T): where it is set, that row's state
            is zero before that step in every layer, and nothing passes this boundary backwards.
        lengths: integers from 0 to T, (B), or one without a batch, on any device and in any order:
            the steps of each row. Those past its end are not computed: the output is zero there,
            the last state is that at the row's end, where a backward direction begins. A ``reset``
            there has no effect.
        return_cell_states: whether to return ``c`` of every step, too.

    Neither ``reset`` nor ``lengths`` waits for a device: lengths out of range are an error where
    they are on the CPU, and elsewhere count as the nearest in range.

    Dtypes are those of :func:`lstm_cell`. For others and for projections torch's own layer is
    called, or, where it lacks what is asked for, torch's operators, step by step.

    Returns:
        ``output, (h_n, c_n)``, or with ``return_cell_states`` ``output, (h_n, c_n), cell_states``.
        These are ``h`` of every step of the last layer, (T, B, D * H) or as the input has it; the
        last states, shaped like ``hx``; and ``c`` of every step of the last layer, shaped like
        ``output``.

    Raises:
        TypeError: ``hx`` is no pair of tensors, ``reset`` is not bool, ``lengths`` no integers.
        ValueError: ``input`` is neither 2D nor 3D, or is packed and comes with ``reset`` or
            ``lengths``.
        RuntimeError: shapes, dtypes or devices do not fit together; the message says what was
            expected and what came.
        NotImplementedError: there is no kernel for it, in batch-invariant mode.
    """
    options = has_biases, num_layers, dropout, train, bidirectional
    if has_torch_function_unary(input):
        return handle_torch_function(
            lstm,
            (input,),
            input,
            hx,
            params,
            *options,
            batch_first,
            reset=reset,
            lengths=lengths,
            return_cell_states=return_cell_states,
        )
    return _lstm(input, hx, params, *options, batch_first, reset, lengths, return_cell_states)


def _lstm(
    input: Any,
    hx: tuple[Tensor, Tensor] | None,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    reset: Any,
    lengths: Any,
    return_cell_states: bool,
    packed: tuple[int, int, int] | None = None,
) -> Any:
    if lengths is None and not return_cell_states and not is_dynamo_compiling():
        drop = dropout if train else 0.0
        flags = has_biases, num_layers, drop, bidirectional, batch_first
        if short := _C.lstm_layers(input, hx, params, packed, reset, *flags):
            output, h_n, c_n = short
            return output, (h_n, c_n)
    options = has_biases, num_layers, dropout, train, bidirectional
    if hx is not None:
        hx = hx if type(hx) is tuple and len(hx) == 2 else pair(hx, "lstm", STATE)
        if not (isinstance(hx[0], Tensor) and isinstance(hx[1], Tensor)):
            raise TypeError(
                f"lstm(): argument 'hx' must be a pair (h, c) of Tensors, each of shape {STATE}, "
                f"not of {type(hx[0]).__name__} and {type(hx[1]).__name__}"
            )
    if isinstance(input, PackedSequence):
        if reset is not None or lengths is not None:
            raise ValueError("lstm: a PackedSequence takes neither reset nor lengths: pad it")
        found: Any = of_packed(input, hx, params, *options, return_cell_states, packed)
    else:
        if reset is not None and not isinstance(reset, Tensor):
            reset = torch.as_tensor(reset)
        if lengths is not None and not isinstance(lengths, Tensor):
            lengths = torch.as_tensor(lengths)
        found = of_tensor(
            input, hx, params, *options, batch_first, reset, lengths, return_cell_states, packed
        )
    output, h_n, c_n, cells = found
    return (output, (h_n, c_n), cells) if return_cell_states else (output, (h_n, c_n))


def _scripted_packed(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: list[Tensor],
    packed: tuple[int, int, int],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    output, h_n, c_n, _ = of_tensor(
        input,
        hx,
        params,
        False,
        num_layers,
        0.0,
        False,
        bidirectional,
        batch_first,
        reset,
        lengths,
        False,
        packed,
    )
    return output, (h_n, c_n)


@scripted_as(_scripted_packed)
def packed_lstm(
    input: Any,
    hx: tuple[Tensor, Tensor] | None,
    params: list[Tensor],
    packed: tuple[int, int, int],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    *,
    reset: Any = None,
    lengths: Any = None,
) -> Any:
    """The layers of :class:`lstmfused.PackedLSTM`; ``packed`` as :func:`of_tensor` has it."""
    if has_torch_function_unary(input):
        return handle_torch_function(
            packed_lstm,
            (input,),
            input,
            hx,
            params,
            packed,
            num_layers,
            bidirectional,
            batch_first,
            reset=reset,
            lengths=lengths,
        )
    options = False, num_layers, 0.0, False, bidirectional, batch_first
    return _lstm(input, hx, params, *options, reset, lengths, False, packed)
