"""Bytes of a training step: what is kept between forward and backward, and the peak of it all."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from .cases import TRAINING
from .problem import Bound


def kept(bound: Bound) -> int:
    """Of the distinct storages saved for backward that are neither inputs nor parameters."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = bound.call()  # while they live, so does what is saved: no address comes twice
    for leaf in bound.problem.leaves.values():
        storages.pop(leaf.untyped_storage().data_ptr(), None)
    del outputs
    return sum(storages.values())


def peak(bound: Bound) -> int:
    """Of what torch's allocator hands out during a step, outputs and gradients included."""
    step = bound.run(TRAINING)
    step()
    for leaf in bound.problem.leaves.values():
        leaf.grad = None
    # Without acc_events, torch before 2.13 warns of further cycles, which are none.
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        step()
    assert profiler.profiler is not None
    results: Any = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most
