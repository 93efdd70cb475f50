"""The least time that a row can take at the rates measured on this device."""

from __future__ import annotations

from typing import Any

from ..shapes import Case

L2_SHARE = 0.8  # of the cache is what a loop can count on


def floor(ceilings: dict[str, Any] | None, case: Case, precision: str, cold: bool) -> float | None:
    """Microseconds: max(bytes / bandwidth, flops / rate); None if a ceiling was not measured.

    What fits the L2 cache is read from there again and again, unless other weights come between.
    """
    ceilings = ceilings or {}
    rate = ceilings.get("matmul_tflops", {}).get(precision)
    cached = not cold and case.bytes <= L2_SHARE * ceilings.get("l2_bytes", 0)
    bandwidth = (cached and ceilings.get("l2_read_gbs")) or ceilings.get("copy_gbs")
    if not rate or not bandwidth:
        return None
    return float(max(case.bytes / bandwidth * 1e-3, case.flops / rate * 1e-6))
