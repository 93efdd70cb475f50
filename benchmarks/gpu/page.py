"""python -m benchmarks.gpu.page: what the README and benchmarks/results/notes.md say of a GPU, from
the results of one run of everything and, of later kernels, of another run's crossovers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

from ..report import duration, insert, table
from .plan import DTYPES, EAGER, GRAPH, TRAINING, TRAINING_GRAPH
from .summary import Row

RESULTS = Path(__file__).resolve().parents[1] / "results"
NOTES = RESULTS / "notes.md"
WHOLE = RESULTS / "nvidia-h200-20261127-8a68f531fb.json"
LATER = RESULTS / "nvidia-h200-20261127-02a70ec097.json"
GROUPS: tuple[tuple[str, Callable[[Row], bool]], ...] = (
    ("B ≤ 8", lambda row: bool(row["batch"] <= 8)),
    ("8 < B ≤ 128", lambda row: bool(8 < row["batch"] <= 128)),
    ("B > 128", lambda row: bool(row["batch"] > 128)),
)
MODES = {GRAPH: "in a CUDA graph", EAGER: "eager, no grad", TRAINING_GRAPH: "training, in a graph"}
MODES |= {TRAINING: "training, eager"}


class Prediction(NamedTuple):
    """`ratio` over nn.LSTMCell in a graph, of square cells; estimated before any GPU had run it."""

    precision: str
    batches: tuple[int, ...]
    units: tuple[int, ...]
    ratio: float


PREDICTED = (
    Prediction("float32", (1,), (128,), 2.7),
    Prediction("float32", (1,), (512,), 2.3),
    Prediction("float32", (1,), (1024,), 1.5),
    Prediction("float32", (8,), (512,), 1.9),
    Prediction("float32", (32,), (512,), 1.35),
    Prediction("float32", (128, 1024, 4096), (512, 1024, 2048), 1.0),
    Prediction("bfloat16", (8,), (512,), 2.1),
    Prediction("bfloat16", (32,), (512,), 1.4),
    Prediction("bfloat16", (128,), (512,), 1.2),
    Prediction("bfloat16", (128,), (1024,), 0.9),
    Prediction("bfloat16", (256, 1024), (1024,), 0.8),
    Prediction("bfloat16", (4096,), (128,), 1.4),
    Prediction("bfloat16", (4096,), (1024,), 0.85),
    Prediction("tf32", (128,), (1024,), 0.7),
)


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def about(data: Row) -> str:
    versions = data["machine"]["versions"]
    return (
        f"{data['machine']['device']['name']}, torch {versions['torch']}, "
        f"kernels of {data['machine']['revision'][:10]}"
    )


def plain(data: Row) -> list[Row]:
    """Each cell once, with its ratio over nn.LSTMCell."""
    rows: Iterable[Row] = data["rows"]
    return [r for r in rows if "torch" in r["speedup"] and not r["cell"].endswith("compiled")]


def overview(data: Row) -> str:
    lines = []
    for mode, said in MODES.items():
        for name, wanted in GROUPS:
            ratios = [
                row["speedup"]["torch"]
                for row in plain(data)
                if row["mode"] == mode and wanted(row)
            ]
            mean = f"**{geometric_mean(ratios):.2f}x**"
            lines.append([said, name, mean, f"{min(ratios):.2f}x", str(len(ratios))])
    header = ["", "batch", "over nn.LSTMCell", "worst row", "rows"]
    return f"{about(data)}; geometric means of all dtypes and sizes.\n\n{table(header, lines)}"


def graphed(whole: Row) -> dict[tuple[str, int, int], Row]:
    return {
        (row["precision"], row["batch"], row["units"]): row
        for row in plain(whole)
        if row["mode"] == GRAPH and row["input"] == row["units"]
    }


def predictions(whole: Row) -> str:
    rows, lines = graphed(whole), []
    for guess in PREDICTED:
        found = [rows.get((guess.precision, b, h)) for b in guess.batches for h in guess.units]
        ratios = [row["speedup"]["torch"] for row in found if row]
        batches, units = (", ".join(map(str, given)) for given in (guess.batches, guess.units))
        measured = " to ".join(f"{r:.2f}x" for r in sorted({min(ratios), max(ratios)}))
        lines.append([guess.precision, batches, units, f"{guess.ratio:.2f}x", measured])
    return table(["precision", "B", "I = H", "predicted", "measured"], lines)


def kernels(whole: Row, later: Row) -> str:
    """A step in a graph: then, now by the chosen path, and nn.LSTMCell's; the worst first."""
    from lstmfused._ops import _C

    if not _C.cuda_architectures:
        raise SystemExit("error: which path is chosen only a build with CUDA can tell")
    import torch

    rows, lines = graphed(whole), []
    for entry in later["crossovers"]:
        key = entry["precision"], entry["batch"], entry["units"]
        if key not in rows:
            continue
        before = rows[key]["microseconds"]
        tf32 = entry["precision"] == "tf32"
        dtype = getattr(torch, DTYPES[entry["precision"]])
        sizes = entry["batch"], entry["units"], entry["units"]
        path, _ = _C.cuda_paths_on(90, 132, 227 << 10, dtype, *sizes, tf32)
        now, torchs = entry["microseconds"][path], before["torch"]["median"]
        then = before["lstmfused"]["median"]
        times = duration(then), duration(now), path, duration(torchs)
        lines.append([*map(str, key), *times, f"{torchs / now:.2f}x"])
    lines.sort(key=lambda line: float(line[-1][:-1]))
    header = ["precision", "B", "I = H", "before", "now", "path", "nn.LSTMCell", "ratio"]
    return table(header, lines)


def notes(whole: Row, later: Row) -> str:
    return f"""# GPU: predicted and measured

Written by `python -m benchmarks.gpu.page`. Ratios are over nn.LSTMCell at the same precision, a
step in a CUDA graph, weights in L2.

## Before a GPU had run it, and then

{about(whole)}.

{predictions(whole)}

## After the kernels were rewritten

{about(later)}: epilogues, few rows, wgmma; and
the dispatch that was read off that run. It measured every path and not nn.LSTMCell, whose times
here are those of the run above, on another machine of the same kind: the ratios span two runs.

{kernels(whole, later)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.page", description=__doc__)
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    args = parser.parse_args()
    whole = load(WHOLE)
    old = args.readme.read_text(encoding="utf-8")
    new = insert(old, overview(whole), "gpu")
    if args.check:
        if new != old:
            print(f"{args.readme} is not what {WHOLE.name} says: run this without --check")
        return int(new != old)
    args.readme.write_text(new, encoding="utf-8")
    NOTES.write_text(notes(whole, load(LATER)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
