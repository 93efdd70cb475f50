"""The limit of a case: what its arithmetic and its traffic cost at the rates measured here."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier

import torch

from . import machine
from .shapes import Case

FLAGS = {"AVX512": ["-mavx512f"], "AVX2": ["-mavx2", "-mfma"]}
SIZES = tuple(2**k for k in range(18, 29))  # working sets, 256 KiB to 256 MiB: L2, L3, DRAM
SECONDS = 0.02
REPEATS = 8


@dataclass(frozen=True)
class Roofline:
    """Of all threads together: peaks in GFLOP/s by dtype, bandwidths in GB/s by working set."""

    peak: dict[str, float]
    bandwidth: dict[int, float]

    def best(self, other: Roofline | None) -> Roofline:
        """Of two measurements the higher rates: a limit is what is possible."""
        if other is None:
            return self
        peak = {dtype: max(rate, other.peak[dtype]) for dtype, rate in self.peak.items()}
        reads = {size: max(rate, other.bandwidth[size]) for size, rate in self.bandwidth.items()}
        return Roofline(peak, reads)

    def limit(self, case: Case) -> float:
        """Microseconds no implementation can beat.

        The bandwidth is that of the largest measured working set not above the case's own.
        bfloat16 is held to the peak of its dot products where the processor has them, half
        precision otherwise to the float32 peak: what accumulates in float32 can do that. AMX is not
        looked at.
        """
        peak = self.peak.get(case.dtype, self.peak["float32"])
        size = max((s for s in SIZES if s <= case.bytes), default=SIZES[0])
        return max(case.flops / peak, case.bytes / self.bandwidth[size]) * 1e-3


def build(folder: Path) -> ctypes.CDLL:
    source, library = Path(__file__).with_name("roofline.c"), folder / "roofline.so"
    capability = torch.backends.cpu.get_cpu_capability()
    flags = FLAGS.get(capability, [])
    if capability == "AVX512" and "avx512_bf16" in machine.cpuinfo():
        flags = [*flags, "-mavx512bf16"]
    command = [os.environ.get("CC", "cc"), "-O3", "-shared", "-fPIC", *flags, "-o"]
    subprocess.run([*command, str(library), str(source)], check=True, capture_output=True)
    loaded = ctypes.CDLL(str(library))
    loaded.bandwidth.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_double]
    loaded.bandwidth.restype = ctypes.c_double
    return loaded


def peaks(library: ctypes.CDLL) -> dict[str, Callable[[float], float]]:
    """By dtype: those that the library was compiled with."""
    found = {}
    for dtype in ("float32", "float64", "bfloat16"):
        if function := getattr(library, f"peak_{dtype}", None):
            function.argtypes, function.restype = [ctypes.c_double], ctypes.c_double
            found[dtype] = function
    return found


def rate(threads: int, worker: Callable[[], Callable[[], float]]) -> float:
    """Best sum of the threads' rates, in 1e9 a second; ctypes releases the GIL in each."""
    barrier = Barrier(threads)

    def run() -> list[float]:
        ready, rates = worker(), []
        for _ in range(REPEATS):
            barrier.wait()
            rates.append(ready())
        return rates

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(run) for _ in range(threads)]
    return max(map(sum, zip(*(future.result() for future in futures), strict=True))) * 1e-9


def roofline(threads: int) -> Roofline | None:
    """Measured with as many threads as the cells have; None without a C compiler."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            library = build(Path(folder))
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no C compiler for the roofline, its columns stay empty: {error}")
            return None

    def peak(function: Callable[[float], float]) -> Callable[[], Callable[[], float]]:
        return lambda: lambda: function(SECONDS)

    def read(size: int) -> Callable[[], Callable[[], float]]:
        def worker() -> Callable[[], float]:
            data = torch.ones(size // threads, dtype=torch.uint8)  # written: zero pages are one
            return lambda: library.bandwidth(data.data_ptr(), data.numel(), SECONDS)

        return worker

    return Roofline(
        {dtype: rate(threads, peak(function)) for dtype, function in peaks(library).items()},
        {size: rate(threads, read(size)) for size in SIZES},
    )
