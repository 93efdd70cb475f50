"""Layers and directions over a sequence, padded or packed: checked, masked, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.compiler import is_dynamo_compiling
from torch.nn.functional import pad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .._integrations.script import scripted_as
from .direction import has_kernel, run_direction

__all__ = ["of_packed", "of_tensor"]


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
            output, h_k, c_k, cells_k = run_direction(
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


def of_tensor(
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

    kernel = packed is not None or has_kernel(x, x if c is None else c, projected)
    # While Dynamo traces, torch 2.11 gets the shape of its own layer's h_n wrong, with projections.
    if not kernel and masks[0] is None and not cell_states and not is_dynamo_compiling():
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


def of_packed(
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
    kernel = packed is not None or has_kernel(
        data, data if hx is None else hx[1], _is_projected(params, has_biases, states)
    )
    if kernel or cell_states:
        padded, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
        output, h_n, c_n, cells = of_tensor(
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
