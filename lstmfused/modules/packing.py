"""Weights in the order in which the kernels for inference read them: see lstm.h."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .._ops import _C

__all__ = ["FORMAT", "Packed", "check_packable", "packed", "unpacked"]

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
UNITS, MULTIPLE, FORMAT = _C.packed_units, _C.packed_multiple, _C.packed_format


class Packed(NamedTuple):
    """Each is flat."""

    weight: Tensor
    bias: Tensor
    scale: Tensor | None


def check_packable(module: nn.LSTMCell | nn.LSTM, kind: str, weights: list[str]) -> None:
    """Raises where ``module``, a ``kind`` of LSTM, would compute something else when packed."""
    if not all(type(module._parameters.get(name)) is nn.Parameter for name in weights):
        raise ValueError(
            f"expected a {kind} whose weights are plain parameters, but they are computed from "
            f"others or uninitialized: first remove the parametrization, or call the lazy {kind}"
        )
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(f"the {kind} has forward hooks, which a packed {kind} would not run")
    if "forward" in vars(module):
        raise ValueError(
            f"the {kind}'s forward has been replaced on the instance: a packed {kind} would not "
            "run it"
        )
    for name, p in module.named_parameters(recurse=False):
        if p.dtype != torch.float32 or p.device.type != "cpu":
            raise ValueError(
                f"expected a {kind} of torch.float32 on cpu, but {name} is {p.dtype} on {p.device}"
            )


@torch.no_grad()
def packed(module: Any, suffix: str, weight_dtype: torch.dtype) -> Packed:
    """The parameters of ``module`` whose names end in ``suffix``."""
    ih, hh = (getattr(module, f"weight_{name}{suffix}") for name in ("ih", "hh"))
    weight = torch.cat([ih, hh], 1)
    bias = weight.new_zeros(len(weight))
    if module.bias:
        bias = getattr(module, f"bias_ih{suffix}") + getattr(module, f"bias_hh{suffix}")
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(f"expected weight_dtype to be one of {WEIGHT_DTYPES}, got {weight_dtype}")
    scale = None
    if weight_dtype == torch.int8:
        largest = pad(weight.abs(), (1, 0)).amax(1, keepdim=True)  # also where I + H is 0
        if not largest.isfinite().all():
            raise ValueError("weights that are not finite cannot be packed to int8")
        scale = largest / 127
        weight = (weight / scale.clamp(min=torch.finfo(torch.float32).tiny)).round()
    return Packed(
        _flat(weight.to(weight_dtype)),
        _flat(bias.unsqueeze(1)),
        None if scale is None else _flat(scale),
    )


def _flat(rows: Tensor) -> Tensor:
    """(4H, K), gate by gate -> flat: for each block of units (K, 4, units), the last one filled up
    with zeros."""
    units, depth = rows.shape[0] // 4, rows.shape[1]
    gates = pad(rows.view(4, units, depth), (0, 0, 0, -units % MULTIPLE))
    return torch.cat([block.permute(2, 0, 1).flatten() for block in gates.split(UNITS, 1)])


def unpacked(packed: Tensor, units: int) -> Tensor:
    """The way back: flat -> (4H, K)."""
    filled = units + -units % MULTIPLE
    depth = len(packed) // (4 * filled) if filled else 0
    whole, rest = divmod(filled, UNITS)
    blocks, last = packed.split([4 * depth * UNITS * whole, 4 * depth * rest])
    gates = torch.cat(
        [
            blocks.view(whole, depth, 4, UNITS).permute(2, 0, 3, 1).reshape(4, -1, depth),
            last.view(depth, 4, rest).permute(1, 2, 0),
        ],
        1,
    )
    return gates[:, :units].reshape(4 * units, depth)
