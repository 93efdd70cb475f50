"""The picture: speed-up over nn.LSTMCell against the batch size, a line for every shape."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from .report import Row, select, setting, shape, shown
from .shapes import MODES


def plot(result: Row, path: Path) -> None:
    if find_spec("matplotlib") is None:
        print("matplotlib not installed: no picture")
        return
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    rows = [row for row in select(result, **shown(result)) if "torch" in row["speedup"]]
    if not rows:
        return
    shapes = list(dict.fromkeys(map(shape, rows)))  # from few units to many
    colour = colormaps["turbo"].resampled(len(shapes))
    figure = Figure(figsize=(10, 4.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for mode, axes in zip(MODES, panels, strict=True):
        for index, name in enumerate(shapes):
            line = [row for row in rows if row["mode"] == mode and shape(row) == name]
            axes.plot(
                [row["batch"] for row in line],
                [row["speedup"]["torch"] for row in line],
                color=colour(index),
                marker="os^D"[index % 4],
                markersize=4,
                label=name,
            )
        axes.axhline(1, color="black", linestyle="--", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter(FormatStrFormatter("%d"))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%gx"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.set_xlabel("batch size")
        axes.set_title(mode if mode == "inference" else "training (forward and backward)")
    panels[0].set_ylabel("speed-up over nn.LSTMCell")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", title="in→units", frameon=False)
    figure.suptitle(setting(result))
    figure.savefig(path)
