"""python -m benchmarks.report RESULT.json: README table and picture from a committed result.

Also prints what a run has found. Needs no torch, so CI can --check the README anywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from .shapes import COLUMNS, MODES

Row = dict[str, Any]
NAMES = {
    "torch": "nn.LSTMCell",
    "compile": "torch.compile(nn.LSTMCell)",
    "onnxruntime": "ONNX Runtime",
    "lstmfused float32": "lstmfused in float32",
    "lstmfused frozen": "lstmfused, frozen",
    "lstmfused batch invariant": "lstmfused, batch-invariant",
    "allocate": "an operator that only allocates",
}


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown that also reads well in a terminal: first column left, the others right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: list[str]) -> str:
        first = cells[0].ljust(widths[0])
        others = [c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([first, *others])} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(map(line, [lines[0], rule, *lines[1:]]))


def duration(microseconds: float) -> str:
    value, unit = (microseconds, "µs") if microseconds < 1000 else (microseconds / 1000, "ms")
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def shape(row: Row) -> str:
    return f"{row['input']}→{row['units']}"


def median(row: Row, name: str) -> float:
    return float(row["microseconds"][name]["median"])


def select(result: Row, **wanted: Any) -> list[Row]:
    """Rows by shape and batch whose fields are as `wanted`."""
    rows = [r for r in result["rows"] if all(r[key] == value for key, value in wanted.items())]
    return sorted(rows, key=lambda r: (r["units"], r["input"], r["batch"]))


def shown(result: Row) -> dict[str, Any]:
    """The dtype and threads of the README and the picture: float32 if there is, most threads."""
    dtypes = [row["dtype"] for row in result["rows"]]
    dtype = "float32" if "float32" in dtypes else dtypes[0]
    return {"dtype": dtype, "threads": max(row["threads"] for row in result["rows"])}


def setting(result: Row) -> str:
    """Processor, threads, dtype: without them a ratio says nothing."""
    dtype, threads = shown(result).values()
    return f"{result['processor']}, {threads} thread{'s' * (threads > 1)}, {dtype}"


def means(rows: list[Row]) -> list[list[str]]:
    """Peer, geometric mean of the speed-ups over it, the worst of them and where, rows."""
    lines = []
    for name, title in NAMES.items():
        found = [row for row in rows if name in row["speedup"]]
        if found:
            mean = geometric_mean(row["speedup"][name] for row in found)
            worst = min(found, key=lambda row: row["speedup"][name])
            where = f"{worst['speedup'][name]:.2f}x ({shape(worst)}, batch {worst['batch']})"
            lines.append([title, f"{mean:.2f}x", where, str(len(found))])
    return lines


def overheads(result: Row) -> list[str]:
    lines = []
    for entry in result["overhead"]:
        times = (f"{NAMES.get(k, k)} {median(entry, k):.2f} µs" for k in entry["microseconds"])
        over = entry["over_empty"].get("lstmfused")
        tail = "" if over is None else f"; lstmfused is {over:.2f} µs above the empty module"
        lines.append(
            f"A call at 16 units, batch 1, no grad, threads {entry['threads']}: "
            f"{', '.join(times)}{tail}."
        )
    return lines


def double_backward(result: Row) -> list[str]:
    """Where the run has it; older ones have not."""
    lines = []
    for row in result.get("double_backward", []):
        times = (f"{NAMES.get(k, k)} {duration(median(row, k))}" for k in row["microseconds"])
        lines.append(
            f"{row['mode']}, {shape(row)} batch {row['batch']}, threads {row['threads']}: "
            + ", ".join(times)
        )
    return [f"Gradients of gradients: {'; '.join(lines)}."] if lines else []


def second_order(result: Row) -> str:
    """What a run of benchmarks.second_order has found, over nn.LSTMCell: a line for each mode."""
    threads = sorted({row["threads"] for row in result["rows"]})
    units = sorted({row["units"] for row in result["rows"]})
    lines = []
    for mode in dict.fromkeys(row["mode"] for row in result["rows"]):
        rows = select(result, mode=mode)
        cells = []
        for count in threads:
            ((_, mean, worst, _),) = means([row for row in rows if row["threads"] == count])
            cells += [mean, worst]
        lines.append([mode, *cells, str(len(rows))])
    columns = [
        f"{what}, {count} thread{'s' * (count > 1)}"
        for count in threads
        for what in ("geometric mean", "worst")
    ]
    clock = {"wall": "time", "cpu": "processor time"}[result["clock"]]
    setting = f"{result['processor']}, float32, {units[0]} to {units[-1]} units"
    title = f"{setting}; how many times less {clock} than nn.LSTMCell takes:"
    return f"{title}\n\n{table(['mode', *columns, 'rows'], lines)}"


def summary(result: Row) -> str:
    """Everything measured, for the terminal."""
    peers = [name for name in NAMES if any(name in r["microseconds"] for r in result["rows"])]
    parts = []
    for dtype, threads, mode in dict.fromkeys(
        (row["dtype"], row["threads"], row["mode"]) for row in result["rows"]
    ):
        rows = select(result, dtype=dtype, threads=threads, mode=mode)

        def cells(row: Row) -> list[str]:
            times = row["microseconds"]
            own = duration(median(row, "lstmfused")) if "lstmfused" in times else ""
            against = [
                f"{duration(median(row, peer))}"
                + (f" ({row['speedup'][peer]:.2f}x)" if peer in row["speedup"] else "")
                if peer in times
                else ""
                for peer in peers
            ]
            limit = "" if row["limit"] is None else duration(row["limit"])
            share = f"{row['share']['lstmfused']:.0%}" if "lstmfused" in row["share"] else ""
            return [shape(row), str(row["batch"]), own, *against, limit, share]

        header = ["in→units", "batch", "lstmfused", *peers, "limit", "reached"]
        parts.append(f"{mode}, {dtype}, threads {threads}\n\n{table(header, map(cells, rows))}")
        if lines := means(rows):
            parts.append(table(["lstmfused over", "geometric mean", "worst", "rows"], lines))
    for threads, roof in result["roofline"].items():
        if roof:
            peak = ", ".join(f"{name} {value:.0f}" for name, value in roof["peak"].items())
            reads = ", ".join(
                f"{int(size) / 2**20:g} MiB {value:.0f}"
                for size, value in roof["bandwidth"].items()
            )
            parts.append(f"Limits, threads {threads}: GFLOP/s {peak}; GB/s reading {reads}.")
    return "\n\n".join(["", *parts, *overheads(result), *double_backward(result)])


def markdown(result: Row) -> str:
    """What stands between the README's markers."""
    versions = {name: v for name, v in result["versions"].items() if v and name != "numpy"}
    revision = (result["revision"] or "unknown")[:10] + " (modified)" * bool(result["dirty"])
    measured = f"{', '.join(f'{name} {v}' for name, v in versions.items())}, revision {revision}"
    parts = [
        f"{setting(result)}; {measured}, {result['date'][:10]}. "
        "Each cell: how many times faster than nn.LSTMCell, and the time of a call."
    ]
    for mode, title in zip(MODES, ("Inference", "Training, forward and backward"), strict=True):
        rows = [r for r in select(result, mode=mode, **shown(result)) if "torch" in r["speedup"]]
        if not rows:
            continue
        cells: dict[str, dict[int, str]] = {}
        for row in rows:
            text = f"{row['speedup']['torch']:.1f}x ({duration(median(row, 'lstmfused'))})"
            cells.setdefault(shape(row), {})[row["batch"]] = text
        header = ["in→units", *(f"batch {batch}" for batch in COLUMNS)]
        lines = ([name, *(by.get(b, "") for b in COLUMNS)] for name, by in cells.items())
        parts += [f"**{title}**", table(header, lines)]
        header = ["lstmfused over", "geometric mean", "worst", "rows"]
        parts.append(table(header, means(rows)))
    return "\n\n".join([*parts, *overheads(result)])


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def insert(readme: str, text: str, name: str = "benchmark") -> str:
    """`readme` with `text` between the markers of that name."""
    begin, end = markers(name)
    if not (readme.count(begin) == readme.count(end) == 1):
        raise SystemExit(f"the README needs one {begin} and one {end}")
    before, rest = readme.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), metavar="README.md")
    parser.add_argument(
        "--full", type=Path, metavar="FULL.json", help="a --full run's: the targets' table, too"
    )
    parser.add_argument(
        "--second", type=Path, metavar="SECOND.json", help="of benchmarks.second_order: its table"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="redraw the picture, too")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if the README is out of date"
    )
    args = parser.parse_args()
    result = json.loads(args.result.read_text(encoding="utf-8"))
    old = args.readme.read_text(encoding="utf-8")
    new = insert(old, markdown(result))
    if args.full:
        from . import targets

        full = json.loads(args.full.read_text(encoding="utf-8"))
        new = insert(new, targets.markdown(full), "targets")
    if args.second:
        second = json.loads(args.second.read_text(encoding="utf-8"))
        new = insert(new, second_order(second), "second-order")
    if args.check:
        if new != old:
            files = " and ".join(map(str, filter(None, (args.result, args.full, args.second))))
            print(f"{args.readme} is not what {files} says: run this without --check")
        return int(new != old)
    args.readme.write_text(new, encoding="utf-8")
    if args.plot:
        from .plot import plot

        plot(result, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
