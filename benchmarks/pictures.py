"""Pictures of results, in colours that can be read on white and on black."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import keras_fit
from .cases import LAYER, STEP, TRAINING
from .frame import frame, mean, shown, speedup
from .record import Json

GREY, COLOURS = "#7d838a", ("#2f81d6", "#d9622b", "#2a9d63", "#8a63d2", "#c94f7c")
UNITS = (16, 64, 256, 1024)  # of the cells that are drawn where many were measured
STEPS = (1, 16, 128)  # of the layers
TITLES = {TRAINING: "training (forward and backward)"}
GAP = 0.07  # of the height, between two names

Lines = dict[str, pd.DataFrame]  # the rows that each is made of, by its name


@contextmanager
def drawing(path: Path, height: float, **options: Any) -> Iterator[Any]:
    """Axes side by side, saved without a background: the same file for the same numbers."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    edges = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
    style: Any = dict.fromkeys(edges, GREY) | {"font.size": 10.5}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.25}
    style |= {"svg.hashsalt": "lstmfused", "savefig.transparent": True, "axes.titlesize": 11}
    with rc_context(style):
        figure = Figure(figsize=(6.8, height), dpi=110, layout="constrained")
        yield figure.subplots(1, squeeze=False, **options)[0]
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def speedups(path: Path, peer: str, panels: dict[str, Lines], bands: bool = False) -> None:
    """Geometric means over torch's own against the batch size, and in `bands` all that is between
    the least and the largest."""
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullFormatter, NullLocator

    with drawing(path, 3.3, ncols=len(panels), sharey=True) as every:
        ends: list[dict[str, float]] = []
        for axes, (title, lines) in zip(every, panels.items(), strict=True):
            ends.append({})
            for (name, rows), colour in zip(lines.items(), COLOURS, strict=False):
                groups = speedup(rows).groupby(rows["batch"])
                line: pd.Series[float] = groups.agg(mean)
                axes.plot(line.index, line, color=colour, marker="o", markersize=3.5)
                ends[-1][name] = float(np.log2(line.iloc[-1]))
                if bands:
                    shade: Any = {"color": colour, "alpha": 0.15, "linewidth": 0}
                    axes.fill_between(line.index, groups.min(), groups.max(), **shade)
            axes.axhline(1, color=GREY, linestyle="--", linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            batches = sorted({batch for rows in lines.values() for batch in rows["batch"]})
            ticks = [b for b in batches if len(batches) < 6 or np.log2(b) % 3 == 0]
            axes.xaxis.set_major_locator(FixedLocator(ticks))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FormatStrFormatter("%d"))
            axes.yaxis.set_major_formatter(FormatStrFormatter("%gx"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.grid()
            axes.set(title=title, xlabel="batch size")
        every[0].set_ylabel(f"speed-up over {peer}")
        low, high = np.log2(every[0].get_ylim())  # now that all is drawn
        for axes, heights in zip(every, ends, strict=True):
            colours, below = dict(zip(heights, COLOURS, strict=False)), -GAP
            for name in sorted(heights, key=lambda name: heights[name]):
                below = max((heights[name] - low) / (high - low), below + GAP)
                style: Any = {"color": colours[name], "va": "center", "transform": axes.transAxes}
                axes.text(1.02, below, name, **style)


def groups(rows: pd.DataFrame, column: str, name: str = "{}") -> Lines:
    return {name.format(k): some for k, some in rows.groupby(column, sort=False)}


def modes(rows: pd.DataFrame, column: str, name: str = "{}") -> dict[str, Lines]:
    """A panel for inference, one for training."""
    return {TITLES.get(m, m): groups(rows[rows["mode"] == m], column, name) for m in STEP}


def of_layers(data: Json) -> pd.DataFrame:
    rows = frame(data).query(f"sequence == '{LAYER}' and steps in {STEPS} and mode in {STEP}")
    return rows.sort_values("steps", kind="stable")


def both(cell: Json, layer: Json, path: Path) -> None:
    """Of the README: the cell and the layer, over all their sizes."""
    subjects = {"LSTMCell": shown(frame(cell)), "LSTM": of_layers(layer)}
    panels = {f"{name} over nn.{name}": groups(rows, "mode") for name, rows in subjects.items()}
    speedups(path, "torch's own", panels, bands=True)


def cells(data: Json, path: Path) -> None:
    """A line for each of a few sizes, or nothing where nn.LSTMCell was not measured."""
    rows = shown(frame(data)) if data["rows"] else pd.DataFrame()
    if "torch" not in rows or not len(rows := rows[rows["torch"].notna()]):
        return
    if len(set(rows["cell"])) > len(UNITS):
        rows = rows[rows["units"].isin(UNITS) & rows["input"].eq(rows["units"])]
    speedups(path, "nn.LSTMCell", modes(rows, "cell"))


def layers(data: Json, path: Path) -> None:
    """A line for each number of steps."""
    speedups(path, "nn.LSTM", modes(of_layers(data), "steps", "T = {}"))


def keras(data: Json, path: Path) -> None:
    """The time of an epoch: a line for each model, a dot for each contestant."""
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullFormatter

    rows = [row for row in data["rows"] if row["case"] in keras_fit.FIT]
    with drawing(path, 2.9) as (axes,):
        for name, colour in zip(keras_fit.CONTESTANTS, COLOURS, strict=True):
            times = {y: 1e3 * row[name] for y, row in enumerate(rows) if name in row}
            axes.scatter([*times.values()], [*times], s=46, color=colour, label=name, zorder=3)
        for y, row in enumerate(rows):
            times_of = [1e3 * row[name] for name in keras_fit.CONTESTANTS if name in row]
            axes.plot([min(times_of), max(times_of)], [y, y], color=GREY, alpha=0.4, linewidth=1)
        axes.set_xscale("log")
        axes.set_yticks(range(len(rows)), [row["case"] for row in rows])
        axes.invert_yaxis()
        axes.xaxis.set_major_locator(FixedLocator([k * 10**n for n in range(6) for k in (1, 2, 5)]))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%d"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="x")
        axes.set_xlabel("milliseconds of an epoch of fit")
        axes.figure.legend(loc="outside upper center", ncols=3, frameon=False, handletextpad=0.1)
