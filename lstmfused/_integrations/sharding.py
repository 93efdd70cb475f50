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

    # Of a layer: T steps of a batch, the batch first, parameters, their gradients, no tensor.
    kinds = {"t": tensor.Shard(1), "b": rows, "p": whole, "g": summed, "-": None}

    def layer(
        outputs: str, arguments: str, wanted_by: int | None, *given: Any
    ) -> list[tuple[Placements, Placements]]:
        """Each output and argument is of a kind; an output that is not wanted has no element."""
        wanted = [True] * len(outputs)
        if wanted_by is not None:
            asked = given[wanted_by]
            wanted = [*wanted[:-1], asked] if isinstance(asked, bool) else asked
        ways = []
        for shard in (False, True):
            of = {kind: p if shard or p is None else whole for kind, p in kinds.items()}
            made = [of[k] if w else whole for k, w in zip(outputs, wanted, strict=True)]
            taken = [
                of[k] if t is not None else None for k, t in zip(arguments, given, strict=True)
            ]
            ways.append((made, taken))
        return ways

    def register_op(op: Any, ways: Any) -> None:
        register_sharding(op.default)(ways)
        # Which gradients are wanted decides on the outputs: torch caches them by numbers alone.
        info = tensor.DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[op.default]
        types = [str(argument.type) for argument in op.default._schema.arguments]
        info.static_argnum = next((i for i, t in enumerate(types) if "bool" in t), len(types))

    register_op(ops.lstm_cell, partial(step, 2))
    register_op(ops.lstm_cell_forward, partial(step, 3))
    register_op(ops.lstm_cell_backward, backward)
    register_op(ops.lstm_layer, partial(layer, "tbbt", "tbbppppt--", 9))
    register_op(ops.lstm_layer_forward, partial(layer, "ttt", "tbbppppt-", None))
    register_op(ops.lstm_layer_backward, partial(layer, "tbbgggg", "tbbtttttppt--", 12))
