"""Times contestants in turns, so that whatever disturbs the machine disturbs all of them."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import repeat
from statistics import quantiles

ROUND = 3e-3  # seconds a turn lasts at least
ROUNDS = range(3, 61)  # the fewest, for calls of a second; the most, where they are cheap
# OpenMP's workers spin for about a millisecond after their last call, on the cores of whoever is
# next if that is another pool; before each turn they are given the time to fall asleep.
PAUSE = 2e-3
CLOCKS = {"wall": time.perf_counter_ns, "cpu": time.thread_time_ns}


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median and quartiles over the rounds."""

    median: float
    q1: float
    q3: float
    rounds: int
    calls: int  # in a round


class Clock:
    """What is read: the time that passes, or where others load the machine, what the calling
    thread has had of it, which tells of one thread's work alone."""

    name = "wall"


def timed(call: Callable[[], object], calls: int) -> float:
    now = CLOCKS[Clock.name]
    start = now()
    for _ in repeat(None, calls):
        call()
    return (now() - start) * 1e-9


def calls_per_round(call: Callable[[], object]) -> int:
    calls = 1
    while (elapsed := timed(call, calls)) < ROUND:
        calls *= 2
    # A hiccup ends this early, so what is not plainly long enough is looked at again.
    if elapsed < 10 * ROUND:
        while timed(call, calls) < ROUND:
            calls *= 2
    return calls


@contextmanager
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def by_turns(
    samplers: Mapping[str, Callable[[], float]], rounds: range, seconds: float, seed: int
) -> dict[str, list[float]]:
    """What each of the samplers returns, round-robin in random order for about `seconds`."""
    shuffle = random.Random(seed).shuffle
    deadline = time.perf_counter() + seconds
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for done in range(rounds.stop - 1):
        if done >= rounds.start and time.perf_counter() > deadline:
            break
        order = list(samplers)
        shuffle(order)
        for name in order:
            samples[name].append(samplers[name]())
    return samples


def measure(
    steps: Mapping[str, Callable[[], object]],
    seconds: float,
    seed: int = 0,
    contexts: Mapping[str, Callable[[], AbstractContextManager[None]]] | None = None,
) -> dict[str, Timing]:
    """Round-robin in random order for about `seconds`, each in its own of the `contexts`."""
    deadline = time.perf_counter() + seconds
    contexts = contexts or {}
    with no_gc():
        calls = {}
        for name, step in steps.items():
            with contexts.get(name, nullcontext)():
                calls[name] = calls_per_round(step)

        def sampler(name: str) -> Callable[[], float]:
            def sample() -> float:
                time.sleep(PAUSE)
                with contexts.get(name, nullcontext)():
                    if calls[name] > 1:
                        steps[name]()  # wakes the workers and fetches the weights
                    return timed(steps[name], calls[name]) / calls[name] * 1e6

            return sample

        samplers = {name: sampler(name) for name in steps}
        samples = by_turns(samplers, ROUNDS, deadline - time.perf_counter(), seed)

    def timing(name: str) -> Timing:
        q1, median, q3 = quantiles(samples[name], method="inclusive")
        return Timing(median, q1, q3, len(samples[name]), calls[name])

    return {name: timing(name) for name in steps}
