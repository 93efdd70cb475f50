"""What a result says: tables, and whether the targets are reached. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import geometric_mean
from typing import Any, NamedTuple

from ..report import duration, median, shape, table
from .plan import BATCHES, COLD, EAGER, GRAPH, MODES, PEERS, PRECISIONS, TRAINING, TRAINING_GRAPH

Row = dict[str, Any]
WORST = 8  # rows named for a target


class Target(NamedTuple):
    """`goal` times as fast as `peer` in geometric mean or, if `every`, in each row."""

    name: str
    peer: str
    goal: float
    wanted: Callable[[Row], bool]
    every: bool = False


def small(row: Row) -> bool:
    return bool(row["batch"] <= 32 and row["units"] <= 512)


def middle(row: Row) -> bool:
    batch, units, precision = row["batch"], row["units"], row["precision"]
    return bool(batch == 128 and 512 <= units <= 1024 and precision == "bfloat16")


def trained(row: Row) -> bool:
    return row["mode"] in (TRAINING, TRAINING_GRAPH)


def other(row: Row) -> bool:
    """Without a target of its own."""
    if trained(row):
        return bool(row["batch"] > 32)
    small_one = row["mode"] in (GRAPH, EAGER) and small(row)
    middle_one = row["mode"] == GRAPH and middle(row)
    return not (small_one or middle_one)


def at_most_128(row: Row) -> bool:
    return bool(row["batch"] <= 128)


TARGETS = (
    Target("graph, B <= 32, H <= 512", "torch", 2.5, lambda r: r["mode"] == GRAPH and small(r)),
    Target("eager, B <= 32, H <= 512", "torch", 3.0, lambda r: r["mode"] == EAGER and small(r)),
    Target(
        "graph, B = 128, H 512 to 1024, bfloat16",
        "torch",
        1.7,
        lambda r: r["mode"] == GRAPH and middle(r),
    ),
    Target("training, B <= 32", "torch", 2.0, lambda r: r["mode"] == TRAINING and r["batch"] <= 32),
    Target(
        "training graph, B <= 32",
        "torch",
        2.0,
        lambda r: r["mode"] == TRAINING_GRAPH and r["batch"] <= 32,
    ),
    Target("every other, inference", "torch", 1.0, lambda r: other(r) and not trained(r), True),
    Target("every other, training", "torch", 1.0, lambda r: other(r) and trained(r), True),
    Target("cuDNN, T = 1, B <= 128", "cudnn", 1.0, at_most_128, True),
    Target("compile, reduce-overhead, B <= 128", "reduce-overhead", 1.0, at_most_128, True),
)


def named(row: Row, peer: str) -> str:
    """The row and its ratio; ~ if the quartiles of the two overlap."""
    ours, theirs = row["microseconds"]["lstmfused"], row["microseconds"][peer]
    near = ours["q1"] <= theirs["q3"] and theirs["q1"] <= ours["q3"]
    where = f"{shape(row)} B={row['batch']} {row['precision']} {row['mode']}"
    return f"{'~' * near}{row['speedup'][peer]:.2f}x {where}"


def judged(target: Target, rows: Iterable[Row]) -> Row:
    """`reached` is None where no row tells."""
    found = [
        row
        for row in rows
        if target.peer in row["speedup"]
        and target.wanted(row)
        # A cell that comes again for the sake of compiled peers counts once.
        and (target.peer not in PEERS or not row["cell"].endswith("compiled"))
    ]
    found.sort(key=lambda row: float(row["speedup"][target.peer]))
    ratios = [row["speedup"][target.peer] for row in found]
    mean = geometric_mean(ratios) if ratios else None
    measured = (ratios[0] if target.every else mean) if ratios else None
    return {
        "name": target.name,
        "over": target.peer,
        "goal": target.goal,
        "of": "every row" if target.every else "geometric mean",
        "reached": None if measured is None else measured >= target.goal,
        "geometric_mean": mean,
        "least": ratios[0] if ratios else None,
        "below_goal": sum(ratio < target.goal for ratio in ratios),
        "rows": len(ratios),
        "worst": [named(row, target.peer) for row in found[:WORST]],
    }


def targets(rows: list[Row]) -> list[Row]:
    return [judged(target, rows) for target in TARGETS]


def ratios(rows: list[Row]) -> list[str]:
    """A table for every precision and mode: gain over nn.LSTMCell, time, share of the floor."""
    parts = []
    for precision in PRECISIONS:
        for mode in (m for m in MODES if m != COLD or any(r["mode"] == COLD for r in rows)):
            cells: dict[tuple[int, int], dict[int, str]] = {}
            for row in rows:
                if (row["precision"], row["mode"]) != (precision, mode):
                    continue
                # A cell may come twice, the second time with compiled peers.
                by = cells.setdefault((row["units"], row["input"]), {})
                if "lstmfused" in row["microseconds"]:
                    text = duration(median(row, "lstmfused"))
                    if "torch" in row["speedup"]:
                        text = f"{row['speedup']['torch']:.2f}x {text}"
                    if "lstmfused" in row["share"]:
                        text += f" {row['share']['lstmfused']:.0%}"
                    by.setdefault(row["batch"], text)
                else:
                    by.setdefault(row["batch"], "failed")
            if cells:
                header = ["in→units", *map(str, BATCHES)]
                lines = [
                    [f"{inputs}→{units}", *(cells[units, inputs].get(b, "") for b in BATCHES)]
                    for units, inputs in sorted(cells)
                ]
                parts.append(f"{precision}, {mode}\n\n{table(header, lines)}")
    return parts


def crossing(entries: list[Row]) -> list[str]:
    """The best path of every cell; ! where the automatic choice is more than 3% slower."""
    parts = []
    for precision in PRECISIONS:
        cells: dict[int, dict[int, str]] = {}
        for entry in entries:
            if entry["precision"] != precision or not entry.get("best"):
                continue
            times, best = entry["microseconds"], entry["best"]
            text = f"{best} {duration(times[best])}"
            if (chosen := times.get(entry["auto"])) and chosen > 1.03 * times[best]:
                text += f" !{chosen / times[best]:.2f}"
            cells.setdefault(entry["units"], {})[entry["batch"]] = text
        if cells:
            lines = [[str(u), *(cells[u].get(b, "") for b in BATCHES)] for u in sorted(cells)]
            parts.append(f"best path, {precision}\n\n{table(['units', *map(str, BATCHES)], lines)}")
    return parts


def wrongs(data: Row) -> list[str]:
    """Everything that went wrong, each once."""
    found: dict[str, int] = {}
    for row in [*data["rows"], *data.get("crossovers", ())]:
        for name, message in row.get("broken", {}).items():
            key = f"{name}: {message}"
            found[key] = found.get(key, 0) + 1
        if row.get("error"):
            found[row["error"]] = found.get(row["error"], 0) + 1
    for entry in data["failed"]:
        found[f"{entry['cell']}: {entry['error']}"] = 1
    return [f"{count} x {text}" for text, count in list(found.items())[:30]]


def stages(data: Row) -> list[str]:
    lines = []
    for name, stage in data["stages"].items():
        text = f"{name}: {stage['status']}"
        wrong = stage.get("wrong") or ()
        if isinstance(wrong, list):  # of what the smoke test has checked
            wrong = [f"{entry['cell']} {entry['path']}: {entry['error']}" for entry in wrong]
        else:
            wrong = [wrong] if wrong else []
        for key in ("reason", "counts", "checked"):
            if stage.get(key):
                text += f"; {key} {stage[key]}"
        for tool, found in stage.get("tools", {}).items():
            text += f"; {tool} {found['errors']} errors" + " (cut off)" * found["timed_out"]
        if stage.get("left_out"):
            text += f"; {len(stage['left_out'])} left out"
        lines.append(f"{text} ({stage.get('stage_seconds', 0):.0f} s)")
        if stage["status"] == "failed":
            lines += [f"  {line}" for line in stage.get("tail", stage.get("error", ()))[-8:]]
        lines += [f"  {text}" for text in wrong[:20]]
        for failure in stage.get("failures", ())[:20]:
            lines.append("  " + ": ".join([failure["name"], *failure["lines"][-1:]])[:300])
    return lines


def ceilings(data: Row) -> str:
    found = data.get("ceilings") or {}
    peaks = (f"{name} {rate:.0f}" for name, rate in found.get("matmul_tflops", {}).items())
    numbers = {k: v for k, v in found.items() if isinstance(v, float)}
    others = (f"{name} {value:.4g}" for name, value in numbers.items())
    return f"ceilings: TFLOP/s {', '.join(peaks)}; {', '.join(others)}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def text(data: Row) -> str:
    machine = data["machine"]
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
    dirty = " (modified)" * bool(machine["dirty"])
    head = f"{machine['device']['name']}; {versions}; revision {machine['revision'][:10]}{dirty}"
    verdict = {True: "reached", False: "NOT REACHED", None: "not measured"}
    judgements = targets(data["rows"])
    lines = [
        [
            f"{t['name']} over {t['over']}",
            f"{t['goal']}x {t['of']}",
            verdict[t["reached"]],
            number(t["geometric_mean"]),
            number(t["least"]),
            f"{t['below_goal']} of {t['rows']}",
        ]
        for t in judgements
    ]
    header = ["target", "goal", "", "mean", "least", "rows below"]
    worst = [f"{t['name']}: {'; '.join(t['worst'])}" for t in judgements if t["reached"] is False]
    parts = [
        *ratios(data["rows"]),
        *crossing(data.get("crossovers", [])),
        head,
        "\n".join(stages(data)),
        ceilings(data),
        "\n".join(["wrong or broken:", *wrongs(data)]) if wrongs(data) else "",
        table(header, lines),
        "\n".join(["worst rows (~: within the quartiles):", *worst]) if worst else "",
    ]
    return "\n\n".join(part for part in parts if part)
