"""Builds lstmfused._C: the operators against torch, the CPU's kernels once for each instruction set
and, where nvcc is found, those of CUDA. LSTMFUSED_CUDA=1 or 0 asks for these or does without.
LSTMFUSED_LABEL=1 puts torch's minor version in the wheel's own: 0.2.0+torch2.12."""

import os
import runpy
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

from setuptools import Extension, setup

try:
    import torch
    from torch.utils.cpp_extension import (
        BuildExtension,
        CppExtension,
        _get_cuda_arch_flags,
        get_cxx_compiler,
        include_paths,
    )
except ImportError as error:
    sys.exit(
        f"lstmfused is built against your torch, and none can be imported here ({error}): "
        "install torch, then run `pip install --no-build-isolation .`"
    )

# Torch's C++ interface is another in each minor version, so what is built requires that one. PyPI
# takes no label, but where wheels for several lie together, pip needs it to tell them apart.
TORCH = ".".join(torch.__version__.split(".")[:2])
if TORCH not in ("2.11", "2.12", "2.13"):
    sys.exit(
        f"lstmfused builds with torch 2.11 to 2.13, not {torch.__version__}: install one of those"
    )
VERSION = runpy.run_path("lstmfused/_version.py")["__version__"]
LABEL = f"+torch{TORCH}" if os.environ.get("LSTMFUSED_LABEL") == "1" else ""

CSRC = Path("csrc")
KERNEL_SOURCE = CSRC / "cpu" / "kernels" / "kernels.cpp"
FLAGS, VARIANTS = itemgetter("FLAGS", "VARIANTS")(
    runpy.run_path(str(KERNEL_SOURCE.with_name("variants.py")))
)
CUDA_SOURCE = CSRC / "cuda" / "kernels" / "kernels.cu"
DIGEST = runpy.run_path(str(CSRC / "digest.py"))["digest"]()
nvcc = SimpleNamespace(**runpy.run_path(str(CUDA_SOURCE.with_name("nvcc.py"))))
NVCC = nvcc.find_nvcc()


class Build(BuildExtension):  # type: ignore[misc]  # torch leaves it untyped
    """BuildExtension, and beside it the kernels, which must not see torch's headers."""

    def run(self) -> None:
        super().run()
        built = Path(self.get_ext_fullpath("lstmfused._C")).with_name("_build.py")
        facts = {"TORCH": torch.__version__, "VARIANTS": ", ".join(VARIANTS), "SOURCES": DIGEST}
        built.write_text("".join(f'{name} = "{fact}"\n' for name, fact in facts.items()))

    def build_extension(self, ext: Extension) -> None:
        if not shutil.which(get_cxx_compiler()):
            sys.exit(
                f"lstmfused needs a C++ compiler, and `{get_cxx_compiler()}` is not found: install "
                "one (apt-get install g++; xcode-select --install) or name yours in CXX"
            )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            cuda = [pool.submit(self.compile_cuda, ext)] if NVCC else []
            ext.extra_objects += pool.map(self.compile_variant, VARIANTS)
            ext.extra_objects += [done.result() for done in cuda]
        super().build_extension(ext)

    def compile_variant(self, isa: str) -> str:
        flags = [*FLAGS, *VARIANTS[isa], f"-DLSTMFUSED_ISA={isa}"]
        return self.compile(get_cxx_compiler(), flags, KERNEL_SOURCE, f"kernels_{isa}.o")

    def compile_cuda(self, ext: Extension) -> str:
        """Its runtime is linked in and kept to itself: so the extension loads where there is none,
        and where there is one it leaves torch's alone."""
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures = nvcc.arch_list(NVCC)
        ext.define_macros.append(("LSTMFUSED_CUDA", f'"{architectures}"'))
        ext.library_dirs += nvcc.library_folders(NVCC)
        ext.libraries += ["cudart_static", "dl", "pthread", "rt"]
        ext.extra_link_args.append("-Wl,--exclude-libs,libcudart_static.a")
        hopper = ["-DLSTMFUSED_SM90A"] if "9.0a" in architectures else []  # its own instructions
        flags = [*nvcc.NVCC_FLAGS, "--threads", "0", *hopper, *_get_cuda_arch_flags()]
        return self.compile(NVCC, flags, CUDA_SOURCE, "kernels_cuda.o")

    def compile(self, compiler: str, flags: list[str], source: Path, name: str) -> str:
        """Again only where something has changed."""
        target, command = Path(self.build_temp) / name, Path(self.build_temp) / f"{name}.flags"
        inputs = [source, *CSRC.glob("*.h"), *source.parent.glob("*.h")]
        same = command.exists() and command.read_text() == str((compiler, flags))
        if not same or any(target.stat().st_mtime < i.stat().st_mtime for i in inputs):
            target.parent.mkdir(parents=True, exist_ok=True)
            self.spawn([compiler, *flags, "-c", str(source), "-o", str(target)])
            command.write_text(str((compiler, flags)))
        return str(target)


FOLDERS = [CSRC, CSRC / "autograd", CSRC / "cpu", *([CSRC / "cuda"] if NVCC else [])]

setup(
    version=VERSION + LABEL,
    install_requires=[f"torch=={TORCH}.*"],
    ext_modules=[
        CppExtension(
            "lstmfused._C",
            sorted(str(source) for folder in FOLDERS for source in folder.glob("*.cpp")),
            # at::parallel_for is serial without OpenMP; not linked, for torch brings its own copy.
            # Torch's headers as a system's: warnings are ours alone.
            extra_compile_args=["-O2", "-g0", "-Wall", "-Wshadow"]
            + [f"-isystem{folder}" for folder in include_paths()]
            + (["-fopenmp"] if sys.platform == "linux" else []),
        )
    ],
    cmdclass={"build_ext": Build},
)
