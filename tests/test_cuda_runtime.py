"""The cell among streams, graphs, threads and devices."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    Arguments,
    Cell,
    activated_gates,
    assert_close,
    cell,
    oracle,
    random_arguments,
    run_python,
)
from cuda_cases import (
    ALL,
    PATHS,
    already,
    check_forward,
    check_gradients,
    compare_gradients,
    every_dtype,
    everything,
    expected_gradients,
    incoming,
    like,
    missing,
    on,
    ops,
    same_bits,
)
from torch import Tensor, nn

import lstmfused

# What torch has to say of a device is shown, but no error of ours.
pytestmark = pytest.mark.filterwarnings("default")

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

# --------------------------------------------------------------------------------------------------
# Repetition, memory, threads


@every_dtype
def test_every_run_gives_the_same_bits(device: str, dtype: torch.dtype) -> None:
    for shape in (*PATHS, (1000, 72, 552), (128, 512, 512)):
        arguments = on(device, *shape, dtype)
        expected = everything(arguments)
        for _ in range(3):
            assert same_bits(everything(arguments.map(torch.clone)), expected), shape


def test_training_gives_the_outputs_of_inference(device: str) -> None:
    for shape in PATHS:
        arguments = on(device, *shape)
        for name, actual, want in zip(
            "hc", cell(arguments.trainable()), cell(arguments), strict=True
        ):
            assert_close(actual, want, torch.tensor(1e-6), (name, shape))


def test_several_python_threads_at_once(device: str) -> None:
    work = [on(device, *shape, seed=seed) for seed in range(3) for shape in PATHS]
    expected = [everything(arguments) for arguments in work]
    with ThreadPoolExecutor(4) as pool:
        for found, want in zip(pool.map(everything, work), expected, strict=True):
            assert same_bits(found, want)


def test_changed_weights_are_seen(device: str) -> None:
    """Nothing that was derived from weights outlives a call."""
    for shape in PATHS:
        arguments = on(device, *shape)
        for _ in range(3):
            check_forward(arguments, shape)
            for t in arguments[3:]:
                assert t is not None
                t.mul_(-0.75)
        arguments.weight_hh.data = like(arguments.weight_hh) / math.sqrt(shape[2])
        check_forward(arguments, shape)


def test_modules_move(device: str) -> None:
    """From CPU, by copies, checkpoints, fuse and casts."""
    plain = nn.LSTMCell(10, 20)
    arguments = random_arguments(5, 10, 20)
    there = arguments.map(lambda t: t.to(device))
    expected = plain(arguments.input, arguments.hx)
    model = nn.ModuleDict({"cell": copy.deepcopy(plain)})
    fused = lstmfused.fuse_(model).to(device)["cell"]
    assert isinstance(fused, lstmfused.LSTMCell)
    loaded = lstmfused.LSTMCell(10, 20, device=device)
    loaded.load_state_dict(plain.state_dict())
    for module in (fused, copy.deepcopy(fused), loaded):
        state = module.initial_state(4)
        assert all(t.shape == (4, 20) and t.device == module.weight_hh.device for t in state)
        outputs = module(there.input, there.hx)
        for actual, want in zip(outputs, expected, strict=True):
            assert actual.device.type == device
            assert_close(actual.cpu(), want, torch.tensor(4e-6), "moved")
    back = copy.deepcopy(loaded).cpu()
    for actual, want in zip(back(arguments.input, arguments.hx), expected, strict=True):
        assert_close(actual, want, torch.tensor(4e-6), "moved back")
    half = copy.deepcopy(loaded).half()
    assert half(there.input.half())[0].dtype == torch.float16


# --------------------------------------------------------------------------------------------------
# Streams, graphs, devices: only where there is CUDA

GRAPHED = ((1, 20, 33), (5, 64, 48), (64, 64, 64), (65, 51, 20))


def warm_up(function: Callable[[], object]) -> None:
    """Off the default stream, as torch wants it before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def overwrite(to: Sequence[Tensor | None], by: Sequence[Tensor | None]) -> None:
    with torch.no_grad():
        for target, source in zip(to, by, strict=True):
            if target is not None and source is not None:
                target.copy_(source)


@every_dtype
def test_graph_of_inference(device: str, dtype: torch.dtype) -> None:
    for shape in GRAPHED:
        static = on(device, *shape, dtype)
        warm_up(lambda: cell(static))  # noqa: B023
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            outputs = cell(static)
        for seed in (1, 2, 3):
            overwrite(static, on(device, *shape, dtype, seed=seed))
            graph.replay()
            check_forward(static, (shape, seed), already(outputs))


FIRST_LAUNCHES = """
import torch
from cases import DTYPES, cell
from cuda_cases import PATHS, already, check_forward, on
torch.ones(8, 8, device="cuda").mm(torch.ones(8, 8, device="cuda"))  # cuBLAS makes its handle
for dtype in DTYPES:
    for shape in (*PATHS, (128, 512, 512), (1000, 512, 512)):
        static = on("cuda", *shape, dtype)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            outputs = cell(static)
        graph.replay()
        check_forward(static, (dtype, shape), already(outputs))
print("all captured")
"""


def test_a_capture_is_the_first_launch(device: str) -> None:
    """Kernels are loaded when they are first launched, which a capture must survive: so in a fresh
    process, without the warm-up of the other tests."""
    assert run_python("-Wignore", "-c", FIRST_LAUNCHES, timeout=120) == "all captured\n"


@every_dtype
def test_graph_of_training(device: str, dtype: torch.dtype) -> None:
    for shape in GRAPHED:
        static = on(device, *shape, dtype).trainable()
        grads = incoming(static)

        def step() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
            outputs = cell(static)  # noqa: B023
            return outputs, torch.autograd.grad(outputs, static.present(), grads)  # noqa: B023

        warm_up(step)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs, found = step()
        for seed in (1, 2, 3):
            overwrite(static, on(device, *shape, dtype, seed=seed))
            overwrite(grads, incoming(static, seed=10 * seed))
            graph.replay()
            check_forward(static, (shape, seed), already(outputs))
            named = dict(zip(Arguments._fields, found, strict=True))
            compare_gradients(named, expected_gradients(static, grads), static, (shape, seed))


def test_graph_of_many_steps(device: str) -> None:
    """A loop in one graph, each step from the state of the one before."""

    def loop(function: Cell, arguments: Arguments) -> tuple[Tensor, Tensor]:
        for _ in range(10):
            h, c = function(arguments)
            arguments = arguments._replace(h=h, c=c)
        return h, c

    static = on(device, 5, 64, 48)
    warm_up(lambda: loop(cell, static))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        outputs = loop(cell, static)
    for seed in (1, 2):
        overwrite(static, on(device, 5, 64, 48, seed=seed))
        graph.replay()
        for actual, want in zip(outputs, loop(oracle, static.double()), strict=True):
            assert_close(actual, want, torch.tensor(1e-5), seed)


def test_graphed_callable(device: str) -> None:
    """torch's own way to put a module's forward and backward in graphs."""
    for B, I, H in GRAPHED:
        module = lstmfused.LSTMCell(I, H, device=device)
        plain = copy.deepcopy(module)
        sample = on(device, B, I, H).trainable()
        given: Any = (sample.input, sample.hx)  # torch names its type more narrowly than it is
        graphed: Any = torch.cuda.make_graphed_callables(module, given)
        for seed in (1, 2):
            fresh = on(device, B, I, H, seed=seed)
            grads = incoming(fresh)
            results = []
            for run, of in ((graphed, module), (plain, plain)):
                x, h, c = (t.clone().requires_grad_() for t in fresh[:3] if t is not None)
                outputs = run(x, (h, c))
                found = torch.autograd.grad(outputs, [x, h, c, *of.parameters()], grads)
                results.append([t.detach().clone() for t in (*outputs, *found)])
            for actual, want in zip(*results, strict=True):
                bound = 4e-6 * want.abs().max().clamp(min=1)
                assert_close(actual, want, bound, (B, I, H, seed))


def sleep(seconds: float) -> None:
    """Keeps the current stream busy, for about that long at 2 GHz."""
    torch.cuda._sleep(int(seconds * 2e9))


@every_dtype
def test_side_stream(device: str, dtype: torch.dtype) -> None:
    """Arguments come late on a stream of their own: a kernel on another would read NaN."""
    for shape in PATHS:
        arguments = on(device, *shape, dtype)
        grads = [g for g in incoming(arguments) if g is not None]
        late = arguments.map(lambda t: torch.full_like(t, math.nan)).trainable()
        late_grads = [torch.full_like(g, math.nan) for g in grads]
        expected = expected_gradients(arguments, grads)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):  # what a first call loads and allocates may wait
                everything(arguments)
        torch.cuda.synchronize()

        with torch.cuda.stream(stream):
            sleep(0.02)
            overwrite(late, arguments)
            outputs = cell(late)
            sleep(0.02)
            overwrite(late_grads, grads)
            found = torch.autograd.grad(outputs, late.present(), late_grads)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        check_forward(arguments, shape, already(outputs))
        named = dict(zip(Arguments._fields, found, strict=True))
        compare_gradients(named, expected, arguments, shape)


def test_nothing_waits_for_the_device(device: str) -> None:
    """Forward and backward return while their stream is still busy with what was before them."""
    for shape, dtype in product(PATHS, DTYPES):
        trainable = on(device, *shape, dtype).trainable()
        grads = incoming(trainable)

        def step() -> Sequence[Tensor]:
            with torch.no_grad():
                cell(trainable)  # noqa: B023
            return torch.autograd.grad(cell(trainable), trainable.present(), grads)  # noqa: B023

        for _ in range(3):  # what a first call loads and allocates may wait
            step()
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            busy = torch.cuda.Event()
            sleep(0.2)
            busy.record()
            step()
            waited = busy.query()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        assert not waited, (shape, dtype)
        torch.cuda.synchronize()


def test_memory_is_given_back(device: str) -> None:
    for shape in PATHS:
        arguments = on(device, *shape)
        everything(arguments)
        everything(arguments)  # cuBLAS keeps a workspace of its own
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        everything(arguments)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before, shape


@pytest.mark.parametrize("name", Arguments._fields)
def test_mixed_devices(device: str, name: str) -> None:
    where = torch.device(device, torch.cuda.current_device())
    devices = f"cpu and {where}" if name == "input" else f"{where} and cpu"
    message = f"at least two devices, {devices}!"
    for B in (3, 40):
        arguments = on(device, B, 5, 7)
        mixed = arguments._replace(**{name: getattr(arguments, name).cpu()})
        for given in (mixed, mixed.trainable()):
            with pytest.raises(RuntimeError, match=message):
                cell(given)
        with pytest.raises(RuntimeError, match=message):
            ops.lstm_cell_forward(*mixed)


@pytest.mark.parametrize("name", ["grad_h", "grad_c", "gates"])
def test_mixed_devices_of_backward(device: str, name: str) -> None:
    arguments = on(device, 3, 5, 7)
    grad_h, grad_c = incoming(arguments)
    given = {"grad_h": grad_h, "grad_c": grad_c, "gates": activated_gates(arguments)}
    given[name] = given[name].cpu()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="at least two devices"):
        ops.lstm_cell_backward(*given.values(), *arguments[:5], ALL)


def test_current_device_stays(device: str) -> None:
    """Also where the tensors lie on another."""
    for index in range(torch.cuda.device_count()):
        before = torch.cuda.current_device()
        everything(on(f"{device}:{index}", 5, 20, 33))
        assert torch.cuda.current_device() == before


def test_second_device(device: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device here")
    for shape, dtype in product(PATHS, DTYPES):
        arguments = on(f"{device}:1", *shape, dtype)
        check_forward(arguments, shape)
        check_gradients(arguments, shape)
        stream = torch.cuda.Stream(1)
        with torch.cuda.stream(stream):
            sleep(0.01)
            fresh = arguments.map(torch.clone)
            outputs = cell(fresh)
        stream.synchronize()
        check_forward(arguments, shape, already(outputs))
