"""The CUDA kernels' own source on the host, without CUDA: tests/kernels/simt.h is its GPU.

tests/kernels/cuda.cpp compares the kernels with plain loops in double precision. A copy of the
kernels that can do without any one barrier, or wait for what they copy, shows that it would notice.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cases import SANITIZERS, BuildOnce

ROOT = Path(__file__).parents[1]
KERNELS = sorted((ROOT / "csrc" / "cuda" / "kernels").glob("*.h"))
FLAGS = [
    "-std=c++17",
    "-O2",
    "-U_FORTIFY_SOURCE",  # longjmp would object to the stacks of others
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    '-DLSTMFUSED_SIMT="simt_device.h"',
]
SANITIZED = ["-O1", "-g1", *SANITIZERS]
STATEMENT = re.compile(
    r"__syncthreads\(\);|\bwait_(copies|products)<[^;]*>\(\);|publish_copies\(\);"
    r"|finish_products\(sums\);"
)
LIMIT = 120  # seconds, of a quick run, which takes two: without a barrier, a kernel may never end

STATEMENTS = {
    f"{path.name}:{number}": (path.name, number)
    for path in KERNELS
    if path.name != "device.h"
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if STATEMENT.search(line.split("//")[0])
}


def build(root: Path, program: Path, compiler: str, *flags: str) -> None:
    folder = root / "tests" / "kernels"
    command: list[str | Path] = [compiler, *FLAGS, *flags, f"-I{folder}", folder / "cuda.cpp"]
    subprocess.run([*command, "-o", program], check=True)


def run(program: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *words],
        capture_output=True,
        text=True,
        timeout=LIMIT if "quick" in words else None,
        env=os.environ | environment,
    )


@pytest.mark.kernels
@pytest.mark.minutes(1)
@pytest.mark.parametrize("name", ["sanitized", "clang"])
def test_cuda_kernels_on_host(name: str, tmp_path: Path) -> None:
    compiler = os.environ.get("CXX", "c++") if name == "sanitized" else "clang++"
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler} on this machine")
    program = tmp_path / "kernels"
    build(ROOT, program, compiler, "-Werror", *(SANITIZED if name == "sanitized" else ()))
    done = run(program, *(["once"] if name == "sanitized" else []))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "0 failures\n"


# In the copy: which statement is left out.
WITHOUT = """
#include <cstdlib>
static const char* const without_text = std::getenv("WITHOUT");
static const int without = without_text ? std::atoi(without_text) : -1;
"""


@pytest.fixture(scope="session")
def copy(build_once: BuildOnce) -> Path:
    """A program made of a copy of everything, in which each statement is left out on demand."""

    def fill(folder: Path) -> None:
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        shutil.copytree(ROOT / "tests" / "kernels", folder / "tests" / "kernels")
        simt = folder / "tests" / "kernels" / "simt.h"
        simt.write_text(simt.read_text().replace("#pragma once\n", "#pragma once\n" + WITHOUT, 1))
        for index, (name, number) in enumerate(STATEMENTS.values()):
            path = folder / "csrc" / "cuda" / "kernels" / name
            lines = path.read_text().splitlines(keepends=True)
            optional = f"if (without != {index}) {{ \\g<0> }}"
            lines[number - 1], count = STATEMENT.subn(optional, lines[number - 1])
            assert count == 1
            path.write_text("".join(lines))
        build(folder, folder / "kernels", os.environ.get("CXX", "c++"))

    return build_once("cuda_kernels", fill) / "kernels"


def test_statements_are_found() -> None:
    found = [
        (ROOT / "csrc" / "cuda" / "kernels" / name).read_text().splitlines()[number - 1]
        for name, number in STATEMENTS.values()
    ]
    assert any("__syncthreads" in line for line in found)
    for word in ("wait_copies", "wait_products", "publish_copies", "finish_products"):
        assert any(word in line for line in found)


@pytest.mark.kernels
@pytest.mark.minutes(1)
def test_whole_copy_passes(copy: Path) -> None:
    """In every order of the threads."""
    done = run(copy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "0 failures\n"


@pytest.mark.kernels
@pytest.mark.parametrize("index", range(len(STATEMENTS)), ids=STATEMENTS)
def test_copy_without_it_fails(index: int, copy: Path) -> None:
    try:
        done = run(copy, "quick", WITHOUT=str(index))
    except subprocess.TimeoutExpired:
        return
    assert done.returncode != 0, f"{list(STATEMENTS)[index]} may as well not be there"
