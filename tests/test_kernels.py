"""The kernels alone, without torch: under sanitizers, by another compiler, for another processor.

tests/kernels.cpp compares them with plain loops in double precision.
"""

import os
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCES = (ROOT / "csrc" / "cpu" / "kernels" / "kernels.cpp", ROOT / "tests" / "kernels.cpp")
BUILT = runpy.run_path(str(SOURCES[0].with_name("variants.py")))
ORDER = list(BUILT["VARIANTS"])  # each runs where a later one does


# Checks as calls: inline, those of so many unrolled loads and stores take minutes to compile.
SANITIZE = (
    *("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    *("--param", "asan-instrumentation-with-call-threshold=0"),
)


class Build(NamedTuple):
    compiler: str
    flags: tuple[str, ...] = ()
    runner: tuple[str, ...] = ()


BUILDS = {
    "sanitized": Build(
        os.environ.get("CXX", "c++"),
        SANITIZE,
    ),
    "clang": Build(next(filter(shutil.which, ("clang++", "clang++-14")), "clang++"), ("-O1",)),
    "aarch64": Build("aarch64-linux-gnu-g++", ("-static",), ("qemu-aarch64",)),
}
CASES = [(name, v) for name in ("sanitized", "clang") for v in BUILT["VARIANTS"]]


@pytest.mark.kernels
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
    program = tmp_path / "kernels"
    flags = [*BUILT["FLAGS"], *build.flags, *(BUILT["VARIANTS"][variant])]
    subprocess.run(
        [build.compiler, *flags, f"-DLSTMFUSED_ISA={variant}", *SOURCES, "-o", program, "-lm"],
        check=True,
    )
    done = subprocess.run([*build.runner, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{variant}: 0 failures\n"
