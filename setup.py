"""Builds lstmfused._C: the operators against torch, the kernels once for each instruction set."""

import runpy
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
except ImportError as error:
    sys.exit(
        f"lstmfused is built against your torch, and none can be imported here ({error}): "
        "install torch, then run `pip install --no-build-isolation .`"
    )

CSRC = Path("csrc")
KERNEL_SOURCE = CSRC / "cpu" / "kernels.cpp"
FLAGS, VARIANTS = itemgetter("FLAGS", "VARIANTS")(runpy.run_path(str(CSRC / "cpu" / "variants.py")))


class Build(BuildExtension):  # type: ignore[misc]  # torch leaves it untyped
    """BuildExtension, and beside it the kernels, which must not see torch's headers."""

    def run(self) -> None:
        super().run()
        built = Path(self.get_ext_fullpath("lstmfused._C")).with_name("_build.py")
        built.write_text(f'TORCH = "{torch.__version__}"\nVARIANTS = "{", ".join(VARIANTS)}"\n')

    def build_extension(self, ext: Extension) -> None:
        if not shutil.which(get_cxx_compiler()):
            sys.exit(
                f"lstmfused needs a C++ compiler, and `{get_cxx_compiler()}` is not found: install "
                "one (apt-get install g++; xcode-select --install) or name yours in CXX"
            )
        with ThreadPoolExecutor() as pool:
            ext.extra_objects += pool.map(self.compile_variant, VARIANTS)
        super().build_extension(ext)

    def compile_variant(self, isa: str) -> str:
        target = Path(self.build_temp) / f"kernels_{isa}.o"
        inputs = [KERNEL_SOURCE, *CSRC.glob("*.h"), *CSRC.glob("cpu/*.[hp]*"), Path(__file__)]
        if not target.exists() or any(target.stat().st_mtime < i.stat().st_mtime for i in inputs):
            target.parent.mkdir(parents=True, exist_ok=True)
            flags = [*FLAGS, *VARIANTS[isa], f"-DLSTMFUSED_ISA={isa}"]
            self.spawn([get_cxx_compiler(), *flags, "-c", str(KERNEL_SOURCE), "-o", str(target)])
        return str(target)


setup(
    ext_modules=[
        CppExtension(
            "lstmfused._C",
            [str(CSRC / f"{name}.cpp") for name in ("ops", "checks", "autograd", "cpu/lstm_cpu")],
            # at::parallel_for is serial without OpenMP; not linked, for torch brings its own copy.
            extra_compile_args=["-O2", "-g0", "-Wall"]
            + (["-fopenmp"] if sys.platform == "linux" else []),
        )
    ],
    cmdclass={"build_ext": Build},
)
