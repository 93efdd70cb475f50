"""Times on the device: graphs by events, calls by the clock; contestants in turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from statistics import quantiles

import torch

from ..timing import Timing, by_turns, no_gc

Sampler = Callable[[], float]  # -> microseconds of a step
SAMPLE = 1.5e-3  # seconds a sample lasts at least
ROUNDS = range(5, 32)
WARM_UP = 3


class Streams:
    """One side stream for all captures: libraries keep a workspace for every stream they see."""

    side: torch.cuda.Stream | None = None


def side_stream() -> torch.cuda.Stream:
    if Streams.side is None:
        Streams.side = torch.cuda.Stream()
    return Streams.side


def capture(body: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`body` as a graph. It runs beforehand, for what a library does only once."""
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
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
    times = max(1, min(200, math.ceil(SAMPLE / max(replay(2) / 2, 1e-7))))

    def sampler(keep: object = body) -> float:  # a graph does not hold the tensors it reads
        return replay(times) / (times * steps) * 1e6

    return sampler


def called(call: Callable[[], object]) -> Sampler:
    """Many calls and one wait at the end: where the host is the slower one, its time."""

    def seconds(calls: int) -> float:
        call()
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter_ns() - start) * 1e-9

    for _ in range(WARM_UP):
        seconds(1)
    calls = max(3, min(500, math.ceil(2 * SAMPLE / (seconds(10) / 10))))
    return lambda: seconds(calls) / calls * 1e6


def short(number: float) -> float:
    """To the digits that mean something."""
    return float(f"{number:.5g}")


def interleaved(
    samplers: Mapping[str, Sampler], seconds: float, seed: int = 0
) -> dict[str, Timing]:
    """Round-robin in random order for about `seconds`; microseconds."""
    with no_gc():
        samples = by_turns(samplers, ROUNDS, seconds, seed)

    def timing(values: list[float]) -> Timing:
        q1, median, q3 = quantiles(values, method="inclusive")
        return Timing(short(median), short(q1), short(q3), len(values), 1)

    return {name: timing(values) for name, values in samples.items()}
