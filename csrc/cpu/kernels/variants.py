"""How kernels.cpp is compiled: setup.py builds every variant, tests/test_kernels.py checks it."""

import platform

# -ffp-contract=fast lets a * b + c be one instruction; nothing here lets the order of sums change.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-ffp-contract=fast"]
FLAGS += ["-Wall", "-Wextra", "-Wshadow", "-Wno-psabi"]
VARIANTS: dict[str, list[str]] = {"default": []}
if platform.machine() in ("x86_64", "AMD64"):
    VARIANTS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    VARIANTS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
    VARIANTS["avx512_bf16"] = [*VARIANTS["avx512"], "-mavx512bf16"]
