"""The rule of ``torch.func.vmap`` for the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .load import _C

__all__: list[str] = []


def _rounded(t: Tensor | None, dtype: torch.dtype) -> Any:
    """What autocast does to an argument."""
    rounds = t is not None and t.is_floating_point() and t.dtype != torch.float64
    return t.to(dtype) if rounds else t  # type: ignore[union-attr]


def _one(t: Any, dim: int | None) -> Any:
    """One step's argument, or another like it, for there may be no step."""
    return t if dim is None else t.new_empty(t.movedim(dim, 0).shape[1:])


def _vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Any, tuple[int, int]]:
    """The rule for vmap over V steps of lstm_cell.

    Every row is computed as if it were alone, so where all steps have the same weights, a stack of
    batches is one batch for the fused kernel. Stacked weights take batched products instead.
    """
    device = given[0].device.type
    if torch.is_autocast_enabled(device):  # which comes after vmap
        dtype = torch.get_autocast_dtype(device)
        cast = [_rounded(t, torch.float32 if i == 2 else dtype) for i, t in enumerate(given)]
        if cast[1] is None and cast[2] is None:  # a state of zeros
            x, weight_hh = _one(cast[0], in_dims[0]), _one(cast[4], in_dims[4])
            h = x.new_zeros(*x.shape[:-1], weight_hh.shape[-1])
            cast[1:3] = h, h.float() if x.dtype == dtype else h
        with torch.autocast(device, enabled=False):
            return _vmap(info, in_dims, *cast)

    V, absent = info.batch_size, (None,) * (7 - len(given))  # biases that were not even named
    given, in_dims = given + absent, in_dims + absent
    dims = list(zip(given, in_dims, strict=True))
    stack = [t if d is None else t.movedim(d, 0) for t, d in dims]
    one = [_one(t, d) for t, d in dims]
    _C.check_lstm_cell(*one)
    batched = one[0].dim() == 2

    if all(d is None for d in in_dims[3:]):
        rows = [
            t if t is None else (t.expand(V, *t.shape) if d is None else t).flatten(0, -2)
            for t, d in zip(stack[:3], in_dims, strict=False)
        ]
        state = torch.ops.lstmfused.lstm_cell(*rows, *stack[3:])
        shape = one[0].shape[:-1]
        return tuple(t.unflatten(0, (V, *shape)) for t in state), (0, 0)

    x, h, c = (t if t is None or batched else t.unsqueeze(-2) for t in stack[:3])
    if h is None:
        h = c = x.new_zeros(x.shape[-2], one[4].shape[1])
    state = _C.lstm_cell_composed(x, h, c, *stack[3:])
    return state if batched else tuple(t.squeeze(-2) for t in state), (0, 0)


def _vmap_layer(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Any, Any]:
    """The rule for vmap over V steps of lstm_layer.

    Where all share the weights, V batches (T, B, I) are one batch (T, V * B, I). With stacked
    weights one layer is run after the other.
    """
    V, op, arguments = info.batch_size, torch.ops.lstmfused.lstm_layer, list(given)
    if any(d is not None for d in in_dims[3:7]):
        stacks = [
            op(*(t if d is None else t.select(d, v) for t, d in zip(given, in_dims, strict=True)))
            for v in range(V)
        ]
        return tuple(torch.stack(stack) for stack in zip(*stacks, strict=True)), (0, 0, 0, 0)

    for i, batch in ((0, 1), (1, 0), (2, 0), (7, 1)):  # the dimension of the batch
        t, d = given[i], in_dims[i]
        if t is not None:
            stack = t.expand(V, *t.shape) if d is None else t.movedim(d, 0)
            arguments[i] = stack.movedim(0, batch).flatten(batch, batch + 1)
    output, h, c, cells = op(*arguments)
    B = given[0].shape[1] if in_dims[0] is None else _one(given[0], in_dims[0]).shape[1]
    output, h, c = output.unflatten(1, (V, B)), h.unflatten(0, (V, B)), c.unflatten(0, (V, B))
    if not given[9]:  # no cell states
        return (output, h, c, cells), (1, 0, 0, None)
    return (output, h, c, cells.unflatten(1, (V, B))), (1, 0, 0, 1)


torch.library.register_vmap("lstmfused::lstm_cell", _vmap)
torch.library.register_vmap("lstmfused::lstm_layer", _vmap_layer)
