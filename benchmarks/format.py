"""How figures and tables are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate

NAMES = {
    "torch": "nn.LSTMCell",
    "compile": "torch.compile(nn.LSTMCell)",
    "reduce-overhead": "torch.compile, reduce-overhead",
    "onnxruntime": "ONNX Runtime",
    "cudnn": "nn.LSTM, cuDNN",
    "lstmfused float32": "lstmfused in float32",
    "allocate": "an operator that only allocates",
    "before": "the other checkout",
}


def title(peer: str) -> str:
    return NAMES.get(peer, peer)


def table(header: Sequence[Any], rows: Iterable[Iterable[str]]) -> str:
    """Markdown that also reads well in a terminal: first column left, the others right."""
    align = ("left", *["right"] * (len(header) - 1))
    lines = [list(row) for row in rows]
    return tabulate(lines, header, tablefmt="pipe", colalign=align, disable_numparse=True)


def duration(microseconds: float) -> str:
    value, unit = (microseconds, "µs") if microseconds < 1000 else (microseconds / 1000, "ms")
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def size(value: float) -> str:
    return f"{value / 2**10:.4g} KiB" if value < 2**20 else f"{value / 2**20:.4g} MiB"


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def insert(page: str, text: str, name: str) -> str:
    """`page` with `text` between the markers of that name."""
    begin, end = markers(name)
    if not (page.count(begin) == page.count(end) == 1):
        raise SystemExit(f"the page needs one {begin} and one {end}")
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"
