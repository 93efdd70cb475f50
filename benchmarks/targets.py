"""What the rows of a full run, and of one on a GPU, are held to.

A row's ratio is the time (or the memory) of a peer over that of the subject, measured by turns in
one run; the peer may be the limit. "At the limit" is what the subject's ratio would be if each of
its steps took as long as an operator that only allocates, in that row or, where it was not
measured, in the median row, and then as long as the roofline says: first come the outputs, then
what is written there.
"""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd

from .cases import EAGER, GRAPH, INFERENCE, KEPT, LAYER, PEAK, RESETS, STEPPED, TRAINING
from .frame import mean
from .record import Json

WORST = 3  # rows named where a target is not reached


class Target(NamedTuple):
    """Ratios of `peer` to `subject`: at least `mean` in geometric mean, `each` in every row."""

    what: str
    mean: float | None = None
    each: float | None = None
    peer: str = "torch"
    where: str = ""  # pandas' query
    dtype: str = "float32"  # "" of this and of mode: all of them
    mode: str = INFERENCE
    subject: str = "lstmfused"
    form: str = "ratio"  # share: in percent; cost: the other way round, and at most
    isa: str = ""


NN, ORT, FLOAT32 = "over nn.LSTMCell", "over ONNX Runtime", "over our float32"
INVARIANT, PACKED = "lstmfused batch-invariant", "lstmfused packed"
WIDE, MANY = "batch >= 64 and 128 <= units <= 1024", "batch >= 64 and units >= 256"
ONE, FLOATS, FEW = "batch == 1 and units >= {}", "lstmfused float32", "2 <= batch <= 64"
CALLS, BYTES = "smallest calls over an operator that only allocates", "5 * B * H elements"
SHORT = "batch <= 8 and units <= 64"

TARGETS = (
    Target(f"float32 inference {NN}", 5, 1.4),
    Target(f"float32 inference {ORT}", 1.4, 1, "onnxruntime"),
    Target("share of the limit, B >= 64, 128 <= H <= 1024", None, 0.8, "limit", WIDE, form="share"),
    Target(
        "share of the bandwidth, B = 1, H >= 256", None, 0.7, "limit", ONE.format(256), form="share"
    ),
    Target(f"{CALLS}, B <= 8, H <= 64", None, 1 / 2, "allocate", SHORT, form="cost"),
    Target(f"float32 training {NN}", 3, 1.05, mode=TRAINING),
    Target(f"float64 inference {NN}", 2.5, 1, dtype="float64"),
    Target(f"float64 training {NN}", 2.5, 1, dtype="float64", mode=TRAINING),
    Target(f"bfloat16 inference {NN}", 2.5, 1, dtype="bfloat16"),
    Target(f"bfloat16 {FLOAT32}, B >= 64, H >= 256", None, 1.5, FLOATS, MANY, "bfloat16"),
    Target(f"bfloat16 {FLOAT32}, B = 1, H >= 512", None, 1.6, FLOATS, ONE.format(512), "bfloat16"),
    Target(f"AVX2, float32 inference {NN}", 4, isa="avx2"),
    Target(
        "packed float32 over unpacked, B in 2..64", 1.15, None, "lstmfused", FEW, subject=PACKED
    ),
    Target(f"memory kept for backward over {BYTES}", None, 1, "allowed", mode=KEPT, form="cost"),
    Target(f"peak memory of a training step {NN}", None, 1, mode=PEAK, form="cost"),
    Target("cost of the batch-invariant mode", peer="lstmfused", subject=INVARIANT, form="cost"),
)

SEQUENCE, LONG = f"sequence == '{LAYER}'", f"sequence == '{LAYER}' and steps >= 16"
LARGE = f"{LONG} and batch >= 8 and units >= 128"
ALONE = f"{LONG} and batch == 1 and units <= 256"
MM, LOOP = "products alone", "batch == 1 and steps == 64 and units <= 128"
LAYER_TARGETS = (
    Target("layer, inference over nn.LSTM", 2, 1, where=SEQUENCE),
    Target("layer, training over nn.LSTM", 1.6, 1, where=SEQUENCE, mode=TRAINING),
    Target("layer over ONNX Runtime, T >= 16", 1.15, 0.97, "onnxruntime", LONG),
    Target(
        "packed layer over ONNX Runtime, T >= 16", 1.15, 0.97, "onnxruntime", LONG, subject=PACKED
    ),
    Target(
        "layer, share of the limit, B >= 8, T >= 16, H >= 128",
        None,
        0.8,
        "limit",
        LARGE,
        form="share",
    ),
    Target("the same in training", None, 0.7, "limit", LARGE, mode=TRAINING, form="share"),
    Target("layer, share of torch's products alone, the same", None, 0.85, MM, LARGE, form="share"),
    Target("the same in training", None, 0.85, MM, LARGE, mode=TRAINING, form="share"),
    Target(
        "layer, share of the bandwidth, B = 1, T >= 16, weights in L2",
        None,
        0.8,
        "limit",
        ALONE,
        form="share",
    ),
    Target("layer, share of torch's products alone, the same", None, 0.85, MM, ALONE, form="share"),
    Target(
        "resets, training over a loop of nn.LSTMCell",
        None,
        8,
        "torch stepped",
        f"sequence == '{RESETS}'",
        mode=TRAINING,
    ),
    Target(
        "layer, inference over a loop of our cell, H <= 128, B = 1, T = 64", None, 3, STEPPED, LOOP
    ),
    Target("the same in training", None, 10, STEPPED, LOOP, mode=TRAINING),
    Target("layer, memory kept for backward over nn.LSTM's", None, 1, mode=KEPT, form="cost"),
)

SMALL, HALF = "batch <= 32 and units <= 512", "512 <= units <= 1024 and dtype == 'bfloat16'"
GRAPHS, EAGERLY = f"launch == '{GRAPH}'", f"launch == '{EAGER}'"
MIDDLE = f"{GRAPHS} and batch == 128 and {HALF}"
OTHER = f"not (({GRAPHS} or {EAGERLY}) and {SMALL}) and not ({MIDDLE})"
TRAINED, ANY = ("", TRAINING), ("", "")  # dtype and mode

GPU_TARGETS = (
    Target("graph, B <= 32, H <= 512", 2.5, where=f"{GRAPHS} and {SMALL}", dtype=""),
    Target("eager, B <= 32, H <= 512", 3, where=f"{EAGERLY} and {SMALL}", dtype=""),
    Target("graph, B = 128, H 512 to 1024, bfloat16", 1.7, where=MIDDLE, dtype=""),
    Target("training, B <= 32", 2, None, "torch", f"{EAGERLY} and batch <= 32", *TRAINED),
    Target("training graph, B <= 32", 2, None, "torch", f"{GRAPHS} and batch <= 32", *TRAINED),
    Target("every other, inference", each=1, where=OTHER, dtype=""),
    Target("every other, training", None, 1, "torch", "batch > 32", *TRAINED),
    Target("cuDNN, T = 1, B <= 128", None, 1, "cudnn", "batch <= 128", *ANY),
)
COMPILED_TARGETS = (
    Target("over nn.LSTMCell compiled, reduce-overhead", None, 1, "reduce-overhead", "", *ANY),
)


class Verdict(NamedTuple):
    """`rows` from the least ratio to the largest, with the ratio, that at the limit and the share
    of it; `reached` is None where there is no goal, or no row that tells."""

    target: Target
    rows: pd.DataFrame
    reached: bool | None = None
    missed: int = 0

    def told(self, column: str) -> str:
        """Geometric mean and worst."""
        values = self.rows.get(column, pd.Series(dtype=float)).dropna()
        if values.empty:
            return ""
        return f"{figure(self.target, mean(values))}, {figure(self.target, values.min())}"


def figure(target: Target, ratio: float, digits: str = ".2f") -> str:
    if target.form == "share":
        return f"{ratio:.0%}"
    return f"{1 / ratio if target.form == 'cost' else ratio:{digits}}x"


def goal(target: Target) -> str:
    bound = "at most " if target.form == "cost" else ""
    named = (("mean", target.mean), ("every row", target.each))
    return ", ".join(f"{k} {bound}{figure(target, v, 'g')}" for k, v in named if v is not None)


def judged(target: Target, every: pd.DataFrame) -> Verdict:
    alike = every[every["isa"] == target.isa]
    alike = alike[alike["mode"] == target.mode] if target.mode else alike
    rows = alike[alike["dtype"] == target.dtype] if target.dtype else alike
    rows = rows.assign(allowed=20 * rows["batch"] * rows["units"])
    rows = rows.query(target.where).copy() if target.where else rows
    if not {target.peer, target.subject} <= set(rows.columns):
        return Verdict(target, rows[:0])
    least = alike.reindex(columns=["allocate", "threads"]).groupby("threads")["allocate"].median()
    allocate = rows["threads"].map(least).fillna(0)
    bound = rows.get("allocate", allocate).fillna(allocate) + rows["limit"]
    rows["ratio"] = rows[target.peer] / rows[target.subject]
    rows["at limit"], rows["share"] = rows[target.peer] / bound, bound / rows[target.subject]
    rows = rows[rows["ratio"].notna()].sort_values("ratio", kind="stable")
    if rows.empty or target.mean is target.each is None:
        return Verdict(target, rows)
    missed = 0 if target.each is None else int((rows["ratio"] < target.each).sum())
    enough = target.mean is None or mean(rows["ratio"]) >= target.mean
    return Verdict(target, rows, enough and not missed, missed)


def verdicts(data: Json, every: pd.DataFrame) -> list[Verdict]:
    of: dict[str, tuple[Target, ...]] = {"gpu": GPU_TARGETS, "gpu-compiled": COMPILED_TARGETS}
    targets = (of | {"layer": LAYER_TARGETS}).get(data["suite"], TARGETS)
    if not any("bfloat16" in roof["peak"] for roof in data["roofline"].values()):
        targets = tuple(target for target in targets if target.peer != FLOATS)  # no dot products
    return [judged(target, every) for target in targets]


def looked_at(verdict: Verdict) -> pd.DataFrame:
    """The rows of a missed target of which tools.profiles tells where the time goes: the worst, and
    of each group of sizes the one in the middle."""
    groups = verdict.rows.sort_values("share", kind="stable").groupby(
        ["units group", "batch group"], observed=True
    )
    return pd.concat([verdict.rows[:WORST], *(g.iloc[[len(g) // 2]] for _, g in groups)])
