"""The machine code of csrc/cuda/kernels, read without a device: registers, spills, instructions.

`python tests/test_cuda_code.py` writes cuda_registers.json anew.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
from cases import BuildOnce

pytestmark = pytest.mark.kernels

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "csrc" / "cuda" / "kernels" / "kernels.cu"
BUDGET = Path(__file__).with_name("cuda_registers.json")
BUILT = runpy.run_path(str(SOURCE.with_name("nvcc.py")))
ARCHITECTURES: list[str] = BUILT["ARCHITECTURES"]
EIGHT = 8  # registers are given to a thread in eights


class Kernel(NamedTuple):
    registers: int
    stack: int
    spilled: int  # bytes stored and loaded


class Compiled(NamedTuple):
    cubin: Path
    report: str  # of ptxas -v
    kernels: dict[str, Kernel]  # by name, as in small_batch<float, 8, 4>


def find(tool: str) -> str | None:
    """On PATH, in the toolkit, or in one of NVIDIA's Python packages."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    places = [home / "bin", *sorted(packages.glob("*/bin"))]
    paths = [shutil.which(tool), *(shutil.which(tool, path=str(place)) for place in places)]
    return next(filter(None, paths), None)


def run(*command: str | Path) -> str:
    """What the command prints, on both streams."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{command} fails:\n{done.stdout}"
    return done.stdout


@functools.cache
def short_name(mangled: str) -> str:
    """small_batch<float, 8, 4>: without namespaces, parameters and casts."""
    name = run("c++filt", mangled).strip()
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N_\w*::|\blstmfused::|\bcuda::", "", name)
    name = re.sub(r"\((int|unsigned int|long|bool|\w+::\w+)\)(?=\d|-)", "", name)
    name = re.sub(r"^(void|int) ", "", name)
    depth, end = 0, len(name)
    for at, letter in enumerate(name):  # the parameters begin outside of every <>
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            end = at
            break
    return name[:end]


REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '\w+'"
    r"(?:(?!Compiling entry function).)*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r"(?:(?!Compiling entry function).)*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def kernels_of(report: str) -> dict[str, Kernel]:
    """What ptxas -v has to say of each kernel."""
    found = {
        short_name(match["name"]): Kernel(
            int(match["registers"]),
            int(match["stack"]),
            int(match["stores"]) + int(match["loads"]),
        )
        for match in REPORT.finditer(report)
    }
    assert len(found) == report.count("Compiling entry function"), f"cannot read:\n{report}"
    return found


def compile_for(architecture: str, nvcc: str, folder: Path) -> None:
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    # Not -split-compile: it makes other code, with arrays on the stack.
    options = ("-gencode", code, "-Xptxas", "-v", "-cubin")
    cubin = folder / f"sm_{architecture}.cubin"
    report = run(nvcc, *BUILT["NVCC_FLAGS"], *options, SOURCE, "-o", cubin)
    cubin.with_suffix(".txt").write_text(report)


@functools.cache
def read_code(architecture: str, folder: Path) -> Compiled:
    cubin = folder / f"sm_{architecture}.cubin"
    report = cubin.with_suffix(".txt").read_text()
    return Compiled(cubin, report, kernels_of(report))


# Not of the session, which would take one architecture after the other: all workers would wait for
# the same compiler.
@pytest.fixture(params=ARCHITECTURES)
def code(request: pytest.FixtureRequest, build_once: BuildOnce) -> Compiled:
    """The kernels, compiled once for each architecture."""
    nvcc = find("nvcc")
    if not nvcc:
        pytest.skip("no nvcc on this machine")
    if not shutil.which("c++filt"):
        pytest.skip("no c++filt on this machine")
    architecture: str = request.param
    fill = functools.partial(compile_for, architecture, nvcc)
    return read_code(architecture, build_once(f"sm_{architecture}", fill))


# ------------------------------------------------------------------------------------------------
# What ptxas says


def test_nothing_is_spilled(code: Compiled) -> None:
    assert code.kernels
    bad = {name: k for name, k in code.kernels.items() if k.stack or k.spilled}
    assert not bad, "\n".join(
        f"{name}: {k.stack} bytes of stack, {k.spilled} bytes spilled" for name, k in bad.items()
    )


def test_no_loss_is_reported(code: Compiled) -> None:
    """As of asynchronous products of which each waits for the one before."""
    lines = code.report.splitlines()
    assert not [line for line in lines if re.search(r"\(C\d+\)|Performance Loss", line)]


def test_registers_stay_in_their_budget(code: Compiled) -> None:
    budget = json.loads(BUDGET.read_text())
    wrong = [
        f"{name}: {kernel.registers} registers, "
        + (f"{budget[name]} allowed" if name in budget else f"not in {BUDGET.name}")
        for name, kernel in sorted(code.kernels.items())
        if kernel.registers > budget.get(name, 0)
    ]
    wrong += [f"{name}: no such kernel" for name in sorted(budget.keys() - code.kernels.keys())]
    advice = f"if that is right, run python {Path(__file__).relative_to(ROOT)}"
    assert not wrong, "\n".join([*wrong, advice])


# ------------------------------------------------------------------------------------------------
# What the processor reads


SECTION = re.compile(r'\s*\.section\s+\.text\.([^\s,"]+)')
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


@functools.cache
def read_instructions(nvdisasm: str, cubin: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    kernel: set[str] = set()
    for line in run(nvdisasm, "-c", cubin).splitlines():
        if section := SECTION.match(line):
            kernel = found.setdefault(short_name(section[1]), set())
        elif instruction := INSTRUCTION.match(line):
            kernel.add(instruction[1])
    ends = {"EXIT", "BPT.TRAP"}  # the latter of a kernel that is for other processors
    assert all(ends & kernel for kernel in found.values()), "cannot read the disassembly"
    return found


@pytest.fixture
def instructions(code: Compiled) -> dict[str, set[str]]:
    """Of each kernel, with their modifiers, as LDG.E.128.CONSTANT."""
    nvdisasm = find("nvdisasm")
    if not nvdisasm:
        pytest.skip("no nvdisasm on this machine: pip install nvidia-cuda-nvdisasm")
    found = read_instructions(nvdisasm, code.cubin)
    assert found.keys() == code.kernels.keys()
    return found


def test_no_unwanted_instruction(instructions: dict[str, set[str]]) -> None:
    """Local memory; atomics, which add in no order; half-precise tanh; float64 unasked."""
    for name, kernel in instructions.items():
        unwanted = r"LDL|STL|ATOM|RED\.|MUFU\.TANH" + (
            "" if "double" in name else r"|D(ADD|MUL|FMA)"
        )
        assert not [i for i in sorted(kernel) if re.match(unwanted, i)], name


# By what a kernel is called, the instructions it lives on.
VECTOR_LOAD = r"LDG\.E(\.\w+)*\.128"
VECTOR_STORE = r"STG\.E(\.\w+)*\.128"
WANTED = {
    # cp.async where rows are whole vectors, else plain loads; ldmatrix, then mma of each type
    r"tensor_cores<.*, true>": [r"LDGSTS\.E(\.\w+)*\.128"],
    r"tensor_cores<": [r"LDSM\.16\.M\w+\.4"],
    r"tensor_cores<bfloat16": [r"HMMA\.16816\.F32\.BF16"],
    r"tensor_cores<float16": [r"HMMA\.16816\.F32$"],
    r"tensor_cores<float,": [r"HMMA\.1688\.F32\.TF32"],
    # weights in vectors that leave the first-level cache alone
    r"small_batch<\w+, \d+, [248]>": [rf"{VECTOR_LOAD}", r"LDG\.E\.(\w+\.)*NA"],
    # and their gradients stored in vectors
    r"small_batch_products<\w+, [248]>": [VECTOR_LOAD, VECTOR_STORE],
    # four elements of a row at a time, of half types 8 bytes
    r"(finish_rows|gate_gradients_kernel)<float, 4>": [VECTOR_LOAD, VECTOR_STORE],
    r"(finish_rows|gate_gradients_kernel)<b?float16, 4>": [r"LDG\.E(\.\w+)*\.64", r"STG\.E\.64"],
    r"tensor_cores<b?float16, .*4, [12], [12], 1": [r"LDG\.E(\.\w+)*\.64", r"STG\.E\.64"],
}
HOPPER = {
    r"warpgroups<bfloat16": [r"LDGSTS\.E(\.\w+)*\.128", r"HGMMA\.64x\d+x16\.F32\.BF16"],
    r"warpgroups<float16": [r"LDGSTS\.E(\.\w+)*\.128", r"HGMMA\.64x\d+x16\.F32$"],
}


@pytest.mark.parametrize("kind", [*WANTED, *HOPPER])
def test_wanted_instructions(code: Compiled, instructions: dict[str, set[str]], kind: str) -> None:
    if kind in HOPPER and code.cubin.stem != "sm_90a":
        kernels = {name: kernel for name, kernel in instructions.items() if re.match(kind, name)}
        assert kernels and not any("HGMMA" in i for kernel in kernels.values() for i in kernel)
        return
    kernels = {name: kernel for name, kernel in instructions.items() if re.match(kind, name)}
    assert kernels, f"no kernel is called {kind}"
    for (name, kernel), wanted in product(kernels.items(), (WANTED | HOPPER)[kind]):
        assert any(re.match(wanted, i) for i in kernel), f"{name} has no {wanted}"


def write_budget() -> None:
    """The most registers of each kernel on any architecture, in whole eights."""
    nvcc = find("nvcc")
    if not nvcc:
        sys.exit("no nvcc on this machine")
    most: dict[str, int] = {}
    for architecture in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            compile_for(architecture, nvcc, Path(folder))
            for name, kernel in read_code(architecture, Path(folder)).kernels.items():
                eights = math.ceil(kernel.registers / EIGHT) * EIGHT
                most[name] = max(most.get(name, 0), eights)
    BUDGET.write_text(json.dumps(most, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    write_budget()
