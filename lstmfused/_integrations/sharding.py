"""How the operators compute on :class:`torch.distributed.tensor.DTensor`: on whole tensors, or each
process on its own rows of the batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

__all__ = ["register"]


Placements = list[Any]  # one for each output, or for each argument: None for what is no tensor


def register(tensor: Any) -> None:
    from torch.distributed.tensor.experimental import register_sharding

    whole, rows, summed = tensor.Replicate(), tensor.Shard(0), tensor.Partial()
    ops = torch.ops.lstmfused

    def placed(placement: Any, arguments: Any) -> Placements:
        return [None if t is None else placement for t in arguments]

    def step(outputs: int, input: Any, *given: Any) -> list[tuple[Placements, Placements]]:
        state, weights = (input, *given[:2]), given[2:]
        return [
            ([of] * outputs, placed(of, state) + placed(whole, weights))
            for of in ((whole, rows) if input.ndim == 2 else (whole,))
        ]

    def backward(*given: Any) -> list[tuple[Placements, Placements]]:
        rowwise, weights, output_mask = given[:6], given[6:8], given[8]
        ways = []
        for of, of_parameters in ((whole, whole), (rows, summed)):
            gradients = [of] * 3 + [of_parameters] * 4
            # One that is not wanted has no element: there is nothing to shard.
            outputs = [
                p if wanted else whole for p, wanted in zip(gradients, output_mask, strict=True)
            ]
            ways.append((outputs, [*placed(of, rowwise), *placed(whole, weights), None]))
        return ways

    def layer(outputs: list[Any], *given: Any) -> list[tuple[Placements, Placements]]:
        (input, hx, cx), weights, (mask, *flags) = given[:3], given[3:7], given[7:]
        ways = []
        for of in (whole, rows):
            steps = whole if of is whole else tensor.Shard(1)
            state = placed(steps, [input]) + placed(of, [hx, cx])
            others = placed(whole, weights) + placed(steps, [mask]) + [None] * len(flags)
            ways.append(([steps if o else of for o in outputs], state + others))
        return ways

    register_sharding(ops.lstm_cell.default)(partial(step, 2))
    register_sharding(ops.lstm_cell_forward.default)(partial(step, 3))
    register_sharding(ops.lstm_cell_backward.default)(backward)
