"""What the rows of a full run are held to, and what keeps them from it. Needs no torch.

A row's ratio is the time (or the memory) of a peer over that of the subject, measured by turns in
one run; the peer may be the limit. "At the limit" is what the subject's ratio would be if each of
its steps took as long as an operator that only allocates, in that row or, where it was not
measured, in the median row, and then as long as the roofline says: first come the outputs, then
what is written there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

from .report import NAMES, Row, duration, median, shape, table

WORST = 3  # rows named where a target is not reached
LEAST = 0.02  # of a step, of a part that is named


class Target(NamedTuple):
    """Ratios of `peer` to `subject`: at least `mean` in geometric mean, `each` in every row."""

    what: str
    mean: float | None = None
    each: float | None = None
    peer: str = "torch"
    subject: str = "lstmfused"
    dtype: str = "float32"
    mode: str = "inference"
    wanted: Callable[[Row], bool] = lambda row: True
    rows: str = "rows"  # where in the result
    form: str = "ratio"  # share: in percent; cost: the other way round, and at most
    peak: str | None = None  # only where the processor has this one


def wide(row: Row) -> bool:
    return bool(row["batch"] >= 64 and 128 <= row["units"] <= 1024)


def one_row(row: Row) -> bool:
    return bool(row["batch"] == 1 and row["units"] >= 256)


def smallest(row: Row) -> bool:
    return bool(row["batch"] <= 8 and row["units"] <= 64)


TARGETS = (
    Target("float32 inference over nn.LSTMCell", mean=5, each=1.4),
    Target("float32 inference over ONNX Runtime", mean=1.4, each=1, peer="onnxruntime"),
    Target(
        "share of the limit, B >= 64, 128 <= H <= 1024",
        each=0.8,
        peer="limit",
        wanted=wide,
        form="share",
    ),
    Target(
        "share of the bandwidth, B = 1, H >= 256",
        each=0.7,
        peer="limit",
        wanted=one_row,
        form="share",
    ),
    Target(
        "smallest calls (B <= 8, H <= 64) over an operator that only allocates",
        each=1 / 2,
        peer="allocate",
        wanted=smallest,
        form="cost",
    ),
    Target("float32 training over nn.LSTMCell", mean=3, each=1.05, mode="training"),
    Target("float64 inference over nn.LSTMCell", mean=2.5, each=1, dtype="float64"),
    Target("float64 training over nn.LSTMCell", mean=2.5, each=1, dtype="float64", mode="training"),
    Target("bfloat16 inference over nn.LSTMCell", mean=2.5, each=1, dtype="bfloat16"),
    Target(
        "bfloat16 over our float32, B >= 64, H >= 256",
        each=1.5,
        peer="lstmfused float32",
        dtype="bfloat16",
        wanted=lambda row: bool(row["batch"] >= 64 and row["units"] >= 256),
        peak="bfloat16",
    ),
    Target(
        "bfloat16 over our float32, B = 1, H >= 512",
        each=1.6,
        peer="lstmfused float32",
        dtype="bfloat16",
        wanted=lambda row: bool(row["batch"] == 1 and row["units"] >= 512),
    ),
    Target("AVX2, float32 inference over nn.LSTMCell", mean=4, rows="avx2_rows"),
    Target(
        "frozen float32 over unpacked, B in 2..64",
        mean=1.15,
        peer="lstmfused",
        subject="lstmfused frozen",
    ),
    Target(
        "memory kept for backward over 5 * B * H elements",
        each=1,
        peer="allowed",
        mode="memory kept",
        rows="memory",
        form="cost",
    ),
    Target(
        "peak memory of a training step over nn.LSTMCell",
        each=1,
        mode="memory peak",
        rows="memory",
        form="cost",
    ),
    Target(
        "cost of the batch-invariant mode",
        peer="lstmfused",
        subject="lstmfused batch invariant",
        form="cost",
    ),
)


class Found(NamedTuple):
    """A row as a target sees it."""

    row: Row
    ratio: float
    at_limit: float | None
    share: float | None  # of the limit that `at_limit` means


def amounts(row: Row) -> dict[str, float]:
    """By name: bytes, or microseconds with the limit's."""
    if "bytes" in row:
        return dict(row["bytes"])
    limit = {} if row["limit"] is None else {"limit": row["limit"]}
    return {name: median(row, name) for name in row["microseconds"]} | limit


def found(target: Target, result: Row) -> list[Found]:
    """From the least ratio to the largest."""
    allocating: dict[int, list[float]] = {}  # by threads: steps that compute nothing
    for row in result.get(target.rows, []):
        if row["mode"] == target.mode and "allocate" in row.get("microseconds", {}):
            allocating.setdefault(row["threads"], []).append(median(row, "allocate"))
    least = {threads: statistics.median(times) for threads, times in allocating.items()}
    rows = []
    for row in result.get(target.rows, []):
        measured = amounts(row)
        if (row["dtype"], row["mode"]) != (target.dtype, target.mode) or not target.wanted(row):
            continue
        if not {target.peer, target.subject} <= set(measured):
            continue
        peer, own = measured[target.peer], measured[target.subject]
        at_limit = share = None
        if "limit" in measured:
            allocate = measured.get("allocate", least.get(row["threads"], 0))
            bound = allocate + measured["limit"]
            at_limit, share = peer / bound, bound / own
        rows.append(Found(row, peer / own, at_limit, share))
    return sorted(rows, key=lambda entry: entry.ratio)


def shown(target: Target, ratio: float, digits: str = ".2f") -> str:
    if target.form == "share":
        return f"{ratio:.0%}"
    return f"{1 / ratio if target.form == 'cost' else ratio:{digits}}x"


def both(target: Target, ratios: list[float]) -> str:
    """Geometric mean and worst."""
    return f"{shown(target, statistics.geometric_mean(ratios))}, {shown(target, min(ratios))}"


def goal(target: Target) -> str:
    bound = "at most " if target.form == "cost" else ""
    parts = [] if target.mean is None else [f"mean {bound}{shown(target, target.mean, 'g')}"]
    if target.each is not None:
        parts.append(f"every row {bound}{shown(target, target.each, 'g')}")
    return ", ".join(parts)


def group(row: Row) -> tuple[str, str]:
    units, batch = row["units"], row["batch"]
    return (
        "H <= 64" if units <= 64 else "64 < H <= 256" if units <= 256 else "H > 256",
        "B <= 8" if batch <= 8 else "8 < B <= 64" if batch <= 64 else "B > 64",
    )


def groups(rows: list[Found]) -> dict[str, dict[str, list[Found]]]:
    """By units and by batch, each from the least share of the limit to the largest."""
    by: dict[str, dict[str, list[Found]]] = {}
    for entry in sorted(rows, key=lambda entry: (entry.row["units"], entry.row["batch"])):
        if entry.share is not None:
            units, batch = group(entry.row)
            by.setdefault(units, {}).setdefault(batch, []).append(entry)
    for batches in by.values():
        for entries in batches.values():
            entries.sort(key=lambda entry: entry.share or 0)
    return by


def typical(entries: list[Found]) -> Found:
    return entries[len(entries) // 2]


def looked_at(rows: list[Found]) -> list[Found]:
    """Those of which it is told where their time goes: the worst, and one of each group."""
    each = [typical(entries) for batches in groups(rows).values() for entries in batches.values()]
    return rows[:WORST] + each


def profiled(target: Target, row: Row, result: Row) -> str:
    """Where the subject's time went, as far as benchmarks/profiles.py has looked."""
    for profile in result.get("profiles", []):
        case = {key: row.get(key) for key in profile.keys() - {"subject", "shares"}}
        if profile == {**profile, **case, "subject": target.subject}:
            most = sorted(profile["shares"].items(), key=lambda item: -item[1])
            return ", ".join(f"{share:.0%} {part}" for part, share in most if share >= LEAST)
    return ""


def shares(target: Target, rows: list[Found], result: Row) -> str:
    """Of the limit that groups of rows reach, in geometric mean, and where a typical one's time
    goes."""

    def told(batch: str, entries: list[Found]) -> str:
        mean = statistics.geometric_mean(entry.share or 0 for entry in entries)
        parts = profiled(target, typical(entries).row, result)
        return f"{mean:.0%} at {batch}" + (f" ({parts})" if parts else "")

    return "; ".join(
        f"{units}: " + ", ".join(told(batch, entries) for batch, entries in batches.items())
        for units, batches in groups(rows).items()
    )


def size(value: float) -> str:
    return f"{value / 2**10:.4g} KiB" if value < 2**20 else f"{value / 2**20:.4g} MiB"


def named(target: Target, entry: Found, result: Row) -> str:
    row, measured = entry.row, amounts(entry.row)

    def amount(name: str) -> str:
        value = measured[name]
        return f"{NAMES.get(name, name)} {size(value) if 'bytes' in row else duration(value)}"

    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    details = [amount(target.subject), amount(target.peer)]
    if entry.share is not None and target.peer != "limit":
        details.append(f"{entry.share:.0%} of the limit")
    where = f"{shape(row)} B = {row['batch']}, {threads}"
    texts = filter(None, (", ".join(details), profiled(target, row, result)))
    return f"{shown(target, entry.ratio)} at {where} ({'; '.join(texts)})"


def causes(target: Target, rows: list[Found], result: Row) -> list[str]:
    """Why a target is not reached, as far as the run has measured it."""
    ratios = [entry.ratio for entry in rows]
    limits = [entry.at_limit for entry in rows if entry.at_limit is not None]
    texts, machine = [], True
    if target.mean is not None and statistics.geometric_mean(ratios) < target.mean:
        bound = statistics.geometric_mean(limits) if len(limits) == len(rows) else None
        if bound is not None and bound < target.mean:
            texts.append(f"beyond this machine, the mean at the limit is {shown(target, bound)}")
        else:
            machine = False
    if target.each is not None and ratios[0] < target.each:
        below = [entry for entry in rows if entry.ratio < target.each]
        beyond = [e for e in below if e.at_limit is not None and e.at_limit < target.each]
        text = f"{len(below)} of {len(rows)} rows miss it"
        texts.append(f"{text}, {len(beyond)} of them also at the limit" if limits else text)
        machine = machine and len(beyond) == len(below)
    if not machine:
        if limits:
            texts.append(f"share of the limit, {shares(target, rows, result)}")
        texts.append("worst " + "; ".join(named(target, entry, result) for entry in rows[:WORST]))
    return texts


def judged(target: Target, result: Row) -> Row:
    """`reached` is None where there is no goal, or no row that tells."""
    rows = found(target, result)
    lacking = target.peak and not any(
        roof and target.peak in roof["peak"] for roof in result["roofline"].values()
    )
    if lacking or not rows:
        reason = f"no {target.peak} dot products here" if lacking else "not measured in this run"
        return {"target": target, "rows": 0, "reached": None, "causes": [reason]}
    ratios = [entry.ratio for entry in rows]
    limits = [entry.at_limit for entry in rows if entry.at_limit is not None]
    goals = [
        (target.mean, statistics.geometric_mean(ratios)),
        (target.each, ratios[0]),
    ]
    held = [value >= wanted for wanted, value in goals if wanted is not None]
    reached = all(held) if held else None
    return {
        "target": target,
        "rows": len(rows),
        "reached": reached,
        "measured": both(target, ratios),
        "at_limit": both(target, limits) if limits else "",
        "causes": causes(target, rows, result) if reached is False else [],
    }


WORDS = {True: "yes", False: "no", None: ""}


def markdown(result: Row) -> str:
    """The table of targets, and a line for each that is not reached or not measured."""
    verdicts = [judged(target, result) for target in TARGETS]
    lines = [
        [
            v["target"].what,
            goal(v["target"]),
            v.get("measured", ""),
            v.get("at_limit", ""),
            WORDS[v["reached"]],
            str(v["rows"]),
        ]
        for v in verdicts
    ]
    header = ["target", "goal", "measured: mean, worst", "at the limit", "reached", "rows"]
    revision = (result["revision"] or "unknown")[:10] + " (modified)" * bool(result["dirty"])
    threads = sorted({row["threads"] for row in result["rows"]})
    notes = [
        f"{result['processor']}, threads {' and '.join(map(str, threads))}; torch "
        f"{result['versions']['torch']}, revision {revision}, {result['date'][:10]}. Means are "
        "geometric. At the limit: what a cell would reach whose every step took as long as an "
        "operator that only allocates its outputs and, in training, the gradients (measured at "
        "B <= 8, H <= 64), and then as long as the roofline says. That one is called as a module, "
        "as the cell is; whole calls are compared."
    ]
    if environment := result.get("avx2", {}).get("environment"):
        settings = " ".join(f"{name}={value}" for name, value in environment.items())
        notes.append(f"AVX2: both cells in a process with `{settings}`.")
    if result.get("profiles"):
        notes.append(
            "Of the rows named, and of one in each group, perf told afterwards to what parts of a "
            "step their time goes (`python -m benchmarks.profiles`); parts under "
            f"{LEAST:.0%} are left out."
        )
    texts = [f"- {v['target'].what}: {'; '.join(v['causes'])}." for v in verdicts if v["causes"]]
    return "\n\n".join(filter(None, [" ".join(notes), table(header, lines), "\n".join(texts)]))
