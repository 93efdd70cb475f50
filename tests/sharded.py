"""What test_distributed.py runs in one and two processes: cells on DTensors, torch's and ours."""

from __future__ import annotations

import copy
from itertools import product

import torch
import torch.distributed as dist
from cases import PARAMETERS, random_arguments
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

import lstmfused

I, H, STEPS = 5, 7, 3


def run(
    cell: nn.Module, mesh: DeviceMesh, rows: int | None, shard: bool, state: bool
) -> tuple[list[Tensor], list[str]]:
    """Outputs and gradients, whole, and where the outputs and the state's gradients lie."""
    arguments = random_arguments(rows, I, H, torch.float64)
    placement = [Shard(0) if shard else Replicate()]
    given = [
        distribute_tensor(t, mesh, placement).requires_grad_() for t in arguments.present()[:3]
    ]
    x, *hx = given if state else given[:1]
    first = tuple(hx) or None
    if first is None and not isinstance(cell, lstmfused.LSTMCell):  # its own lie on no mesh
        first = tuple(t.detach().mul(0) for t in given[1:])
    with torch.no_grad():
        alone = cell(x, first)
    h, c = cell(x, first)
    for found, want in zip(alone, (h, c), strict=True):
        assert torch.equal(found.full_tensor(), want.full_tensor())
    for _ in range(STEPS - 1):
        h, c = cell(x, (h, c))
    (h.square().sum() + c.sum()).backward()
    gradients = [getattr(cell, name).grad for name in PARAMETERS]
    gradients += [t.grad for t in (x, *hx)]
    whole = [t.full_tensor() for t in (h, c, *gradients)]
    return whole, [str(t.placements) for t in (h, c, *(t.grad for t in (x, *hx)))]


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    count = 0
    for rows, shard, state in product((None, 4, 5), (False, True), (False, True)):
        if rows is None and shard:
            continue
        torch.manual_seed(0)
        plain = nn.LSTMCell(I, H).double()
        results = []
        for cell in (plain, lstmfused.fuse_(copy.deepcopy(plain))):
            results.append(run(distribute_module(cell, mesh), mesh, rows, shard, state))
        (wanted, where), (found, ours) = results
        for actual, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(actual, want, rtol=1e-12, atol=1e-12)
        if shard:  # nothing was gathered
            assert set(ours) == {"(Shard(dim=0),)"}, ours
        assert where == ours, (where, ours)
        count += 1
    if dist.get_rank() == 0:
        print(f"{count} cases in {dist.get_world_size()} processes")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
