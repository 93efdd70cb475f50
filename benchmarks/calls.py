"""python -m benchmarks.calls --against DIR: what a call costs here and in another checkout.

The other one is built there in place. Two versions of an extension do not fit one process, so each
is timed in processes of its own, by turns: whatever disturbs the machine disturbs both.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from tqdm import tqdm

HERE = Path(__file__).resolve().parents[1]

# One thread, 16 units, batch 1, where the call is all there is; microseconds.
CHILD = """
import sys, time
from statistics import median
import torch, lstmfused

def timed(call, calls=3000):
    for _ in range(calls // 10):
        call()
    start = time.perf_counter_ns()
    for _ in range(calls):
        call()
    return (time.perf_counter_ns() - start) / calls * 1e-3

torch.set_num_threads(1)
cell = lstmfused.LSTMCell(16, 16)
x, hx = torch.randn(1, 16), (torch.randn(1, 16), torch.randn(1, 16))
with torch.no_grad():
    inference = median(timed(lambda: cell(x, hx)) for _ in range(9))
training = median(timed(lambda: cell(x, hx)) for _ in range(9))
print(lstmfused.__file__, inference, training, sep="\\n")
"""


def call_costs(checkout: Path) -> tuple[float, float]:
    """Of a call without gradients and of one that keeps what backward needs."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env={**os.environ, "PYTHONPATH": str(checkout)},
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{checkout}: {done.stderr.strip().splitlines()[-1]}")
    file, *costs = done.stdout.split()
    if Path(file).resolve().parents[1] != checkout:
        raise SystemExit(f"lstmfused of {checkout} was asked for, {file} came")
    return float(costs[0]), float(costs[1])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calls", description=__doc__)
    parser.add_argument("--against", type=Path, required=True, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=15, metavar="N")
    args = parser.parse_args()
    checkouts = {"here": HERE, "there": args.against.resolve()}
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in checkouts}
    for index in tqdm(range(args.rounds)):
        for name in sorted(checkouts, reverse=bool(index % 2)):
            costs[name].append(call_costs(checkouts[name]))
    for kind, title in enumerate(("no grad", "grad kept")):
        here, there = (median(cost[kind] for cost in costs[name]) for name in checkouts)
        print(f"{title}: {here:.2f} µs here, {there:.2f} µs there, {here / there:.3f} of it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
