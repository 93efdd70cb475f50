"""What this device can do at best: bandwidths, matrix products, the cost of a launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from .plan import DEVICE, DTYPES
from .problem import precision
from .record import Clock, Json
from .timing import called, interleaved, replayed

MIB = 2**20
NODES = 200


def best(body: Callable[[], object], repeats: int, seconds: float = 0.3) -> float:
    """The least microseconds of one run of `body`, of graphs that run it `repeats` times."""

    def several() -> None:
        for _ in range(repeats):
            body()

    sample = replayed(several, repeats)
    return min(interleaved({"it": sample}, seconds / 5, seed)["it"].q1 for seed in range(5))


def copy_rate(size: int, repeats: int) -> float:
    """GB/s, bytes read and bytes written."""
    source = torch.rand(size // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / best(lambda: target.copy_(source), repeats) * 1e-3


def read_rate(size: int, times: int) -> float:
    """GB/s of a sum that goes over the same bytes `times` times in one kernel."""
    rows = torch.rand(size // 4, device=DEVICE).expand(times, -1)
    return size * times / best(lambda: rows.sum(1), 4) * 1e-3


def matmul_rate(name: str, size: int) -> float:
    """TFLOP/s, on random numbers: zeros are faster."""
    dtype = getattr(torch, DTYPES[name])
    with precision(name):
        a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * size**3 / best(lambda: torch.mm(a, b, out=out), 2) * 1e-6


def launches() -> dict[str, Any]:
    """Microseconds: a kernel that does nothing as a node of a graph, and called from Python."""

    def nothing() -> None:
        torch.cuda._sleep(0)

    one = torch.zeros(1, device=DEVICE)
    eager = interleaved({"empty": called(nothing), "tiny": called(one.neg_)}, 0.2)
    return {
        "graph_node_us": best(nothing, NODES),
        "tiny_graph_node_us": best(one.neg_, NODES),
        "eager_empty_us": asdict(eager["empty"]),
        "eager_tiny_us": asdict(eager["tiny"]),
    }


def ceilings(clock: Clock, quick: bool, flush: Callable[[Json], None]) -> Json:
    found: Json = {"status": "done", "errors": {}, "matmul_tflops": {}}
    l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
    found["l2_bytes"] = l2
    size = 2048 if quick else 8192

    def matmul(name: str) -> Callable[[], None]:
        return lambda: found["matmul_tflops"].update({name: matmul_rate(name, size)})

    def reads() -> None:
        found["l2_read_by_mib"] = {k: read_rate(k * MIB, 64) for k in (4, 8, 16, 24)}
        found["l2_copy_gbs"] = copy_rate(8 * MIB, 20)
        rates = (*found["l2_read_by_mib"].values(), found["l2_copy_gbs"])
        found["l2_read_gbs"] = max(rates)

    work: dict[str, Callable[[], None]] = {
        "copy": lambda: found.update(copy_gbs=copy_rate(512 * MIB, 2)),
        **{f"matmul {name}": matmul(name) for name in DTYPES},
        "launches": lambda: found.update(launches()),
        "l2": reads,
    }
    with torch.no_grad():
        for name, measure in work.items():
            if not clock.left():
                found["errors"][name] = "no time left"
                found["status"] = "cut"
                continue
            try:
                measure()
            except Exception as error:
                found["errors"][name] = f"{type(error).__name__}: {error}"[:300]
            flush(found)
    return found
