"""python -m benchmarks.keras_fit: an epoch of Keras's `fit`, and an LSTMCell stepped by hand.

The contestants are Keras on torch, as it is and with lstmfused, a plain loop around torch.nn.LSTM
and, in interpreters that have them, Keras on TensorFlow and on JAX. Each lives in a process of its
own, and they run by turns. Nothing is timed before Keras with lstmfused and without have agreed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from platform import python_version
from typing import Any

from .record import ROOT, Json, Record, describe, processor

CONTESTANTS = (
    FUSED := "Keras on torch, lstmfused",
    STOCK := "Keras on torch",
    LOOP := "loop around nn.LSTM",
    TENSORFLOW := "Keras on TensorFlow",
    JAX := "Keras on JAX",
)
TRAINER = "Keras on torch, no LSTM"  # what `fit` takes for everything else
EVERYONE = (*CONTESTANTS, TRAINER)
BACKENDS = {TENSORFLOW: "tensorflow", JAX: "jax"}  # of the others torch
MASKED = "Masking, LSTM"
FIT: dict[str, Callable[[Any, int], list[Any]]] = {
    "LSTM": lambda k, H: [k.LSTM(H)],
    "LSTM, LSTM": lambda k, H: [k.LSTM(H, return_sequences=True), k.LSTM(H)],
    MASKED: lambda k, H: [k.Masking(), k.LSTM(H)],
    "LSTM, recurrent_dropout=0.2": lambda k, H: [k.LSTM(H, recurrent_dropout=0.2)],
    "RNN([LSTMCell, LSTMCell])": lambda k, H: [k.RNN([k.LSTMCell(H), k.LSTMCell(H)])],
}
LOOPED = {"LSTM": 1, "LSTM, LSTM": 2}  # layers
BY_HAND = {"LSTMCell by hand, batch 1": 1, "LSTMCell by hand, batch 32": 32}
FEATURES, BATCH = 14, 32
TOLERANCE = 5e-5  # of weights after an epoch, and of the last state

Run = Callable[[], tuple[float, list[Any]]]  # seconds, and in arrays what was computed in them


# --------------------------------------------------------------------------------------------------
# A worker: what a contestant computes, where there may be neither torch nor lstmfused


def make_data(case: str, args: argparse.Namespace) -> tuple[Any, Any]:
    """x (rows, T, I) and y (rows, 1). What is masked is zero, from a step on that each row has."""
    import numpy as np

    generator = np.random.default_rng(0)
    x = generator.standard_normal((args.rows, args.steps, FEATURES), dtype=np.float32)
    if case == MASKED:
        lengths = generator.integers(1, args.steps + 1, (args.rows, 1))
        x[np.arange(args.steps) >= lengths] = 0
    return x, x.mean(axis=(1, 2))[:, None]


def keras_fit(name: str, case: str, args: argparse.Namespace) -> Run:
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)  # of weights, dropout and the order of the rows
    x, y = make_data(case, args)
    inputs = keras.Input((args.steps, FEATURES))
    if name == TRAINER:
        recurrent = [layers.Lambda(lambda x: x[:, -1])]
    else:
        recurrent = FIT[case](layers, args.units)
    model = keras.Sequential([inputs, *recurrent, layers.Dense(1)])
    model.compile("adam", "mse")
    if name == FUSED:
        enable(model)
    marks: list[float] = []  # begin and end, without what `fit` does once for all its epochs

    def mark(*_: object) -> None:
        marks.append(time.perf_counter())

    clock = keras.callbacks.LambdaCallback(on_epoch_begin=mark, on_epoch_end=mark)

    def run() -> tuple[float, list[Any]]:
        model.fit(x, y, batch_size=BATCH, verbose=0, callbacks=[clock])
        return marks[-1] - marks[-2], model.get_weights()

    return run


def keras_by_hand(name: str, case: str, args: argparse.Namespace) -> Run:
    import keras
    import numpy as np
    from keras import ops

    keras.utils.set_random_seed(0)
    cell, shape = keras.layers.LSTMCell(args.units), (args.steps, BY_HAND[case], FEATURES)
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    steps = [ops.convert_to_tensor(step) for step in x]
    if name == FUSED:
        enable(cell)

    def run() -> tuple[float, list[Any]]:
        start = time.perf_counter()
        state = cell.get_initial_state(BY_HAND[case])
        for step in steps:
            _, state = cell(step, state)
        found = [ops.convert_to_numpy(s) for s in state]  # JAX is waited for
        return time.perf_counter() - start, found

    return run if name in BACKENDS else import_module("torch").no_grad()(run)


def enable(model: Any) -> None:
    import lstmfused.keras

    lstmfused.keras.enable()
    for line in lstmfused.keras.report(model):
        if not line.fused:
            raise SystemExit(f"error: {line.layer} is left to Keras: {line.why}")


def torch_loop(name: str, case: str, args: argparse.Namespace) -> Run:
    """What `fit` computes, and nothing around it."""
    import torch
    from torch import nn

    x, y = map(torch.from_numpy, make_data(case, args))
    lstm = nn.LSTM(FEATURES, args.units, LOOPED[case], batch_first=True)
    head = nn.Linear(args.units, 1)
    parameters = [*lstm.parameters(), *head.parameters()]
    adam = torch.optim.Adam(parameters, eps=1e-7)  # Keras's

    def run() -> tuple[float, list[Any]]:
        start = time.perf_counter()
        for rows in torch.randperm(len(x)).split(BATCH):
            loss = nn.functional.mse_loss(head(lstm(x[rows])[0][:, -1]), y[rows])
            adam.zero_grad()
            loss.backward()
            adam.step()
        return time.perf_counter() - start, [p.detach().numpy() for p in parameters]

    return run


def limit(backend: str, threads: int) -> None:
    """Before there are any. JAX counts the cores that it may run on, and has no option."""
    if hasattr(os, "sched_setaffinity"):  # the same ones for all
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    if backend == "torch":
        import_module("torch").set_num_threads(threads)
    if backend == "tensorflow":
        options = import_module("tensorflow").config.threading
        options.set_intra_op_parallelism_threads(threads)
        options.set_inter_op_parallelism_threads(threads)


def work(name: str, args: argparse.Namespace) -> None:
    """Tells the versions, then answers each line that names a case: the first time with all numbers
    that were computed, afterwards with seconds."""

    def answer(value: Any) -> None:
        print(json.dumps(value), flush=True)

    backend, runs = BACKENDS.get(name, "torch"), dict[str, Run]()
    limit(backend, args.threads)
    packages = ("numpy", backend, *(() if name == LOOP else ("keras",)))
    answer({"python": python_version()} | {p: import_module(p).__version__ for p in packages})
    for line in sys.stdin:
        case = line.strip()
        if first := case not in runs:
            prepare = torch_loop if name == LOOP else keras_fit if case in FIT else keras_by_hand
            runs[case] = prepare(name, case, args)
        seconds, found = runs[case]()
        answer([x for array in found for x in array.ravel().tolist()] if first else seconds)


# --------------------------------------------------------------------------------------------------
# Who runs when, and what is written


class Worker:
    def __init__(self, name: str, python: str, stack: ExitStack) -> None:
        self.name = name
        own = {"KERAS_BACKEND": BACKENDS.get(name, "torch"), "TF_CPP_MIN_LOG_LEVEL": "2"}
        own |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        given: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        given |= {"cwd": ROOT, "env": os.environ | own}
        command = [python, "-m", "benchmarks.keras_fit", *sys.argv[1:], f"--worker={name}"]
        self.process: Any = stack.enter_context(subprocess.Popen(command, **given))
        self.versions = self.read()

    def read(self) -> Any:
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise SystemExit(f"error: the process of {self.name} has ended")

    def ask(self, case: str) -> Any:
        print(case, file=self.process.stdin, flush=True)
        return self.read()


def measure(workers: list[Worker], rounds: int) -> list[Json]:
    """A row for each case: seconds of each contestant, medians of the rounds."""
    import numpy as np  # here, for the interpreters of workers may lack all of these
    from tqdm import tqdm

    from .timing import PAUSE, by_turns

    cases = [*FIT, *BY_HAND]
    some = {LOOP: LOOPED, TRAINER: {"LSTM"}}
    turns = [(case, w) for case in cases for w in workers if case in some.get(w.name, cases)]
    with tqdm(total=len(turns) * (1 + rounds), unit="turn", disable=None) as bar:

        def ask(case: str, worker: Worker) -> Any:
            time.sleep(PAUSE)
            bar.set_postfix_str(f"{case}, {worker.name}", refresh=False)
            bar.update()
            return worker.ask(case)

        found = {(case, worker.name): ask(case, worker) for case, worker in turns}
        rows: list[Json] = []
        for case in cases:
            difference = float(np.abs(np.subtract(found[case, FUSED], found[case, STOCK])).max())
            rows.append({"case": case, "difference": difference})
            if not difference <= TOLERANCE:  # NaN fails too
                raise SystemExit(f"error: {case}: {difference:.1e} apart from Keras's own result")
        samplers = {f"{case}, {w.name}": partial(ask, case, w) for case, w in turns}
        timings = by_turns(samplers, 0, range(rounds, rounds + 1))
    for row in rows:
        of_case = {w.name: timings[f"{case}, {w.name}"] for case, w in turns if case == row["case"]}
        row |= {name: timing.median for name, timing in of_case.items()}
        row["noise"] = max(timing.noise for timing in of_case.values())
    return rows


def setting(data: Json) -> str:
    rows, T, I, H = data["shape"]
    versions: dict[str, str] = {}
    for of_worker in data["versions"].values():
        versions |= of_worker
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    revision = data["revision"][:10] + " (modified)" * bool(data["dirty"])
    return (
        f"{data['processor']}, {data['threads']} threads, float32; {names}, revision {revision}, "
        f"{data['date'][:10]}. An epoch of ({rows}, {T}, {I}) in batches of {BATCH} into {H} "
        f"units; by hand, {T} steps."
    )


def shown(data: Json) -> str:
    """Of each contestant the time, and how many times that of lstmfused it is."""
    from .format import duration, table

    names = [name for name in EVERYONE if name in data["versions"]]
    lines = []
    for row in data["rows"]:
        times = [duration(1e6 * row[name]) if name in row else "" for name in names]
        ratios = [f" ({row[name] / row[FUSED]:.2f}x)" if name in row else "" for name in names[1:]]
        cells = [time + ratio for time, ratio in zip(times, ["", *ratios], strict=True)]
        lines.append([row["case"], *cells, f"{row['noise']:.1%}"])
    return f"{setting(data)}\n\n{table(['', *names, 'noise'], lines)}"


def arguments() -> argparse.Namespace:
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", processor().lower())).strip("-")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.keras_fit",
        description="Time Keras with lstmfused, as it is, and on other backends.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--tensorflow", type=os.path.abspath, metavar="PYTHON", help="with keras and tensorflow")
    add("--jax", type=os.path.abspath, metavar="PYTHON", help="with keras and jax")
    add("--threads", type=int, default=2, help="of each contestant")
    add("--rounds", type=int, default=7, help="at least 2; times are medians of them")
    add("--rows", type=int, default=512, help="sequences of an epoch")
    add("--steps", type=int, default=100, help="of a sequence")
    add("--units", type=int, default=80, help="of an LSTM")
    add("--out", type=Path, default=ROOT / "out" / f"keras-{slug}.json", help="the file of results")
    add("--worker", choices=EVERYONE, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.worker:
        return work(args.worker, args)
    pythons = {name: sys.executable for name in (FUSED, STOCK, LOOP, TRAINER)}
    pythons |= {TENSORFLOW: args.tensorflow, JAX: args.jax}  # None: it stays away
    with ExitStack() as stack:
        workers = [Worker(name, python, stack) for name, python in pythons.items() if python]
        versions = {worker.name: worker.versions for worker in workers}
        data = describe("keras") | {"versions": versions, "threads": args.threads}
        data |= {"rounds": args.rounds, "shape": [args.rows, args.steps, FEATURES, args.units]}
        record = Record(args.out, data | {"rows": measure(workers, args.rounds)})
    record.flush()
    print(shown(record.data))
    print(f"\nwritten to {record.path}")


if __name__ == "__main__":
    main()
