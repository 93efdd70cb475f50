"""The layer, over a sequence, as a function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.compiler import is_dynamo_compiling
from torch.nn.functional import pad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import reference
from .._integrations.script import scripted_as
from .._ops import _C
from .cell import pair

__all__ = ["lstm"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STATE = "(layers * directions, batch, units)"
KERNELS = {(x, c) for x in DTYPES for c in DTYPES if _C.has_kernel(x, c)}


def _scripted_has_kernel(input: Tensor, c: Tensor, projected: bool) -> bool:
    return not projected


@scripted_as(_scripted_has_kernel)
def _has_kernel(input: Tensor, c: Tensor, projected: bool) -> bool:
    """Whether the operator computes it; what else does has no batch-invariant mode."""
    if not projected and (input.dtype, c.dtype) in KERNELS:
        return True
    if _C.batch_invariant():
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


def _direction(
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


def _steps_first(t: Tensor, batched: bool, batch_first: bool) -> Tensor:
    """As it is given -> (T, B, ...)."""
    if not batched:
        return t.unsqueeze(1)
    return t.transpose(0, 1) if batch_first else t


def _as_given(t: Tensor, batched: bool, batch_first: bool) -> Tensor:
    return _steps_first(t, True, batch_first) if batched else t.squeeze(1)


def _check_size(name: str, t: Tensor, expected: list[int]) -> None:
    if not torch._C._get_tracing_state() and list(t.shape) != expected:  # traced, they are tensors
        raise RuntimeError(f"Expected {name} size {expected}, got {list(t.shape)}")


def _scripted_check_lengths(lengths: Tensor, T: int) -> None:
    if lengths.is_cpu:
        good = ((lengths >= 0) & (lengths <= T)).all()
        torch._assert_async(good, "Expected lengths from 0 to the number of steps")


@scripted_as(_scripted_check_lengths)
def _check_lengths(lengths: Tensor, T: int) -> None:
    """Where to look at them waits for no device, and they are numbers."""
    if not is_dynamo_compiling() and not is_functorch_wrapped_tensor(lengths):
        _scripted_check_lengths(lengths, T)


def _is_projected(params: list[Tensor], has_biases: bool, states: int) -> bool:
    """Whether each layer and direction has a `weight_hr`, too."""
    size, plain = len(params) // states, 4 if has_biases else 2
    if size * states != len(params) or (size != plain and size != plain + 1):
        raise RuntimeError(f"got an incorrect number of RNN parameters: {len(params)}")
    return size > plain


def _zeros(x: Tensor, states: int, B: int, params: list[Tensor]) -> tuple[Tensor, Tensor]:
    H_out, H = params[1].shape[1], params[1].shape[0] // 4
    return x.new_zeros(states, B, H_out), x.new_zeros(states, B, H)


def _masks(
    x: Tensor, reset: Tensor | None, lengths: Tensor | None, bidirectional: bool
) -> tuple[list[Tensor | None], Tensor | None]:
    """The operator's mask for each direction and the steps past the ends, all (T, B)."""
    forward: Tensor | None = None
    backward: Tensor | None = None
    past: Tensor | None = None
    if lengths is not None:
        past = torch.arange(x.shape[0], device=x.device).unsqueeze(1) >= lengths.to(x.device)
    if reset is not None:
        forward = reset.to(x.device, torch.uint8)
        if past is not None:
            forward = forward.masked_fill(past, 0)
        if bidirectional:  # the boundary before a step is, on the way back, before the step before
            backward = pad(forward, (0, 0, 0, 1))[1:]
    if past is not None:
        skip = past.to(torch.uint8) * 2
        forward = skip if forward is None else forward + skip
        backward = skip if backward is None else backward + skip
    return ([forward, backward] if bidirectional else [forward]), past


def _layers(
    kernel: bool,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    params: list[Tensor],
    has_biases: bool,
    projected: bool,
    num_layers: int,
    dropout: float,
    masks: list[Tensor | None],
    cell_states: bool,
    packed: tuple[int, int, int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All layers over (T, B, I), with a mask for each direction."""
    size = len(params) // (num_layers * len(masks))
    first_h: list[Tensor] = [] if h is None else list(h.unbind())
    first_c: list[Tensor] = [] if c is None else list(c.unbind())
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    cells: list[Tensor] = []
    for layer in range(num_layers):
        outputs: list[Tensor] = []
        cells = []
        for direction, mask in enumerate(masks):
            k = layer * len(masks) + direction
            at = k * size
            output, h_k, c_k, cells_k = _direction(
                kernel,
                x,
                None if h is None else first_h[k],
                None if c is None else first_c[k],
                params[at : at + size],
                has_biases,
                projected,
                packed,
                mask,
                direction == 1,
                cell_states and layer == num_layers - 1,
            )
            outputs.append(output)
            cells.append(cells_k)
            h_n.append(h_k)
            c_n.append(c_k)
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
        if packed is not None:
            packed = packed[1] * len(masks), packed[1], packed[2]
        if dropout > 0 and layer < num_layers - 1:
            x = torch.dropout(x, dropout, True)
    if len(h_n) == 1:  # views, which cost less than copies
        return x, h_n[0].unsqueeze(0), c_n[0].unsqueeze(0), cells[0] if cell_states else x
    every = torch.cat(cells, 2) if cell_states else x
    return x, torch.stack(h_n), torch.stack(c_n), every


def _scripted_zeroed(output: Tensor, past: Tensor) -> Tensor:
    return output.masked_fill(past, 0)


@scripted_as(_scripted_zeroed)
def _zeroed(output: Tensor, past: Tensor) -> Tensor:
    # In place where no graph has seen it: neither backward's nor a tracer's.
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if tracing or output.requires_grad:
        return output.masked_fill(past, 0)
    return output.masked_fill_(past, 0)


def _of_tensor(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    reset: Tensor | None,
    lengths: Tensor | None,
    cell_states: bool,
    packed: tuple[int, int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`output`, `h_n`, `c_n` and, where asked for, `cell_states`.

    Of packed layers the input size, the units and the format are given, and for each layer and
    direction weight, bias and perhaps scale.
    """
    batched = input.dim() == 3
    if not batched and input.dim() != 2:
        raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
    states = num_layers * (2 if bidirectional else 1)
    x = _steps_first(input, batched, batch_first)
    T, B = x.shape[0], x.shape[1]
    if packed is not None:
        projected, H, H_out = False, packed[1], packed[1]
    else:
        projected = _is_projected(params, has_biases, states)
        H, H_out = params[1].shape[0] // 4, params[1].shape[1]
    h: Tensor | None = None
    c: Tensor | None = None
    if hx is not None:
        h, c = hx
        _check_size("hidden[0]", h, [states, B, H_out] if batched else [states, H_out])
        _check_size("hidden[1]", c, [states, B, H] if batched else [states, H])
        if not batched:
            h, c = h.unsqueeze(1), c.unsqueeze(1)
    if reset is not None:
        if reset.dtype != torch.bool:
            raise TypeError(f"lstm(): argument 'reset' must be bool, not {reset.dtype}")
        _check_size("reset", reset, list(input.shape[:-1]))
        reset = _steps_first(reset, batched, batch_first)
    if lengths is not None:
        if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
            raise TypeError(f"lstm(): argument 'lengths' must be integers, not {lengths.dtype}")
        _check_size("lengths", lengths, [B] * int(batched))
        _check_lengths(lengths, T)
    masks, past = _masks(x, reset, lengths, bidirectional)

    kernel = packed is not None or _has_kernel(x, x if c is None else c, projected)
    if not kernel and masks[0] is None and not cell_states:
        if h is None or c is None:
            h, c = _zeros(x, states, B, params)
        output, h_n, c_n = torch._VF.lstm(
            x, (h, c), params, has_biases, num_layers, dropout, train, bidirectional, False
        )
        cells = output
    else:
        drop = dropout if train else 0.0
        output, h_n, c_n, cells = _layers(
            kernel,
            x,
            h,
            c,
            params,
            has_biases,
            projected,
            num_layers,
            drop,
            masks,
            cell_states,
            packed,
        )
    if past is not None:
        past = past.unsqueeze(2)
        output = _zeroed(output, past)
        cells = _zeroed(cells, past) if cell_states else cells
    output = _as_given(output, batched, batch_first)
    cells = _as_given(cells, batched, batch_first) if cell_states else cells
    if not batched:
        h_n, c_n = h_n.squeeze(1), c_n.squeeze(1)
    return output, h_n, c_n, cells


def _of_packed(
    input: PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    cell_states: bool,
    packed: tuple[int, int, int] | None = None,
) -> tuple[PackedSequence, Tensor, Tensor, PackedSequence]:
    data, batch_sizes, sorted_indices, unsorted_indices = input
    if hx is not None and sorted_indices is not None:
        hx = hx[0].index_select(1, sorted_indices), hx[1].index_select(1, sorted_indices)
    options = has_biases, num_layers, dropout, train, bidirectional
    states = num_layers * (2 if bidirectional else 1)
    kernel = packed is not None or _has_kernel(
        data, data if hx is None else hx[1], _is_projected(params, has_biases, states)
    )
    if kernel or cell_states:
        padded, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
        output, h_n, c_n, cells = _of_tensor(
            padded, hx, params, *options, False, None, lengths, cell_states, packed
        )
        output, cells = (pack_padded_sequence(t, lengths).data for t in (output, cells))
    else:
        hx = _zeros(data, states, int(batch_sizes[0]), params) if hx is None else hx
        output, h_n, c_n = torch._VF.lstm(data, batch_sizes, hx, params, *options)
        cells = output
    if unsorted_indices is not None:
        h_n, c_n = (t.index_select(1, unsorted_indices) for t in (h_n, c_n))
    indices = batch_sizes, sorted_indices, unsorted_indices
    return PackedSequence(output, *indices), h_n, c_n, PackedSequence(cells, *indices)


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
    output, h_n, c_n, _ = _of_tensor(
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
        ``output, (h_n, c_n)``, or with ``return_cell_states`` ``output, (h_n, c_n), cell_states``:
        ``h`` of every step of the last layer, (T, B, D * H) or as the input has it; the last
        states, shaped like ``hx``; and ``c`` of every step of the last layer, shaped like
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
        found: Any = _of_packed(input, hx, params, *options, return_cell_states, packed)
    else:
        if reset is not None and not isinstance(reset, Tensor):
            reset = torch.as_tensor(reset)
        if lengths is not None and not isinstance(lengths, Tensor):
            lengths = torch.as_tensor(lengths)
        found = _of_tensor(
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
    output, h_n, c_n, _ = _of_tensor(
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
    """The layers of :class:`lstmfused.PackedLSTM`; ``packed`` as :func:`_of_tensor` has it."""
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
