"""What a build that does not fit says: one line that names the command to mend it."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lstmfused

PACKAGE = Path(lstmfused.__file__).parent
SETUP = PACKAGE.parent / "setup.py"
REMEDY = "pip install --no-build-isolation ."


def last_line(*command: str, cwd: Path, **environment: str) -> str:
    """Of what a command says that fails."""
    run = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert run.returncode != 0
    return run.stderr.splitlines()[-1]


@pytest.mark.parametrize("built_for", [None, "2.3.1", "12.13.0"])
def test_import(tmp_path: Path, built_for: str | None) -> None:
    shutil.copytree(PACKAGE, tmp_path / "lstmfused")
    absent = "raise ModuleNotFoundError"  # deleted, it would be found through an editable install
    build = f'TORCH = "{built_for}"\nVARIANTS = ""\n' if built_for else absent
    (tmp_path / "lstmfused" / "_build.py").write_text(build)
    line = last_line("-c", "import lstmfused", cwd=tmp_path)
    assert line.startswith("ImportError: lstmfused")
    assert REMEDY in line
    if built_for:
        assert f"built for torch {built_for}, but torch {torch.__version__} is loaded" in line


def test_extension_that_does_not_load(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "lstmfused")
    (extension,) = (tmp_path / "lstmfused").glob("_C.*.so")
    extension.write_bytes(b"not a library")
    line = last_line("-c", "import lstmfused", cwd=tmp_path)
    assert line.startswith("ImportError: lstmfused does not load")
    assert REMEDY in line


def test_build_without_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')")
    line = last_line(str(SETUP), "--version", cwd=SETUP.parent, PYTHONPATH=str(tmp_path))
    assert "install torch" in line
    assert REMEDY in line


def test_build_with_another_torch(tmp_path: Path) -> None:
    pretence = "import torch; torch.__version__ = '2.9.1'"
    (tmp_path / "sitecustomize.py").write_text(pretence)
    line = last_line(str(SETUP), "--version", cwd=SETUP.parent, PYTHONPATH=str(tmp_path))
    assert line == "lstmfused builds with torch 2.11 to 2.13, not 2.9.1: install one of those"


@pytest.mark.parametrize("label", ["0", "1"])
def test_version_of_a_wheel(label: str) -> None:
    minor = ".".join(torch.__version__.split(".")[:2])
    command = [sys.executable, str(SETUP), "--version"]
    environment = {"LSTMFUSED_LABEL": label, "LSTMFUSED_CUDA": "0"}
    run = subprocess.run(
        command, cwd=SETUP.parent, env=environment, capture_output=True, text=True, check=True
    )
    expected = f"{lstmfused.__version__}+torch{minor}" if label == "1" else lstmfused.__version__
    assert run.stdout.splitlines()[-1] == expected


def test_build_with_cuda_but_no_nvcc(tmp_path: Path) -> None:
    absent = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)}
    line = last_line(str(SETUP), "--version", cwd=SETUP.parent, LSTMFUSED_CUDA="1", **absent)
    assert "no nvcc is found on PATH" in line
    assert "CUDA_HOME" in line
    line = last_line(str(SETUP), "--version", cwd=SETUP.parent, LSTMFUSED_CUDA="yes", **absent)
    assert line == "LSTMFUSED_CUDA is 0 or 1, not 'yes'"


@pytest.mark.skipif(not lstmfused._ops._C.cuda_architectures, reason="built without CUDA")
def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = runpy.run_path(str(SETUP.parent / "csrc" / "cuda" / "kernels" / "nvcc.py"))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert set(nvcc["arch_list"](nvcc["find_nvcc"]()).split(";")) <= set(
        nvcc["ARCH_LIST"].split(";")
    )
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6+PTX")
    assert nvcc["arch_list"](nvcc["find_nvcc"]()) == "8.6+PTX"


def test_needs_no_cuda() -> None:
    """What it asks of other libraries is in every torch, with CUDA and without."""
    if not shutil.which("nm"):
        pytest.skip("no nm on this machine")
    (extension,) = PACKAGE.glob("_C.*.so")
    command = ["nm", "--dynamic", "--demangle", "--undefined-only", str(extension)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "at::_ops::" in symbols
    assert not [line for line in symbols.splitlines() if re.search(r"\bcu(da|blas)|::cuda::", line)]


def test_build_without_compiler(tmp_path: Path) -> None:
    build = ("build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path))
    line = last_line(str(SETUP), *build, cwd=SETUP.parent, CXX="absent-compiler")
    assert "needs a C++ compiler, and `absent-compiler` is not found" in line
