"""python -m benchmarks.report: tables and picture of the README and of benchmarks/results/README.md
from the newest committed result of each suite. Also prints what a run has found."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from . import keras_fit
from .cases import COLD, EAGER, GRAPH, INFERENCE, LAYER, OWN, STEP, TRAINING
from .format import duration, insert, table, title
from .frame import amount, frame, mean, mean_and_worst, peers, setting, shown, speedup
from .limits import rooflines
from .record import RESULTS, ROOT, Json, load
from .targets import WORST, Verdict, figure, goal, looked_at, verdicts

README, PAGE, PICTURE = ROOT / "README.md", RESULTS / "README.md", RESULTS / "speedup.png"
SHOWN_BATCHES = (1, 8, 64, 512, 4096)
LEAST = 0.02  # of a step, of a part that is named
RUNS = {  # of a GPU
    (INFERENCE, GRAPH): "in a CUDA graph",
    (INFERENCE, COLD): "in a CUDA graph, cold weights",
    (INFERENCE, EAGER): "eager, no grad",
    (TRAINING, GRAPH): "training, in a CUDA graph",
    (TRAINING, EAGER): "training, eager",
}
GPU_GROUPS = {"B ≤ 8": "batch <= 8", "8 < B ≤ 128": "8 < batch <= 128", "B > 128": "batch > 128"}
PATHS = ("small_batch", "tensor_cores", "warpgroups", "products")  # of lstmfused on CUDA


def newest(suite: str) -> Json:
    """Of the committed results of a suite."""
    found = [data for path in RESULTS.glob("*.json") if (data := load(path))["suite"] == suite]
    if not found:
        raise SystemExit(f"error: {RESULTS} holds no result of the suite {suite}")
    return max(found, key=lambda data: str(data["date"]))


# --------------------------------------------------------------------------------------------------
# Tables


def means(rows: pd.DataFrame, *modes: str) -> str:
    """Of each peer: the mean of the speed-ups over it in each mode, the worst of them and where."""
    lines = []
    for peer in (peer for peer in peers(rows)[1:] if peer not in ("allocate", "empty nn.Module")):
        found = [mean_and_worst(rows[rows["mode"] == mode], peer) for mode in modes]
        lines.append([title(peer), *(text for pair in found for text in pair)])
    header = [text for mode in modes for text in (f"{mode}: geometric mean", "worst")]
    return table(["lstmfused over", *header], lines)


def spread(rows: pd.DataFrame, texts: Any, index: str = "cell") -> str:
    """Texts of rows by cell and batch."""
    found = rows.assign(text=list(texts)).drop_duplicates([index, "batch"])
    wide = found.pivot(index=index, columns="batch", values="text").fillna("")
    wide = wide.loc[list(dict.fromkeys(found[index]))]
    header = [{"cell": "in→units"}.get(index, index), *(f"batch {b}" for b in wide.columns)]
    return table(header, ([str(name), *line] for name, *line in wide.itertuples()))


def ratios(rows: pd.DataFrame, peer: str = "torch") -> str:
    """How many times faster than the peer, and the time."""
    rows = rows[rows[peer].notna() & rows[OWN].notna()]
    pairs = zip(rows[peer], rows[OWN], strict=True)
    return spread(rows, (f"{theirs / own:.2f}x ({duration(own)})" for theirs, own in pairs))


def by_size(rows: pd.DataFrame, values: pd.Series[float]) -> str:
    """Geometric means of groups of rows."""
    groups = [rows["units group"], rows["batch group"]]
    wide = values.groupby(groups, observed=True).agg(mean).unstack()
    lines = ([str(name), *(f"{value:.3f}" for value in line)] for name, *line in wide.itertuples())
    return table(["geometric mean", *wide.columns], lines)


def long(rows: pd.DataFrame) -> str:
    """A row a line, a peer a column."""
    names, lines = peers(rows), []
    for _, row in rows.iterrows():
        times = [amount(row, name) if pd.notna(row[name]) else "" for name in names]
        over = [f" ({row[k] / row[OWN]:.2f}x)" if pd.notna(row[k]) else "" for k in names[1:]]
        limit = ["", ""]
        if pd.notna(row["limit"]):
            limit = [duration(row["limit"]), f"{row['limit'] / row[names[0]]:.0%}"]
        cells = [a + b for a, b in zip(times, ["", *over], strict=True)]
        cell = f"{row['cell']}{f' x{row.steps}' * (row['steps'] > 1)}"
        lines.append([cell, str(row["batch"]), *cells, *limit, f"{row.get('noise', 0):.1%}"])
    header = [*map(title, names), "limit", "reached", "noise"]
    return table(["in→units", "batch", *header], lines)


def call_cost(rows: pd.DataFrame) -> str:
    """Of the least of cells, beside a module that does nothing."""
    if "empty nn.Module" not in rows:
        return ""
    row = rows[rows["empty nn.Module"].notna()].iloc[0]
    times = (f"{title(k)} {duration(row[k])}" for k in peers(rows) if pd.notna(row[k]))
    return f"A call at {row['cell']}, batch {row['batch']}, no grad: {', '.join(times)}."


def verdict_table(found: list[Verdict]) -> str:
    words = {True: "yes", False: "no", None: ""}
    lines = []
    for target, rows, reached, missed in found:
        told = Verdict(target, rows)
        below = f"{f'{missed} of ' * (reached is not None)}{len(rows) or 'not measured'}"
        measured = told.told("ratio"), told.told("at limit")
        lines.append([target.what, goal(target), *measured, words[reached], below])
    header = ["goal", "measured: mean, worst", "at the limit", "reached", "rows below"]
    return table(["target", *header], lines)


def time_goes(data: Json, row: Any, subject: str) -> str:
    """As far as tools.profiles has looked."""
    keys = ("input", "units", "batch", "mode", "dtype", "threads")
    for profile in data.get("profiles", []):
        if profile["subject"] == subject and all(profile[key] == row[key] for key in keys):
            parts = {k: v for k, v in profile.items() if isinstance(v, float) and v >= LEAST}
            return ", ".join(f"{parts[k]:.0%} {k}" for k in sorted(parts, key=lambda k: -parts[k]))
    return ""


def missed(data: Json, found: list[Verdict]) -> Iterator[str]:
    """Of each target that is not reached the worst rows and, profiled, one of each size."""
    for verdict in found:
        target, lines = verdict.target, []
        if verdict.reached is not False:
            continue
        rows = looked_at(verdict) if data.get("profiles") else verdict.rows[:WORST]
        for _, row in rows.iterrows():
            where = f"{row['cell']} B={row['batch']} {row['dtype']} {row['mode']}"
            where += f" {row['launch']}" if data["device"] == "cuda" else f", threads {row.threads}"
            times = [amount(row, name) for name in (target.subject, target.peer)]
            share = "" if pd.isna(row["share"]) else f"{row['share']:.0%}"
            parts = time_goes(data, row, target.subject)
            lines.append([where, figure(target, row["ratio"]), *times, share, parts])
        header = ["ratio", title(target.subject), title(target.peer), "of the limit", "its time"]
        yield f"**{target.what}**\n\n{table(['', *header], lines)}"


def crossing(entries: list[Json]) -> Iterator[str]:
    """By dtype: the fastest path of every cell; ! where the one that is taken is 3% slower."""
    found = pd.DataFrame(entries, columns=None if entries else ["dtype", "units"])
    for dtype, rows in found.sort_values("units", kind="stable").groupby("dtype", sort=False):
        times = rows.reindex(columns=PATHS)
        taken = [row[row["path"]] for _, row in rows.iterrows()]
        best = zip(times.idxmin(axis=1), times.min(axis=1), taken, strict=True)
        texts = (f"{k} {duration(v)}{f' !{t / v:.2f}' * (t > 1.03 * v)}" for k, v, t in best)
        yield f"fastest path, {dtype}\n\n{spread(rows, texts, 'units')}"


def rewritten(before: Json, later: Json) -> str:
    """A step in a graph: then, now by the path that is taken, and nn.LSTMCell's; worst first."""
    rows = frame(before).query(f"mode == '{INFERENCE}' and launch == '{GRAPH}' and input == units")
    keys = ["dtype", "batch", "units"]
    found = rows[rows["torch"].notna()].merge(pd.DataFrame(later["crossovers"]), on=keys)
    found = found.merge(pd.DataFrame(before["predictions"]), "left", on=keys)
    found["now"] = [row[row["path"]] for _, row in found.iterrows()]
    found["ratio"], found["was"] = found["torch"] / found["now"], found["torch"] / found[OWN]
    found = found.sort_values("ratio", kind="stable")
    for name in (OWN, "now", "torch"):
        found[name] = found[name].map(duration)
    for name in ("predicted", "was", "ratio"):
        found[name] = [f"{value:.2f}x" if pd.notna(value) else "" for value in found[name]]
    columns = [*keys, "path", OWN, "now", "torch", "predicted", "was", "ratio"]
    header = ["dtype", "B", "I = H", "path", "before", "now", "nn.LSTMCell"]
    header += ["predicted", "over it before", "over it now"]
    return table(header, found[columns].astype(str).to_numpy().tolist())


# --------------------------------------------------------------------------------------------------
# What the README and the page of results say


def benchmark(data: Json) -> str:
    rows = shown(frame(data))
    return "\n\n".join([setting(data, rows), means(rows, *STEP), call_cost(rows)])


def targets(data: Json) -> str:
    rows = frame(data)
    note = (
        "Means are geometric. At the limit: what a cell would reach whose every call took as long "
        "as a module's around an operator that only allocates its outputs and, in training, the "
        "gradients (measured at B <= 8, H <= 64), and then as long as the roofline says. AVX2: "
        "both cells in a process that is held to it."
    )
    return f"{setting(data, rows)}\n\n{note}\n\n{verdict_table(verdicts(data, rows))}"


def layer(data: Json) -> str:
    """Sequences: means over each peer by the number of steps, and what was aimed at."""
    rows = frame(data)
    whole, lines = rows[rows["sequence"] == LAYER], []
    for mode in STEP:
        some = whole[whole["mode"] == mode]
        for peer in peers(some)[1:]:
            groups = [speedup(group, peer) for _, group in some.groupby("steps")]
            texts = (f"**{mean(r):.2f}x** ({min(r):.2f}x)" if len(r) else "" for r in groups)
            name = "nn.LSTM" if peer == "torch" else title(peer).replace("torch", "nn.LSTMCell")
            lines.append([f"{name}, {mode}", *texts])
    header = ["lstmfused.LSTM over", *(f"T = {steps}" for steps in sorted(set(whole["steps"])))]
    note = "Geometric means (and worst rows)."
    parts = (
        f"{setting(data, rows)} {note}",
        table(header, lines),
        verdict_table(verdicts(data, rows)),
    )
    return "\n\n".join(parts)


def second_order(data: Json) -> str:
    rows, lines = frame(data), []
    for mode, some in rows.groupby("mode", sort=False):
        of = (mean_and_worst(found, "torch") for _, found in some.groupby("threads"))
        lines.append([str(mode), *(text for pair in of for text in pair), str(len(some))])
    counts = sorted(set(rows["threads"]))
    header = [text for n in counts for text in (f"over nn.LSTMCell, threads {n}", "worst")]
    clock = " Processor time." * (data["clock"] == "cpu")
    return f"{setting(data, rows)}{clock}\n\n{table(['', *header, 'rows'], lines)}"


def gpu(data: Json) -> str:
    rows, lines = frame(data), []
    for (mode, launch), said in RUNS.items():
        some = rows[(rows["mode"] == mode) & (rows["launch"] == launch)]
        groups = (speedup(some.query(where)) for where in GPU_GROUPS.values())
        lines.append([said, *(f"**{mean(r):.2f}x** ({min(r, default=0):.2f}x)" for r in groups)])
    note = "How many times faster than nn.LSTMCell: geometric means (and worst rows)."
    return f"{setting(data, rows)} {note}\n\n{table(['', *GPU_GROUPS], lines)}"


def page(default: Json, full: Json, device: Json, compiled: Json, later: Json) -> Iterator[str]:
    rows = shown(frame(default))
    yield "# Results\n\nWritten by `make readme`.\n\n## On a processor"
    yield f"{setting(default, rows)} Over nn.LSTMCell, and the time of a call:"
    rows = rows[rows["batch"].isin(SHOWN_BATCHES)]
    for mode in STEP:
        yield f"### {mode.capitalize()}\n\n{ratios(rows[rows['mode'] == mode])}"
    rows = frame(full)
    yield f"## Targets missed\n\n{setting(full, rows)}"
    yield (
        "The worst rows, then of each group of sizes the row in the middle. The limit is that of "
        "the README's table of targets; `python -m tools.profiles` told where the time goes (parts "
        f"above {LEAST:.0%})."
    )
    yield from missed(full, verdicts(full, rows))
    rows = frame(device)
    yield f"## On a GPU\n\n{setting(device, rows)} Over nn.LSTMCell, and the time of a step:"
    for (mode, launch), said in RUNS.items():
        for dtype in dict.fromkeys(rows["dtype"]):
            some = rows[(rows["mode"] == mode) & (rows["launch"] == launch)]
            yield f"### {dtype}, {said}\n\n{ratios(some[some['dtype'] == dtype])}"
    yield f"### Beside torch.compile\n\n{means(frame(compiled), INFERENCE)}"
    yield (
        "### After the kernels were rewritten\n\n"
        f"Kernels of revision {later['revision'][:10]}: that run measured every path at every size "
        "and not nn.LSTMCell, whose times here are those of the run above, on another machine of "
        "the same kind. A step in a CUDA graph, by the path that is taken since; predicted: before "
        "a GPU had run the kernels of the run above."
    )
    yield rewritten(device, later)


def summary(data: Json) -> str:
    """What a run has found, for the terminal."""
    if data["suite"] == "keras":
        return keras_fit.shown(data)
    parts = list(crossing(data.get("crossovers", [])))
    rows, on_gpu = frame(data) if data["rows"] else pd.DataFrame(), data["device"] == "cuda"
    kinds = ["mode", "dtype", "launch", "isa", "threads"]
    for kind, some in rows.groupby(kinds, sort=False) if len(rows) else ():
        some = some.dropna(axis=1, how="all").assign(limit=some["limit"])
        if not {OWN, *["torch"] * on_gpu} <= set(some):
            continue
        name = ", ".join(str(word) for word in kind if word)
        parts.append(f"{name}\n\n{ratios(some) if on_gpu else long(some)}")
        if "before" in some:
            parts.append(by_size(some, speedup(some, "before")))
        if len(peers(some)) > 1:
            parts.append(means(some, str(kind[0])))
    if len(rows):
        parts += [setting(data, rows), call_cost(rows)]
    if data["suite"] in ("full", "gpu", "gpu-compiled", "layer"):
        found = verdicts(data, rows)
        parts += [verdict_table(found), *missed(data, found)]
    for name, roof in rooflines(data).items():
        peak = ", ".join(f"{dtype} {value:.0f}" for dtype, value in roof.peak.items())
        reads = ", ".join(f"{k / 2**20:.3g} MiB {v:.0f}" for k, v in roof.bandwidth.items())
        parts.append(f"Limits, threads {name}: GFLOP/s {peak}; GB/s from {reads}.")
    parts += [f"{b['peer']} at {b['case']}: {b['error']}" for b in data.get("broken", [])[:30]]
    return "\n\n".join(filter(None, parts))


def picture(data: Json, path: Path) -> None:
    """Speed-up over nn.LSTMCell against the batch size, a line for every shape."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    rows = shown(frame(data)) if data["rows"] else pd.DataFrame()
    if "torch" not in rows or not len(rows := rows[rows["torch"].notna()]):
        return
    cells = list(dict.fromkeys(rows["cell"]))  # from few units to many
    colour = colormaps["turbo"].resampled(len(cells))
    figure = Figure(figsize=(10, 4.8), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for mode, axes in zip(STEP, panels, strict=True):
        for index, name in enumerate(cells):
            line = rows[(rows["mode"] == mode) & (rows["cell"] == name)]
            style: Any = {"color": colour(index), "marker": "os^D"[index % 4], "markersize": 4}
            axes.plot(line["batch"], line["torch"] / line[OWN], label=name, **style)
        axes.axhline(1, color="black", linestyle="--", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter(FormatStrFormatter("%d"))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%gx"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.set(
            xlabel="batch size", title={TRAINING: "training (forward and backward)"}.get(mode, mode)
        )
    panels[0].set_ylabel("speed-up over nn.LSTMCell")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", title="in→units", frameon=False)
    figure.suptitle(setting(data, rows).split(";")[0])
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    add = parser.add_argument
    add("--show", type=Path, metavar="FILE.json", help="print a result instead")
    add("--check", action="store_true", help="write nothing; fail if what is written is not that")
    args = parser.parse_args()
    if args.show:
        print(summary(load(args.show)))
        return 0
    default, full, device = newest("default"), newest("full"), newest("gpu")
    blocks = {"benchmark": benchmark(default), "targets": targets(full), "gpu": gpu(device)}
    blocks |= {
        "second-order": second_order(newest("second-order")),
        "layer": layer(newest("layer")),
        "keras": keras_fit.shown(newest("keras")),
    }
    readme = README.read_text(encoding="utf-8")
    for name, text in blocks.items():
        readme = insert(readme, text, name)
    others = newest("gpu-compiled"), newest("crossovers")
    shown_page = "\n\n".join(page(default, full, device, *others)) + "\n"
    files = {README: readme, PAGE: shown_page}
    old = [
        f for f, text in files.items() if not f.exists() or f.read_text(encoding="utf-8") != text
    ]
    if args.check:
        for file in old:
            print(f"{file.relative_to(ROOT)} is not what the results say: run make readme")
        return int(bool(old))
    for file, text in files.items():
        file.write_text(text, encoding="utf-8")
    picture(default, PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
