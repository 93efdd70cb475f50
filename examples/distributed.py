"""A recurrent model trained by one process, or by several that share each batch.

    python examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py --mode ddp
    torchrun --nproc-per-node 2 examples/distributed.py --mode fsdp

All start from one seed. The loss is a mean over the batch and the shares are of one size, so the
gradients' average over the processes is the gradient of the joined batch: all three print the same
losses and end with the same weights. With ddp each process holds all of them, with fsdp a part.
"""

import argparse
import sys
from pathlib import Path
from time import sleep

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import lstmfused

TIME, INPUTS, UNITS = 8, 3, 20


class Model(nn.Module):
    """Learns to say the mean of what it has read. B batch, T time, I input size, H units."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = lstmfused.LSTMCell(INPUTS, UNITS)
        self.head = nn.Linear(UNITS, INPUTS)

    def forward(self, sequences: Tensor) -> Tensor:
        """Return (B, I) for sequences (B, T, I)."""
        first, *others = sequences.unbind(dim=1)  # (B, I) each, B of this process's share
        h, c = self.cell(first)  # (B, H) each
        for x in others:
            h, c = self.cell(x, (h, c))
        mean: Tensor = self.head(h)
        return mean


def share_work(model: Model, mode: str) -> nn.Module:
    """Return what to call instead of model, which keeps the parameters to train."""
    if mode == "ddp":
        return DistributedDataParallel(model)
    # The whole model is one unit: its weights are gathered once for all the time steps. If the cell
    # were a unit of its own, each of its calls would gather them again.
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def train(called: nn.Module, share: Tensor, steps: int) -> None:
    """Train on this process's share (B, T, I), and print the losses of the joined batch."""
    optimizer = torch.optim.SGD(called.parameters(), lr=0.5)
    for step in range(1, steps + 1):
        loss = mse_loss(called(share), share.mean(dim=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        joined = loss.detach()
        if dist.is_initialized():
            dist.all_reduce(joined)
            joined /= dist.get_world_size()
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"step {step}: loss {joined.item():.10f}")


def full_weights(model: Model) -> dict[str, Tensor]:
    """The state_dict with the parts of all processes; each process must call this."""
    weights = model.state_dict().items()
    return {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train in one process or in those of torchrun.")
    parser.add_argument("--mode", choices=("ddp", "fsdp"), default="ddp", help="under torchrun")
    parser.add_argument("--steps", type=int, default=10, help="of SGD")
    parser.add_argument("--batch", type=int, default=48, help="sequences of all processes together")
    parser.add_argument("--out", type=Path, help="where to save the weights")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)  # sums in another order change no digit printed here
    model = Model()
    sequences = torch.randn(args.batch, TIME, INPUTS)  # the joined batch, the same everywhere
    called: nn.Module = model
    rank, processes = 0, 1
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        rank, processes = dist.get_rank(), dist.get_world_size()
        called = share_work(model, args.mode)
    if args.batch % processes:
        sys.exit(f"a batch of {args.batch} has no equal shares for {processes} processes")
    share = sequences.chunk(processes)[rank]
    weights = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    if rank == 0:
        held, total = (sum(p.numel() for p in ps) for ps in (weights, model.parameters()))
        work = f"{len(share)} of {args.batch} sequences, {held} of {total} weights"
        print(f"process 1 of {processes}: {work}")
    train(called, share, args.steps)
    del called  # DDP must end before its process group does, or its destructor can hang
    saved = full_weights(model)
    if args.out and rank == 0:
        torch.save(saved, args.out)
    if dist.is_initialized():
        # Gloo frees the last tensors in threads of its own, which must not outlive python.
        sleep(0.1)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
