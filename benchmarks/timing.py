"""Times peers by turns, so that whatever disturbs the machine disturbs all of them."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from functools import cache
from itertools import repeat
from statistics import median, quantiles
from typing import NamedTuple

import torch

Sampler = Callable[[], float]  # -> microseconds of a call
TURN = {"cpu": 3e-3, "cuda": 1.5e-3}  # seconds a turn lasts at least
# The fewest, for calls of a second; the most, where they are cheap.
ROUNDS = {"cpu": range(3, 61), "cuda": range(5, 32)}
# OpenMP's workers spin for about a millisecond after their last call, on the cores of whoever is
# next if that is another pool; before each turn they are given the time to fall asleep.
PAUSE = 2e-3
# The time that passes; or, where others load the machine, what the calling thread has had of it.
CLOCKS = {"wall": time.perf_counter_ns, "cpu": time.thread_time_ns}


class Timing(NamedTuple):
    """Microseconds of a call over the rounds; the distance of the quartiles is a share of it."""

    median: float
    noise: float


def by_turns(
    samplers: Mapping[str, Sampler], seconds: float, rounds: range, seed: int = 0
) -> dict[str, Timing]:
    """Round-robin in random order for about `seconds`."""
    shuffle = random.Random(seed).shuffle
    deadline = time.perf_counter() + seconds
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    order = list(samplers)
    gc.collect()
    gc.disable()
    try:
        for done in range(rounds.stop - 1):
            if done >= rounds.start and time.perf_counter() > deadline:
                break
            shuffle(order)
            for name in order:
                samples[name].append(samplers[name]())
    finally:
        gc.enable()

    def timing(values: list[float]) -> Timing:
        low, _, high = quantiles(values, method="inclusive")
        return Timing(median(values), (high - low) / median(values))

    return {name: timing(values) for name, values in samples.items()}


def called(call: Callable[[], object], device: str = "cpu", clock: str = "wall") -> Sampler:
    """Many calls and on a GPU one wait at the end: where the host is the slower one, its time."""
    now = CLOCKS[clock]
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else float
    least = TURN[device]

    def timed(calls: int) -> float:
        start = now()
        for _ in repeat(None, calls):
            call()
        wait()
        return (now() - start) * 1e-9

    calls = 1
    while (elapsed := timed(calls)) < least:
        calls *= 2
    # A hiccup ends this early, so what is not plainly long enough is looked at again.
    while elapsed < 10 * least and timed(calls) < least:
        calls *= 2

    def sample() -> float:
        if device == "cpu":
            time.sleep(PAUSE)
        if calls > 1:
            timed(1)  # wakes the workers and fetches the weights
        return timed(calls) / calls * 1e6

    return sample


@cache
def side_stream() -> torch.cuda.Stream:
    """One for all captures: libraries keep a workspace for every stream they see."""
    return torch.cuda.Stream()


def capture(body: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`body` as a graph. It runs beforehand, for what a library does only once."""
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                body()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            body()
    finally:  # a capture that fails leaves its stream the current one
        torch.cuda.set_stream(torch.cuda.default_stream())
    torch.cuda.synchronize()
    return graph


def replayed(body: Callable[[], object], steps: int) -> Sampler:
    """Of a graph of `body`, which takes `steps` steps."""
    graph = capture(body)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay(times: int) -> float:
        graph.replay()  # fills the caches, and the queue: the device never waits for the host
        start.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3  # seconds

    replay(1)
    times = max(1, min(200, math.ceil(TURN["cuda"] / max(replay(2) / 2, 1e-7))))

    def sample(keep: object = body) -> float:  # a graph does not hold the tensors it reads
        return replay(times) / (times * steps) * 1e6

    return sample
