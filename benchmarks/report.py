"""python -m benchmarks.report: tables and pictures of the README, of docs/ and of
benchmarks/results/README.md from the newest committed result of each suite. Also prints what a run
has found."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from . import keras_fit, pictures
from .cases import COLD, EAGER, GRAPH, INFERENCE, LAYER, OWN, STEP, TRAINING
from .format import duration, insert, table, title
from .frame import amount, frame, mean, mean_and_worst, peers, place, setting, shown, speedup
from .limits import rooflines
from .record import RESULTS, ROOT, Json, load
from .targets import PACKED, WORST, Verdict, figure, goal, looked_at, verdicts

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
            steps = f" T={row['steps']}" * (row.get("sequence", "") != "")
            where = f"{row['cell']} B={row['batch']}{steps} {row['dtype']} {row['mode']}"
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
# What the pages say


def glance() -> str:
    """Of the README: over each peer the mean of the speed-ups, the least of them and where, and how
    many rows are slower than the peer."""
    full, default, of_layer, fit = map(newest, ("full", "default", "layer", "keras"))
    one = f"launch == '{EAGER}' and steps == 1 and isa == '' and dtype == 'float32'"
    cells, compiled = frame(full).query(one), frame(default).query(one)
    layers, lines = frame(of_layer).query(f"sequence == '{LAYER}'"), []

    def add(what: str, ratios: pd.Series[float], where: str) -> None:
        below = f"{(ratios < 1).sum()} of {len(ratios)}"
        worst = f"{min(ratios):.2f}x ({where})"
        lines.append([what, f"**{mean(ratios):.2f}x**", worst, below])

    for module, peer, rows in (
        ("LSTMCell", "torch", cells),
        ("LSTMCell", "compile", compiled),
        ("LSTMCell", "onnxruntime", cells),
        ("LSTM", "torch", layers),
        ("LSTM", "onnxruntime", layers),
    ):
        for mode in STEP:
            ratios = speedup(rows[rows["mode"] == mode], peer)
            if len(ratios):
                row = rows.loc[ratios.index].iloc[int(ratios.argmin())]
                steps = f", T = {row['steps']}" * (module == "LSTM")
                name = {"torch": f"nn.{module}", "compile": "torch.compile"}.get(peer, title(peer))
                where = f"{row['cell']}, batch {row['batch']}{steps}"
                add(f"{module} over {name}, {mode}", ratios, where)
    for name in (keras_fit.STOCK, keras_fit.TENSORFLOW, keras_fit.JAX):
        found = {
            row["case"]: row[name] / row[keras_fit.FUSED]
            for row in fit["rows"]
            if row["case"] in keras_fit.FIT and name in row
        }
        ratios = pd.Series(found, dtype=float)
        add(f"Keras fit over {name}", ratios, str(ratios.idxmin()))
    where = f"Cell: {place(full, cells)}. Layer: {place(of_layer, layers)}."
    where += f" Keras: {fit['processor']}, {fit['threads']} threads."
    header = ["lstmfused", "mean", "worst row", "slower"]
    return f"{table(header, lines)}\n\n{where} All in float32; means are geometric."


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
    """Sequences: means over each peer by the number of steps."""
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
    return f"{setting(data, rows)} {note}\n\n{table(header, lines)}"


def layer_targets(data: Json) -> str:
    return verdict_table(verdicts(data, frame(data)))


def beside_onnxruntime(data: Json) -> str:
    """The layer in inference, by the batch and the number of steps."""
    rows = frame(data).query(f"sequence == '{LAYER}' and mode == '{INFERENCE}'")
    rows = rows[rows["onnxruntime"].notna()]
    steps, lines = sorted(set(rows["steps"])), []
    for subject, name in ((OWN, "LSTM"), (PACKED, "PackedLSTM")):
        for batch, some in rows.groupby("batch"):
            groups = [speedup(some[some["steps"] == k], "onnxruntime", subject) for k in steps]
            texts = (f"**{mean(r):.2f}x** ({min(r):.2f}x)" if len(r) else "" for r in groups)
            lines.append([f"{name}, batch {batch}", *texts])
    return table(["over ONNX Runtime", *(f"T = {k}" for k in steps)], lines)


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
        "the table of targets; `python -m tools.profiles` told where the time goes (parts "
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


# --------------------------------------------------------------------------------------------------
# What is written where


def blocks() -> dict[str, dict[str, str]]:
    """What stands between the markers of each page."""
    return {
        "README.md": {"summary": glance()},
        "docs/keras.md": {"keras": keras_fit.shown(newest("keras"))},
        "docs/performance.md": {
            "benchmark": benchmark(newest("default")),
            "layer": layer(newest("layer")),
            "layer-targets": layer_targets(newest("layer")),
            "onnxruntime": beside_onnxruntime(newest("layer")),
            "targets": targets(newest("full")),
            "second-order": second_order(newest("second-order")),
            "gpu": gpu(newest("gpu")),
        },
    }


def files() -> dict[str, str]:
    """Each page as it should be."""
    names = ("default", "full", "gpu", "gpu-compiled", "crossovers")
    found = {"benchmarks/results/README.md": "\n\n".join(page(*map(newest, names))) + "\n"}
    for name, texts in blocks().items():
        found[name] = (ROOT / name).read_text(encoding="utf-8")
        for block, text in texts.items():
            found[name] = insert(found[name], text, block)
    return found


def draw(folder: Path) -> None:
    default, of_layer = newest("default"), newest("layer")
    pictures.both(default, of_layer, folder / "speedup.svg")
    pictures.cells(default, folder / "cell.svg")
    pictures.layers(of_layer, folder / "layer.svg")
    pictures.keras(newest("keras"), folder / "keras.svg")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    add = parser.add_argument
    add("--show", type=Path, metavar="FILE.json", help="print a result instead")
    add("--check", action="store_true", help="write nothing; fail if what is written is not that")
    args = parser.parse_args()
    if args.show:
        print(summary(load(args.show)))
        return 0
    pages = files()
    if args.check:
        old = [name for name, text in pages.items() if not is_written(name, text)]
        for name in old:
            print(f"{name} is not what the results say: run make readme")
        return int(bool(old))
    for name, text in pages.items():
        (ROOT / name).write_text(text, encoding="utf-8")
    draw(ROOT / "docs" / "images")
    return 0


def is_written(name: str, text: str) -> bool:
    path = ROOT / name
    return path.exists() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
