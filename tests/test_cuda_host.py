"""What of the CUDA cell can be told without a device."""

from __future__ import annotations

import re
import warnings
from itertools import product
from typing import Any

import pytest
import torch
from cases import (
    activated_gates,
    cell,
    random_arguments,
)
from cuda_cases import ALL, FORMS, every_dtype, incoming, ops
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import record
from lstmfused._ops import _C

# What torch has to say of a device is shown, but no error of ours.
pytestmark = pytest.mark.filterwarnings("default")

# --------------------------------------------------------------------------------------------------
# Without a device


def test_architectures_are_named() -> None:
    one = r"\d+\.\d+[af]?(\+PTX)?"
    assert isinstance(_C.cuda_architectures, str)
    assert re.fullmatch(f"({one}(;{one})*)?", _C.cuda_architectures)


@pytest.mark.parametrize(
    "op", ["lstm_cell", "lstm_cell_forward", "lstm_cell_backward", "lstm_cell_backward_reuse_gates"]
)
def test_cuda_kernels_are_registered_where_they_are_built(op: str) -> None:
    found = torch._C._dispatch_has_kernel_for_dispatch_key(f"lstmfused::{op}", "CUDA")
    assert found == bool(_C.cuda_architectures)


# The newest of the kernels as they are.
MEASURED = record.RESULTS / "nvidia-h200-20261127-02a70ec097.json"
needs_cuda_build = pytest.mark.skipif(
    not _C.cuda_architectures, reason="the extension was built without CUDA"
)


@needs_cuda_build
def test_the_paths_chosen_are_those_that_were_measured_as_fastest() -> None:
    """Of every path at every size of the grid: forward within 13%, a training step within 15%."""
    hopper, paths = (90, 132, 227 << 10), ("small_batch", "tensor_cores", "warpgroups", "products")
    found = record.load(MEASURED)["crossovers"]
    assert len(found) > 200
    for entry in found:
        tf32 = entry["dtype"] == "tf32"
        dtype = torch.float32 if tf32 else getattr(torch, entry["dtype"])
        sizes = entry["batch"], entry["units"], entry["units"]
        forward, backward = _C.cuda_paths_on(*hopper, dtype, *sizes, tf32)
        assert entry[forward] <= 1.13 * min(entry[k] for k in paths if k in entry), entry
        training = {
            path: entry[f"training {path}"] for path in paths if f"training {path}" in entry
        }
        if training:
            assert training[backward] <= 1.15 * min(training.values()), (entry, backward)


@needs_cuda_build
def test_paths_on_other_devices() -> None:
    """None is chosen that a device does not have."""
    for capability, shared in ((75, 64 << 10), (80, 163 << 10), (89, 99 << 10), (100, 227 << 10)):
        for dtype, B, H, tf32 in product(
            (torch.float32, torch.float64, torch.bfloat16, torch.float16),
            (1, 16, 64, 300, 5000),
            (20, 128, 1024, 2048),
            (False, True),
        ):
            forward, backward = _C.cuda_paths_on(capability, 100, shared, dtype, B, H, H, tf32)
            assert forward != "warpgroups" and backward in ("small_batch", "products")
            half = dtype in (torch.bfloat16, torch.float16)
            if capability < 80 or not (half or (tf32 and dtype == torch.float32)):
                assert forward == "small_batch" if half else forward in ("small_batch", "products")


def describe(tensors: Any) -> list[tuple[Any, ...]]:
    return [(tuple(t.shape), t.dtype, t.stride(), t.device.type) for t in tensors]


@every_dtype
def test_fake_cuda_tensors(dtype: torch.dtype) -> None:
    """What a compiler for CUDA sees, with no device: the results of CPU, on the device."""

    def fake(t: Tensor | None) -> Tensor | None:
        return (
            None
            if t is None
            else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda:0")
        )

    def on_cuda(tensors: Any) -> list[tuple[Any, ...]]:
        return [(*parts, "cuda") for *parts, _ in describe(tensors)]

    for B, form in product((None, 0, 1, 3, 300), FORMS):
        arguments = random_arguments(B, 5, 7, dtype, **form)
        expected = on_cuda(cell(arguments))
        with FakeTensorMode(), torch.no_grad():
            given = arguments.map(fake)  # type: ignore[arg-type]
            assert describe(cell(given)) == expected, (B, form)
    for B in (0, 1, 3, 300):
        arguments = random_arguments(B, 5, 7, dtype)
        back = [*incoming(arguments), activated_gates(arguments), *arguments[:5]]
        expected = on_cuda(ops.lstm_cell_forward(*arguments))
        with FakeTensorMode():
            given = arguments.map(fake)  # type: ignore[arg-type]
            assert describe(ops.lstm_cell_forward(*given)) == expected, B
        for mask in (ALL, [True, False, False, True, False, True, False], [False] * 7):
            expected = on_cuda(ops.lstm_cell_backward(*back, mask))
            with FakeTensorMode():
                found = ops.lstm_cell_backward(*map(fake, back), mask)
                assert describe(found) == expected, (B, mask)


def test_a_build_without_cuda_says_so() -> None:
    if _C.cuda_architectures:
        pytest.skip("the extension was built with CUDA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device here")
    with pytest.raises(NotImplementedError, match="'lstmfused::lstm_cell'"):
        cell(random_arguments(3, 5, 7).map(Tensor.cuda))
