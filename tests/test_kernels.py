"""The kernels alone, without torch: under sanitizers, by another compiler, for another processor.

tests/kernels/cpu.cpp compares them with plain loops in double precision.
"""

import os
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cases import SANITIZERS

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "csrc" / "cpu" / "kernels" / "kernels.cpp"
DRIVER = ROOT / "tests" / "kernels" / "cpu.cpp"
BUILT = runpy.run_path(str(KERNELS.with_name("variants.py")))
ORDER = list(BUILT["VARIANTS"])  # each runs where a later one does


class Build(NamedTuple):
    compiler: str
    flags: tuple[str, ...] = ()  # of the kernels
    link: tuple[str, ...] = ()
    runner: tuple[str, ...] = ()


CXX = os.environ.get("CXX", "c++")
# The driver is not instrumented: its plain loops would take most of the time. What the kernels read
# and write is on the heap, which is the sanitizer's all the same. Its checks are calls: inline,
# those of so many unrolled loads and stores take minutes to compile.
AS_CALLS = ("--param", "asan-instrumentation-with-call-threshold=0")
BUILDS = {
    "plain": Build(CXX),
    "sanitized": Build(
        CXX,
        ("-O1", "-g1", "-DLSTMFUSED_INLINED=", *SANITIZERS, *AS_CALLS),
        link=SANITIZERS,
    ),
    "clang": Build(next(filter(shutil.which, ("clang++", "clang++-14")), "clang++"), ("-O1",)),
    "aarch64": Build("aarch64-linux-gnu-g++", link=("-static",), runner=("qemu-aarch64",)),
}
CASES = [(name, v) for v in BUILT["VARIANTS"] for name in ("sanitized", "clang")]
# Where dispatch prefers another, no test of the extension runs it.
CASES += [("plain", v) for v in BUILT["VARIANTS"] if v == "avx512_bf16"]


@pytest.mark.kernels
@pytest.mark.minutes(2)
@pytest.mark.parametrize(("name", "variant"), [*CASES, ("aarch64", "default")])
def test_kernels_alone(name: str, variant: str, tmp_path: Path) -> None:
    build = BUILDS[name]
    for tool in (build.compiler, *build.runner):
        if not shutil.which(tool):
            pytest.skip(f"no {tool} on this machine")
    best = torch.backends.cpu.get_cpu_capability().lower()
    if best == "avx512" and torch.cpu._is_avx512_bf16_supported():
        best = "avx512_bf16"
    if variant != "default" and ORDER.index(variant) > ORDER.index(best):
        pytest.skip(f"this processor has {best}, not {variant}")
    if name == "sanitized" and variant.startswith("avx512") and "SANITIZE_AVX512" not in os.environ:
        pytest.skip("many minutes of compilation: set SANITIZE_AVX512 to have it")

    def compile(*options: str | Path) -> None:
        subprocess.run([build.compiler, *options], check=True)

    program, driver, kernels = (tmp_path / name for name in ("program", "driver.o", "kernels.o"))
    isa = f"-DLSTMFUSED_ISA={variant}"
    flags = (*BUILT["FLAGS"], *build.flags, *BUILT["VARIANTS"][variant])
    compile(*flags, isa, "-c", KERNELS, "-o", kernels)
    compile("-std=c++17", "-O2", "-Wall", "-Wextra", isa, "-c", DRIVER, "-o", driver)
    compile(*build.link, driver, kernels, "-o", program, "-lm")
    done = subprocess.run([*build.runner, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{variant}: 0 failures\n"
