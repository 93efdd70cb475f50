"""The rows of a result as a pandas frame."""

from __future__ import annotations

from statistics import geometric_mean

import pandas as pd

from .cases import COLUMNS, EAGER, MEMORY, OWN, STEP, USUAL, Case
from .format import duration, size
from .limits import key, rooflines
from .record import Json

OTHER = (*COLUMNS, "noise", "cell", "limit", "units group", "batch group")


def frame(data: Json) -> pd.DataFrame:
    """By size, with the cell's name, the limit of each row and the groups that it belongs to."""
    rows, roofs = [USUAL | row for row in data["rows"]], rooflines(data)

    def limit(row: Json) -> float:
        roof = roofs.get(key(row["threads"], row["isa"]))
        return roof.limit(Case.of(row)) if roof and row["mode"] in STEP else float("nan")

    found = pd.DataFrame(rows)
    found["cell"] = [f"{row['input']}→{row['units']}" for row in rows]
    found["limit"] = [limit(row) for row in rows]
    for column, sign, low, high in ("units", "H", 64, 256), ("batch", "B", 8, 64):
        names = [f"{sign} ≤ {low}", f"{low} < {sign} ≤ {high}", f"{sign} > {high}"]
        edges = [0, low, high, float("inf")]
        found[f"{column} group"] = pd.cut(found[column], edges, labels=names)
    return found.sort_values(["units", "input", "batch"], kind="stable")


def peers(rows: pd.DataFrame) -> list[str]:
    """Who was measured in these rows, lstmfused first."""
    found = [name for name in rows.columns if name not in OTHER and rows[name].notna().any()]
    return sorted(found, key=lambda name: name != OWN)


def mean(ratios: pd.Series[float]) -> float:
    return geometric_mean(ratios) if len(ratios) else float("nan")


def speedup(rows: pd.DataFrame, peer: str = "torch", subject: str = OWN) -> pd.Series[float]:
    """How many times faster the subject is, where both were measured."""
    return (rows[peer] / rows[subject]).dropna()


def mean_and_worst(rows: pd.DataFrame, peer: str) -> tuple[str, str]:
    """The mean of the speed-ups over a peer, and the least of them and where."""
    ratios = speedup(rows, peer)
    if ratios.empty:
        return "", ""
    row = rows.loc[ratios.index].iloc[int(ratios.argmin())]
    where = f"({row['cell']}, batch {row['batch']})"
    return f"**{mean(ratios):.2f}x**", f"{ratios.min():.2f}x {where}"


def shown(rows: pd.DataFrame) -> pd.DataFrame:
    """What tables and pictures show: single steps, float32 if any, the most threads."""
    some = rows[
        rows["launch"].eq(EAGER)
        & rows["steps"].eq(1)
        & rows["sequence"].eq("")
        & rows["isa"].eq("")
        & rows["mode"].isin(STEP)
    ]
    dtype = "float32" if "float32" in set(some["dtype"]) else [*some["dtype"], ""][0]
    found: pd.DataFrame = some[
        (some["dtype"] == dtype) & (some["threads"] == some["threads"].max())
    ]
    return found


def amount(row: pd.Series[float], name: str) -> str:
    value = float(row[name])
    return size(value) if str(row["mode"]) in MEMORY else duration(value)


def place(data: Json, rows: pd.DataFrame) -> str:
    """Processor and threads."""
    threads = sorted(set(rows["threads"]))
    count = f", {' and '.join(map(str, threads))} thread{'s' * (threads != [1])}"
    return str(data["processor"]) + (count if data["device"] == "cpu" else "")


def setting(data: Json, rows: pd.DataFrame) -> str:
    """Place, dtypes, versions: without them a ratio says nothing."""
    dtypes = ", ".join(dict.fromkeys(rows["dtype"]))
    versions = ", ".join(f"{name} {v}" for name, v in data["versions"].items() if v)
    revision = data["revision"][:10] + " (modified)" * bool(data["dirty"])
    when = data["date"][:10]
    return f"{place(data, rows)}, {dtypes}; {versions}, revision {revision}, {when}."
