"""The layer on CUDA tensors, the fused step in a loop: its oracle is the layer on the CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cuda_cases import missing
from torch import Tensor

import lstmfused

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

T, B, I, H = 7, 5, 9, 33
RESET, LENGTHS = torch.rand(T, B) < 0.3, torch.tensor([7, 0, 3, 1, 6])
MASKS: list[dict[str, Tensor]] = [{}, {"reset": RESET}, {"lengths": LENGTHS}]
MASKS += [{"reset": RESET, "lengths": LENGTHS}]
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def layer() -> lstmfused.LSTM:
    torch.manual_seed(0)
    return lstmfused.LSTM(I, H, 2, bidirectional=True, dtype=torch.float64)


@pytest.mark.parametrize("masks", MASKS, ids=lambda masks: "+".join(masks) or "plain")
def test_outputs_and_gradients(device: str, masks: dict[str, Tensor]) -> None:
    given = [torch.randn(s, dtype=torch.float64) for s in ((T, B, I), (4, B, H), (4, B, H))]
    found = []
    for place in ("cpu", device):
        model = layer().to(place)
        x, h, c = (t.to(place).requires_grad_() for t in given)
        there = {name: mask.to(place) for name, mask in masks.items()}
        output, state, cells = model(x, (h, c), **there, return_cell_states=True)
        results: tuple[Any, ...] = (output, *state, cells)
        with torch.no_grad():
            again, _ = model(x, (h, c), **there)
        close(again, output.detach())
        leaves = [x, h, c, *model.parameters()]
        gradients = torch.autograd.grad([r.sin().sum() for r in results], leaves)
        found.append([t.detach().cpu() for t in (*results, *gradients)])
    for there_, here in zip(*found, strict=True):
        close(there_, here)


def test_in_a_graph_without_synchronization(device: str) -> None:
    """Lengths and resets are read on the device: another replay, other masks."""
    model = layer().to(device)
    x, reset = torch.randn(T, B, I, device=device, dtype=torch.float64), RESET.to(device)
    lengths = LENGTHS.to(device)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(x, reset=reset, lengths=lengths)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output, _ = model(x, reset=reset, lengths=lengths)
        for _ in range(3):
            lengths.copy_(torch.randint(0, T + 1, (B,)))
            reset.copy_(torch.rand(T, B) < 0.3)
            graph.replay()
            close(output, model(x, reset=reset, lengths=lengths)[0])
