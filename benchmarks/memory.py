"""Bytes of a training step: what is kept between forward and backward, and the peak of it all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from .contestants import Fused, Torch
from .shapes import SHAPES, Case, Shape
from .verify import Forward, Problem

KEPT, PEAK = "memory kept", "memory peak"  # modes of the rows


def kept(problem: Problem, forward: Forward) -> int:
    """Of the distinct storages saved for backward that are neither inputs nor parameters."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()  # while they live, so does what is saved: no address comes twice
    for leaf in problem.leaves.values():
        storages.pop(leaf.untyped_storage().data_ptr(), None)
    del outputs
    return sum(storages.values())


def peak(problem: Problem, forward: Forward) -> int:
    """Of what torch's allocator hands out during a step, outputs and gradients included."""
    step = problem.step(forward)
    step()
    for leaf in problem.leaves.values():
        leaf.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    results: Any = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def memory(threads: int, shapes: tuple[Shape, ...] = SHAPES, seed: int = 0) -> list[dict[str, Any]]:
    """Two rows for each shape at its own batch; `allowed` is the gates and the new cell state."""
    torch.set_num_threads(threads)
    rows = []
    for shape in shapes:
        problem = Problem(Case(threads, "float32", shape, shape.batch, "training"), seed)
        forwards = {who.name: who.forward(problem) for who in (Fused(), Torch())}
        allowed = 5 * problem.cx.nbytes
        for mode, found in (
            (KEPT, {name: kept(problem, f) for name, f in forwards.items()} | {"allowed": allowed}),
            (PEAK, {name: peak(problem, f) for name, f in forwards.items()}),
        ):
            rows.append({**problem.case._replace(mode=mode).columns(), "bytes": found})
    return rows
