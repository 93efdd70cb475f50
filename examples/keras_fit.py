"""Keras on torch: an LSTMCell stepped by hand, and a model trained by `fit`, stock and fused.

The state of a cell is (batch, units). The weights fix the units, each call brings its own batch: so
rows may join and leave between two steps, and one row is edited like that of any tensor. `fit` and
`predict` need no more either: the last batch of an epoch is what is left of the rows.

The two models that are trained start from one seed and differ in nothing but who computes their
LSTM, so their losses and weights agree.
"""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")  # Keras reads it once, when it is imported

import keras
import numpy as np
import torch
from keras import layers
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

import lstmfused.keras

FEATURES = 14
ROUNDING = 1e-6  # of a step
# Training amplifies rounding from step to step; it stays near 1e-6 here. A gradient that is off by
# a thousandth exceeds the tolerance.
TOLERANCE = 5e-5  # of weights

Array = NDArray[np.float32]
State = list[Tensor]  # h and c, each (B, H)


@torch.no_grad()
def step_by_hand(units: int) -> None:
    """Exit with an error if a row depends on the others, or if Keras computes something else."""
    cell = layers.LSTMCell(units)

    def step(what: str, state: State) -> State:
        x = torch.randn(len(state[0]), FEATURES)
        _, (h, c) = cell(x, state)
        print(f"{what:>20}  x {tuple(x.shape)!s:8}  h {tuple(h.shape)!s:8}  c {tuple(c.shape)}")
        return [h, c]

    def apart(one: State, other: State) -> float:
        pairs = zip(one, other, strict=True)
        return float(torch.stack([(a - b).abs().max() for a, b in pairs]).max())

    print("keras.layers.LSTMCell, stepped by hand:")
    with lstmfused.keras.enable():
        state = step("5 rows begin", cell.get_initial_state(5))
        state = step("and go on", state)
        new = cell.get_initial_state(3)
        state = step("3 join them", [torch.cat(pair) for pair in zip(state, new, strict=True)])
        state = step("4 rows leave", [s[[0, 2, 5, 7]] for s in state])

        edited = [s.clone() for s in state]
        for s in edited:
            s[1] = 0
        x = torch.randn(4, FEATURES)
        _, before = cell(x, state)
        _, after = cell(x, edited)
        _, fresh = cell(x[1:2], cell.get_initial_state(1))
    _, stock = cell(x, edited)

    others = [0, 2, 3]
    differences = {
        "the other rows with and without it": apart(
            [s[others] for s in after], [s[others] for s in before]
        ),
        "this row and one that begins": apart([s[1:2] for s in after], fresh),
        "all rows, fused and stock": apart(after, stock),
    }
    print("\nrow 1 of the state set to zero, then a step; largest difference of")
    for what, difference in differences.items():
        print(f"{what:>36}: {difference:.1e}")
    if not all(difference <= ROUNDING for difference in differences.values()):  # NaN fails too
        sys.exit("a step computes something else")


# --------------------------------------------------------------------------------------------------
# A model trained by fit


@dataclass
class Run:
    model: Any
    context: Callable[[], AbstractContextManager[None]]  # that it computes in
    losses: list[float] = field(default_factory=list)  # one an epoch
    seconds: list[float] = field(default_factory=list)  # one an epoch


def make_data(args: argparse.Namespace) -> tuple[Array, Array]:
    """x (rows, T, I), and of each row the sum of its first feature, which fades in time."""
    x = np.random.default_rng(args.seed).standard_normal((args.rows, args.steps, FEATURES))
    y = x[..., 0] @ 0.8 ** np.arange(args.steps)[::-1]
    return x.astype(np.float32), y.astype(np.float32)[:, None]


def make_model(args: argparse.Namespace) -> Any:
    keras.utils.set_random_seed(args.seed)
    model = keras.Sequential(
        [keras.Input((None, FEATURES)), layers.LSTM(args.units), layers.Dense(1)]
    )
    model.compile("adam", "mse")
    return model


def train(runs: dict[str, Run], x: Array, y: Array, args: argparse.Namespace) -> None:
    """An epoch of each by turns, so that whatever disturbs the machine disturbs both."""
    with tqdm(total=args.epochs * len(runs), unit="epoch", disable=None) as bar:
        for epoch in range(args.epochs):
            for name, run in runs.items():
                keras.utils.set_random_seed(args.seed + epoch)  # of the order of the rows
                start = perf_counter()
                with run.context():
                    history = run.model.fit(x, y, batch_size=args.batch, verbose=0).history
                run.seconds.append(perf_counter() - start)
                run.losses += history["loss"]
                bar.set_postfix(run=name, loss=f"{run.losses[-1]:.4f}", refresh=False)
                bar.update()


def print_table(runs: dict[str, Run]) -> None:
    print(f"\n{'loss, epoch':>14}" + "".join(f"{name:>12}" for name in runs))
    for epoch, losses in enumerate(zip(*(run.losses for run in runs.values()), strict=True), 1):
        print(f"{epoch:14}" + "".join(f"{loss:12.5f}" for loss in losses))
    seconds = [median(run.seconds) for run in runs.values()]
    print(f"{'s per epoch':>14}" + "".join(f"{s:12.3f}" for s in seconds))
    print(f"{'times as fast':>14}" + "".join(f"{seconds[0] / s:12.2f}" for s in seconds))


def draw(runs: dict[str, Run], file: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("\nno picture: matplotlib is not installed")
        return
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    for (name, run), width in zip(runs.items(), (5, 1.5), strict=True):
        curves.plot(range(1, len(run.losses) + 1), run.losses, label=name, linewidth=width)
    curves.set(xlabel="epoch", ylabel="loss", yscale="log")
    curves.legend()
    bars.bar(list(runs), [median(run.seconds) for run in runs.values()], color=["C0", "C1"])
    bars.set(ylabel="seconds per epoch, median")
    figure.savefig(file, dpi=150)
    print(f"\nthe curves are drawn in {file}")


def check_agreement(runs: dict[str, Run], x: Array, args: argparse.Namespace) -> None:
    """Exit with an error unless both have learned the same, and predict it at any batch."""
    stock, fused = runs.values()
    pairs = zip(stock.model.get_weights(), fused.model.get_weights(), strict=True)
    weights = np.max([np.abs(a - b).max() for a, b in pairs])
    print(f"\nlargest difference of the weights {weights:.1e} (tolerance {TOLERANCE:.0e})")
    fused.model.set_weights(stock.model.get_weights())
    expected = stock.model.predict(x, batch_size=args.batch, verbose=0)
    batches = [1, args.batch // 2 + 1, len(x)]
    with fused.context():
        found = [fused.model.predict(x, batch_size=b, verbose=0) for b in batches]
    predictions = np.abs(np.stack(found) - expected).max()
    print(f"and of predictions {predictions:.1e}, of the same weights, in batches of {batches}")
    if not (weights <= TOLERANCE and predictions <= TOLERANCE):  # NaN fails too
        sys.exit("they do not compute the same")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Step an LSTMCell of Keras by hand; train an LSTM by fit, stock and fused.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=10, help="passes over the rows")
    parser.add_argument("--rows", type=int, default=500, help="sequences to learn from")
    parser.add_argument("--steps", type=int, default=100, help="of a sequence")
    parser.add_argument("--units", type=int, default=80, help="of the LSTM")
    parser.add_argument("--batch", type=int, default=32, help="rows in a step of training")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and order")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--out", type=Path, default="keras_fit.png", help="where to draw")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    keras.utils.set_random_seed(args.seed)
    step_by_hand(args.units)

    x, y = make_data(args)
    batches = -(-len(x) // args.batch)
    print(f"\nfit: {len(x)} rows in {batches} batches of {args.batch}, ", end="")
    print(f"the last of {len(x) - (batches - 1) * args.batch}")
    runs = {
        "stock": Run(make_model(args), nullcontext),
        "fused": Run(make_model(args), lstmfused.keras.enable),
    }
    with lstmfused.keras.enable():
        print(lstmfused.keras.report(runs["fused"].model))
    train(runs, x, y, args)
    print_table(runs)
    draw(runs, args.out)
    check_agreement(runs, x, args)


if __name__ == "__main__":
    main()
