"""Two processes that share a batch, by DDP or FSDP2, train the weights that one process trains."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from cases import run_python
from torch import Tensor

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch has no torch.distributed with gloo", allow_module_level=True)

EXAMPLE = str(Path(__file__).parent.parent / "examples" / "distributed.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
# Per unit of max(1, |w|): the two sum in float64, in another order.
TOLERANCE = 1e-12


class Run(NamedTuple):
    share: str
    losses: list[str]
    weights: dict[str, Tensor]


def train(folder: Path, *command: str) -> Run:
    file = folder / "weights.pt"
    share, *losses = run_python(*command, f"--out={file}", timeout=120).splitlines()
    return Run(share, losses, torch.load(file))


@pytest.fixture(scope="module")
def initial(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("initial"), EXAMPLE, "--steps=0")


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One process, which takes the whole batch."""
    return train(tmp_path_factory.mktemp("joined"), EXAMPLE)


@pytest.mark.parametrize(("mode", "held"), [("ddp", 2063), ("fsdp", 1042)])
def test_two_processes_train_as_one(
    tmp_path: Path, initial: Run, joined: Run, mode: str, held: int
) -> None:
    shared = train(tmp_path, *TORCHRUN, EXAMPLE, f"--mode={mode}")
    assert joined.share == "process 1 of 1: 48 of 48 sequences, 2063 of 2063 weights"
    assert shared.share == f"process 1 of 2: 24 of 48 sequences, {held} of 2063 weights"
    assert len(shared.losses) == 10
    assert shared.losses == joined.losses

    assert shared.weights.keys() == joined.weights.keys() == initial.weights.keys()
    for name, want in joined.weights.items():
        actual = shared.weights[name]
        assert actual.dtype == torch.float64, name
        assert actual.shape == want.shape, name
        apart = ((actual - want).abs() / want.abs().clamp(min=1)).max()
        assert apart <= TOLERANCE, f"{name}: {apart:.1e}"
        moved = (actual - initial.weights[name]).abs().max()
        assert moved > 1e-3, f"{name}: {moved:.1e}"


@pytest.mark.parametrize("processes", [1, 2])
def test_cells_on_dtensors(processes: int) -> None:
    """Replicated and sharded over the batch, forward and backward, as torch's cell."""
    script = str(Path(__file__).parent / "sharded.py")
    command = ("-W", "ignore", *TORCHRUN[:-1], f"--nproc-per-node={processes}", script)
    said = run_python(*command, timeout=120)
    print(said)  # what was not compared, and why
    assert said.endswith(f" cases in {processes} processes\n")
