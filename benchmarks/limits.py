"""The limit of a case: what its arithmetic and its traffic cost at the rates measured here."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import Barrier

import torch

from .cases import COLD, DTYPES, GPU_DTYPES, TRAINING, Case
from .problem import precision
from .record import Json, cpuinfo
from .timing import ROUNDS, by_turns, replayed

FLAGS = {"AVX512": ["-mavx512f"], "AVX2": ["-mavx2", "-mfma"]}
SIZES = tuple(2**k for k in range(18, 29))  # working sets, 256 KiB to 256 MiB: L2, L3, DRAM
SECONDS, REPEATS = 0.02, 8
L2_SHARE = 0.8  # of a GPU's L2 cache is what a loop can count on
MIB = 2**20
DEVICE = "cuda"


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

        def read(size: int) -> float:
            sizes = [s for s in self.bandwidth if s <= size or case.launch == COLD]
            return size / self.bandwidth[max(sizes, default=min(self.bandwidth))]

        passes = case.steps * (2 if case.mode == TRAINING else 1)
        return 1e-3 * max(case.flops / peak, read(case.bytes), passes * read(case.recurrent))


def rooflines(data: Json) -> dict[str, Roofline]:
    """Of a result, by `key`."""
    return {
        name: Roofline(roof["peak"], {int(size): v for size, v in roof["bandwidth"].items()})
        for name, roof in data.get("roofline", {}).items()
    }


def key(threads: int, isa: str) -> str:
    return f"{threads} {isa}".strip()


def measure(data: Json, threads: int, isa: str, device: str) -> None:
    """Into a result. Measured anew, for it may have been disturbed, the best rates are kept."""
    if roof := of_gpu() if device == "cuda" else of_processor(threads):
        name = key(threads, isa)
        data.setdefault("roofline", {})[name] = asdict(roof.best(rooflines(data).get(name)))


# --------------------------------------------------------------------------------------------------


def build(folder: Path) -> ctypes.CDLL:
    source, library = Path(__file__).with_name("roofline.c"), folder / "roofline.so"
    capability = torch.backends.cpu.get_cpu_capability()
    flags = FLAGS.get(capability, [])
    if capability == "AVX512" and "avx512_bf16" in cpuinfo():
        flags = [*flags, "-mavx512bf16"]
    command = [os.environ.get("CC", "cc"), "-O3", "-shared", "-fPIC", *flags, "-o"]
    subprocess.run([*command, str(library), str(source)], check=True, capture_output=True)
    loaded = ctypes.CDLL(str(library))
    loaded.bandwidth.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_double]
    loaded.bandwidth.restype = ctypes.c_double
    for dtype in DTYPES:
        if function := getattr(loaded, f"peak_{dtype}", None):  # compiled for what has it
            function.argtypes, function.restype = [ctypes.c_double], ctypes.c_double
    return loaded


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


def of_processor(threads: int) -> Roofline | None:
    """Measured with as many threads as the cells have; None without a C compiler."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            library = build(Path(folder))
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no C compiler for the roofline, there will be no limits: {error}")
            return None

    def read(size: int) -> Callable[[], float]:
        data = torch.ones(size // threads, dtype=torch.uint8)  # written: zero pages are one
        return lambda: float(library.bandwidth(data.data_ptr(), data.numel(), SECONDS))

    def compute(name: str) -> Callable[[], float]:
        return partial(getattr(library, name), SECONDS)

    names = {dtype: f"peak_{dtype}" for dtype in DTYPES if hasattr(library, f"peak_{dtype}")}
    peak = {dtype: rate(threads, partial(compute, name)) for dtype, name in names.items()}
    if "bfloat16" in peak:  # which may as well be multiplied in float32
        peak["bfloat16"] = max(peak["bfloat16"], peak["float32"])
    return Roofline(peak, {size: rate(threads, partial(read, size)) for size in SIZES})


def of_gpu() -> Roofline:
    """What fits the L2 cache is read from there again and again."""

    def least(body: Callable[[], object], repeats: int) -> float:
        """The least seconds of one run, of graphs that run it `repeats` times."""
        sample = {"": replayed(lambda: [body() for _ in range(repeats)], repeats)}
        return 1e-6 * min(by_turns(sample, 0.06, ROUNDS["cuda"])[""].median for _ in range(5))

    def copied(size: int, repeats: int) -> float:
        """GB/s, bytes read and bytes written."""
        source = torch.rand(size // 4, device=DEVICE)
        target = torch.empty_like(source)
        return 2e-9 * size / least(lambda: target.copy_(source), repeats)

    def read_again(size: int, times: int = 64) -> float:
        """GB/s of a sum that goes over the same bytes again and again in one kernel."""
        rows = torch.rand(size // 4, device=DEVICE).expand(times, -1)
        return 1e-9 * size * times / least(lambda: rows.sum(1), 4)

    def multiplied(name: str, size: int = 8192) -> float:
        """GFLOP/s, on random numbers: zeros are faster."""
        dtype = getattr(torch, "float32" if name == "tf32" else name)
        with precision(name):
            a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            return 2e-9 * size**3 / least(lambda: torch.mm(a, b, out=out), 2)

    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
    with torch.no_grad():
        inside = max(*(read_again(k * MIB) for k in (4, 8, 16, 24)), copied(8 * MIB, 20))
        bandwidth = {0: inside, int(L2_SHARE * cache): copied(512 * MIB, 2)}
        return Roofline({name: multiplied(name) for name in GPU_DTYPES}, bandwidth)
