"""python -m tools.bits: hashes of what the CPU kernels compute, to the bit.

Over a grid of instruction sets, dtypes, sizes, batches, threads and modes, one hash for each
instruction set, dtype and mode. Two builds compute the same numbers where these agree: write them
with one build (--out), compare with another (--against).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import lstmfused

CAPABILITIES = ("default", "avx2", "avx512")
SIZES = (
    *((1, 1), (2, 20), (16, 16), (51, 20), (20, 51), (64, 64), (100, 72)),
    *((128, 128), (512, 128), (256, 256), (600, 520)),
)
BATCHES = (1, 2, 3, 5, 8, 16, 17, 33, 64, 97, 300)
# Weights that no cache holds have kernels of their own.
STREAMING, STREAMING_BATCHES = (1100, 1024), (1, 3, 8, 33)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PACKED = (torch.float32, torch.bfloat16, torch.int8)


def grid() -> Iterator[tuple[int, int, int]]:
    yield from ((*size, batch) for size in SIZES for batch in BATCHES)
    yield from ((*STREAMING, batch) for batch in STREAMING_BATCHES)


def update(found: hashlib._Hash, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())


def inference(cell: lstmfused.LSTMCell, x: Tensor, h: Tensor, c: Tensor) -> Iterator[Tensor]:
    with torch.no_grad():
        yield from cell(x, (h, c))
        yield from cell(x)


def invariant(cell: lstmfused.LSTMCell, x: Tensor, h: Tensor, c: Tensor) -> Iterator[Tensor]:
    with torch.no_grad(), lstmfused.batch_invariant():
        yield from cell(x, (h, c))


def training(cell: lstmfused.LSTMCell, x: Tensor, h: Tensor, c: Tensor) -> Iterator[Tensor]:
    leaves = [x.requires_grad_(), h.requires_grad_(), c.requires_grad_(), *cell.parameters()]
    for retain in (True, False):  # with the gate gradients beside the gates, and in their place
        state = cell(x, (h, c))
        grads = [torch.cos(part.detach()) for part in state]
        yield from torch.autograd.grad(state, leaves, grads, retain_graph=retain)


def forward_mode(cell: lstmfused.LSTMCell, x: Tensor, h: Tensor, c: Tensor) -> Iterator[Tensor]:
    weights = [p.detach() for p in cell.parameters()]
    primals = (x, h, c, *weights)

    def step(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return lstmfused.functional.lstm_cell(x, (h, c), *weights)

    yield from torch.func.jvp(step, primals, tuple(torch.cos(p) for p in primals))[1]


MODES = {
    "inference": inference,
    "batch-invariant": invariant,
    "training": training,
    "forward mode": forward_mode,
}


def hashes() -> Iterator[tuple[str, str]]:
    """Those of the instruction set that this process runs."""
    isa = lstmfused.build_info()["cpu kernel"]
    for dtype in DTYPES:
        half = dtype in (torch.bfloat16, torch.float16)
        for mode, run in MODES.items():
            if half and mode == "forward mode":
                continue  # by torch's own products
            for wide in (False, True) if half else (False,):
                found = hashlib.sha256()
                for I, H, B in grid():
                    if (I, H) == STREAMING and mode in ("training", "forward mode"):
                        continue
                    for bias in (True, False):
                        torch.manual_seed(0)
                        cell = lstmfused.LSTMCell(I, H, bias=bias, dtype=dtype)
                        x = torch.randn(B, I, dtype=dtype)
                        h = torch.randn(B, H, dtype=dtype)
                        c = torch.randn(B, H, dtype=torch.float32 if wide else dtype)
                        for threads in (1, 2):
                            torch.set_num_threads(threads)
                            update(found, *run(cell, x, h, c))
                name = f"{isa}, {dtype}{', float32 c' * wide}, {mode}"
                yield name, found.hexdigest()[:16]
    for packed in PACKED:
        found = hashlib.sha256()
        for I, H, B in grid():
            torch.manual_seed(0)
            cell = lstmfused.freeze(lstmfused.LSTMCell(I, H), weight_dtype=packed)
            state = torch.randn(2, B, H)
            x = torch.randn(B, I)
            with torch.no_grad():
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    update(found, *cell(x, (state[0], state[1])))
        yield f"{isa}, packed {packed}", found.hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bits", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the hashes")
    parser.add_argument("--against", type=Path, metavar="FILE.json", help="compare with these")
    parser.add_argument("--this", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.this:
        print(json.dumps(dict(hashes())))
        return 0
    found: dict[str, str] = {}
    for capability in CAPABILITIES:
        done = subprocess.run(
            [sys.executable, "-m", "tools.bits", "--this"],
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found.update(json.loads(done.stdout))
    before = json.loads(args.against.read_text()) if args.against else {}
    for name, hash in found.items():
        print(hash, name, *["DIFFERS"] * (bool(before) and before.get(name) != hash))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(before) and before != found)


if __name__ == "__main__":
    sys.exit(main())
