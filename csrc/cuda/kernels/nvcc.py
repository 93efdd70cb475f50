"""How csrc/cuda/kernels.cu is compiled, for setup.py and the tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# For these processors, and for later ones as intermediate code. 9.0a: all of Hopper, with wgmma.
ARCH_LIST = "8.0;9.0a;10.0+PTX"
ARCHITECTURES = [arch.removesuffix("+PTX").replace(".", "") for arch in ARCH_LIST.split(";")]

NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-Wall,-fvisibility=hidden"]


def find_nvcc() -> str | None:
    """None where CUDA is not to be built."""
    wanted = os.environ.get("LSTMFUSED_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"LSTMFUSED_CUDA is 0 or 1, not {wanted!r}")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = None if wanted == "0" else shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    if wanted == "1" and not nvcc:
        sys.exit(
            f"LSTMFUSED_CUDA=1 asks for CUDA, but no nvcc is found on PATH or in {home}/bin: "
            "install the CUDA toolkit, or set CUDA_HOME to where it is"
        )
    return nvcc


def output(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout


def arch_list(nvcc: str) -> str:
    """As TORCH_CUDA_ARCH_LIST has it; by default, of ours what this nvcc knows."""
    known = re.findall(r"compute_(\d+)", output(nvcc, "--list-gpu-arch"))
    ours = [arch for arch in ARCH_LIST.split(";") if re.sub(r"\D", "", arch) in known]
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(ours)


def library_folders(nvcc: str) -> list[str]:
    """Where CUDA's runtime is."""
    log = output(nvcc, "--dryrun", "-x", "cu", os.devnull)
    folders = re.findall(r'"-L([^"]+)"', log)
    if not any((Path(folder) / "libcudart_static.a").exists() for folder in folders):
        sys.exit(
            f"{nvcc} does not tell where libcudart_static.a is ({log.splitlines()[-1]}): "
            "install the CUDA toolkit whole, or set LSTMFUSED_CUDA=0 to do without CUDA"
        )
    return folders
