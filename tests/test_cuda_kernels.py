"""The CUDA kernels' own source on the host, without CUDA: tests/simt.h is its GPU.

tests/cuda_kernels.cpp compares the kernels with plain loops in double precision. Copies of the
kernels that lack one barrier, or one wait for what they copy, show that it would notice.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = sorted((ROOT / "csrc" / "cuda" / "kernels").glob("*.h"))
FLAGS = [
    "-std=c++17",
    "-O1",
    "-U_FORTIFY_SOURCE",  # longjmp would object to the stacks of others
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    '-DLSTMFUSED_SIMT="simt.h"',
]
SANITIZED = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
STATEMENT = re.compile(
    r"__syncthreads\(\);|\bwait_(copies|products)<[^;]*>\(\);|publish_copies\(\);"
)
LIMIT = 120  # seconds, of a run that takes two: without a barrier, a kernel may never end

STATEMENTS = {
    f"{path.name}:{number}": (path.name, number)
    for path in KERNELS
    if path.name != "device.h"
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if STATEMENT.search(line.split("//")[0])
}


def build(root: Path, program: Path, compiler: str, *flags: str) -> None:
    command = [compiler, *FLAGS, *flags, f"-I{root / 'tests'}"]
    subprocess.run([*command, root / "tests" / "cuda_kernels.cpp", "-o", program], check=True)


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["sanitized", "clang"])
def test_cuda_kernels_on_host(name: str, tmp_path: Path) -> None:
    compiler = os.environ.get("CXX", "c++") if name == "sanitized" else "clang++"
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler} on this machine")
    program = tmp_path / "kernels"
    build(ROOT, program, compiler, "-Werror", *(SANITIZED if name == "sanitized" else ()))
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "0 failures\n"


def run_copy(copy: Path, without: tuple[str, int] | None) -> subprocess.CompletedProcess[str]:
    """The short run of a copy of everything that lacks one statement."""
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    (copy / "tests").mkdir()
    for name in ("simt.h", "numbers.h", "cuda_kernels.cpp"):
        shutil.copy(ROOT / "tests" / name, copy / "tests")
    if without:
        name, number = without
        path = copy / "csrc" / "cuda" / "kernels" / name
        lines = path.read_text().splitlines(keepends=True)
        lines[number - 1], count = STATEMENT.subn(";", lines[number - 1])
        assert count == 1
        path.write_text("".join(lines))
    program = copy / "kernels"
    build(copy, program, os.environ.get("CXX", "c++"))
    return subprocess.run([program, "quick"], capture_output=True, text=True, timeout=LIMIT)


def test_statements_are_found() -> None:
    found = [
        (ROOT / "csrc" / "cuda" / "kernels" / name).read_text().splitlines()[number - 1]
        for name, number in STATEMENTS.values()
    ]
    assert any("__syncthreads" in line for line in found)
    for word in ("wait_copies", "wait_products", "publish_copies"):
        assert any(word in line for line in found)


@pytest.mark.kernels
def test_whole_copy_passes(tmp_path: Path) -> None:
    done = run_copy(tmp_path, None)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "0 failures\n"


@pytest.mark.kernels
@pytest.mark.parametrize("statement", STATEMENTS.values(), ids=STATEMENTS)
def test_copy_without_it_fails(statement: tuple[str, int], tmp_path: Path) -> None:
    try:
        done = run_copy(tmp_path, statement)
    except subprocess.TimeoutExpired:
        return
    assert done.returncode != 0, f"{statement[0]}:{statement[1]} may as well not be there"
