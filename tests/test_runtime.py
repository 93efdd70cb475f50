"""Threads, processes and instruction sets."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import (
    DTYPES,
    Arguments,
    cell,
    gradients,
    random_arguments,
    random_like,
    run_python,
)
from torch import Tensor

import lstmfused

CAPABILITIES = ("default", "avx2", "avx512")  # torch's names
SHAPES = (
    (1, 16, 16),
    (1, 512, 512),
    (5, 17, 33),
    (8, 128, 128),
    (97, 51, 51),
    (64, 256, 130),
    (33, 1030, 70),
    (2000, 20, 20),
    (200, 512, 512),
)
HERE = Path(__file__).parent


def torchs_capability() -> str:
    return run_python(
        "-c", "import torch; print(torch.backends.cpu.get_cpu_capability().lower())"
    ).strip()


def chosen_kernel(capability: str = "") -> str:
    question = "import lstmfused; print(lstmfused.build_info()['cpu kernel'])"
    return run_python("-c", question, ATEN_CPU_CAPABILITY=capability).strip()


def kernel_of(capability: str) -> str:
    bf16 = capability == "avx512" and torch.cpu._is_avx512_bf16_supported()
    slow = bf16 and "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    return "avx512_bf16" if bf16 and not slow else capability


# Everything but the cell is made before the fork: torch's own threaded operators hang after it.
FORK = """
import hashlib, os, sys, torch
from cases import cell, random_arguments
from lstmfused import LSTM

def digest(tensors):
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()

def call():
    outputs = run()
    return digest([*outputs, *torch.autograd.grad(outputs, inputs, grads)])

def run_layer():
    output, (h, c) = layer(inputs[0])
    return output, h, c

torch.set_num_threads(2)
if sys.argv[2] == "layer":
    layer = LSTM(256, 256)
    inputs, run = [torch.randn(9, 40, 256, requires_grad=True), *layer.parameters()], run_layer
    grads = [torch.ones(9, 40, 256), *[torch.ones(1, 40, 256)] * 2]
else:
    B, state = {"state": (200, True), "no state": (200, False), "no rows": (0, True)}[sys.argv[2]]
    arguments = random_arguments(B, 256, 256, state=state).trainable()
    inputs, run = arguments.present(), lambda: cell(arguments)
    grads = [torch.ones(B, 256)] * 2
before = call() if sys.argv[1] == "used" else None
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    os.write(writing, (call() + call()).encode())
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
twice = os.read(reading, 1000).decode()
assert twice == 2 * call(), "the child computed something else"
assert before in (None, call()), "the parent computes something else after the fork"
"""


def everything(arguments: Arguments) -> list[Tensor]:
    """Outputs of inference and of training, and all gradients."""
    h, c = cell(arguments)
    trained = [t.detach() for t in cell(arguments.trainable())]
    found = gradients(cell, arguments, random_like(h, 1), random_like(c, 2))
    return [h, c, *trained, *found.values()]


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(map(torch.equal, first, second))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        arguments = random_arguments(*shape, dtype)
        torch.set_num_threads(1)
        expected = everything(arguments)
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            assert same_bits(everything(arguments), expected), (shape, threads)


@pytest.mark.parametrize("B", [1, 2, 7, 33, 34])
def test_weights_beyond_the_caches_give_the_same_bits(B: int) -> None:
    """How the units are cut depends on the threads; here they meet few rows, or many and few."""
    arguments = random_arguments(B, 30, 1031)
    torch.set_num_threads(1)
    expected = list(cell(arguments))
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert same_bits(list(cell(arguments)), expected), threads


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_run_gives_the_same_bits(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        arguments = random_arguments(*shape, dtype)
        expected = everything(arguments)
        for _ in range(3):
            assert same_bits(everything(arguments.map(torch.clone)), expected), shape


@pytest.mark.usefixtures("two_threads")
def test_several_python_threads_at_once() -> None:
    work = [random_arguments(*shape, seed=seed) for seed in range(4) for shape in SHAPES]
    expected = [everything(arguments) for arguments in work]
    with ThreadPoolExecutor(6) as pool:
        for found, want in zip(pool.map(everything, work), expected, strict=True):
            assert same_bits(found, want)


def test_python_runs_during_a_call() -> None:
    """A thread that only wakes up and counts does so while the kernel runs."""
    torch.set_num_threads(1)  # so that the call is long on any machine
    arguments = random_arguments(6000, 512, 512)
    running, stop = threading.Event(), threading.Event()
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        while not stop.wait(0.001):
            ticks += running.is_set()

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        running.set()
        cell(arguments)
        running.clear()
    finally:
        stop.set()
        thread.join()
    # With the lock held throughout, at most one tick falls on each end of the call.
    assert ticks >= 4


@pytest.mark.parametrize("form", ["state", "no state", "no rows", "layer"])
@pytest.mark.parametrize("parent", ["fresh", "used"])
def test_after_fork(parent: str, form: str) -> None:
    """Also where the parent's pool of threads, which no child inherits, has run before, and where
    there is so much to fill with zeros that torch would do it in parallel."""
    run_python("-c", FORK, parent, form, timeout=120)


NUMERICAL = {
    "test_cell_state_dtype.py": ["test_step", "test_gradients"],
    "test_gradients.py": ["test_every_form", "test_large"],
    "test_invariance.py": [
        "test_a_row_is_the_same_in_every_batch",
        "test_a_layer_has_the_bits_of_a_stepped_cell",
    ],
    "test_lstm.py": ["test_every_option", "test_half_types", "test_transposed_weights"],
    "test_lstm_masks.py": ["test_small_sizes", "test_holes", "test_many_rows_are_as_few"],
    "test_packed.py": ["test_every_size_and_batch", "test_large"],
    "test_parity.py": [
        "test_every_size_and_batch",
        "test_special_values",
        "test_activations_over_their_whole_range",
    ],
    "test_runtime.py": ["test_any_number_of_threads_gives_the_same_bits"],
}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set(capability: str) -> None:
    """The numerical tests again, in a process that is told to use this instruction set."""
    best = torchs_capability()
    if best not in CAPABILITIES or CAPABILITIES.index(capability) > CAPABILITIES.index(best):
        pytest.skip(f"this processor has {best}, not {capability}")
    if kernel_of(capability) == lstmfused.build_info()["cpu kernel"]:
        pytest.skip(f"{capability} is what all other tests run")
    assert chosen_kernel(capability) == kernel_of(capability)
    tests = [f"{HERE / file}::{test}" for file, tests in NUMERICAL.items() for test in tests]
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:randomly")
    run_python("-m", "pytest", *options, *tests, timeout=1800, ATEN_CPU_CAPABILITY=capability)


def test_best_instruction_set_is_the_default() -> None:
    best = torchs_capability()
    if best not in CAPABILITIES:
        pytest.skip(f"torch calls this processor {best}, for which no kernels are named")
    assert chosen_kernel() == kernel_of(best)


def test_build_info() -> None:
    info = lstmfused.build_info()
    assert info["cpu kernel"] in info["cpu kernels built"].split(", ")
    printed = run_python("-m", "lstmfused")
    assert "cpu kernel" in printed
    assert all(isinstance(key, str) and isinstance(info[key], str) for key in info)


SMAPS = Path("/proc/self/smaps")
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ADVISED = """
import sys, torch, lstmfused
def advised(tensor):
    address, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in open("/proc/self/smaps"):
        first, *flags = line.split()
        if flags and "-" in first and not first.endswith(":"):
            begin, end = (int(word, 16) for word in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return "hg" in flags
with torch.no_grad():
    for rows in 1 << 14, 1 << 17:  # h of 1 MiB, of 8 MiB
        h, c = lstmfused.LSTMCell(1, 16)(torch.ones(rows, 1))
        print(advised(h), advised(c))
"""


@pytest.mark.skipif(not (SMAPS.exists() and LARGE_PAGES.exists()), reason="no large pages here")
def test_large_outputs_ask_for_large_pages() -> None:
    """The kernel's own list of mappings tells which have asked."""
    assert run_python("-c", ADVISED).split("\n")[:2] == ["False False", "True True"]
