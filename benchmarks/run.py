"""The course of a run: peers are found right, then timed by turns, row after row."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from tqdm import tqdm

from . import limits
from .cases import COLD, EAGER, KEPT, MEMORY, OWN, TRAINING, WITHOUT_GRAD, Case
from .checkout import Checkout
from .memory import kept, peak
from .peers import Compiled, Peer
from .problem import Bound, Problem, WrongResult, precision, verify
from .record import Clock, Json, Record
from .timing import ROUNDS, Sampler, by_turns, called, replayed

FLUSH = 60  # seconds between two writings of the file
STEPS = 20  # of a CUDA graph
COLD_SIZE = 3  # times the L2 cache: what a replay finds there of the weights is next to nothing
COMPILATION = 8  # seconds, about
SAMPLING = {"cpu": 0.0, "cuda": 0.05}  # seconds of a row, however little time there is


LOST = 3  # exit status


class DeviceLost(Exception):
    """After an error nothing more runs on the GPU in this process."""


def graph_steps(case: Case) -> int:
    """STEPS, or fewer where one step is long enough to be timed by itself."""
    steps = max(2, min(STEPS, int(4e11 / max(1, case._replace(mode="").flops))))
    return max(1, steps // 4) if case.mode == TRAINING else steps


def cold(peer: Peer, bound: Bound) -> list[Bound]:
    """The peer with other copies of its weights: with its own, more than the cache holds."""
    parameters = bound.problem.parameters
    size = sum(p.numel() * p.element_size() for p in parameters.values())
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
    clones = (
        {k: torch.nn.Parameter(p.detach().clone()) for k, p in parameters.items()}
        for _ in range(-(-COLD_SIZE * cache // size) - 1)
    )
    return [peer.bind(bound.problem.replaced(clone)) for clone in clones]


@dataclass
class Run:
    record: Record
    field: Sequence[Peer]
    clock: Clock
    seed: int = 0
    timer: str = "wall"  # of timing.CLOCKS

    @contextmanager
    def forgiving(self, peer: str, case: Case) -> Iterator[None]:
        """Wrong numbers end a run. A peer that cannot run a case does not: torch.compile's C++, for
        one, does not always compile in bfloat16. On a GPU, where time is short, nothing does."""
        try:
            yield
        except DeviceLost:
            raise
        except Exception as error:
            on_gpu = case.device == "cuda"
            if not on_gpu and (isinstance(error, WrongResult) or peer.startswith(OWN)):
                raise
            told = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            broken = {"peer": peer, "case": str(case), "error": told}
            self.record.data.setdefault("broken", []).append(broken)
            tqdm.write(f"{peer} left out at {case}: {told}", file=sys.stderr)
            try:
                if on_gpu:
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
                    torch.ones(1, device="cuda").item()
            except Exception:
                raise DeviceLost(told) from error

    def sampler(self, peer: Peer, bound: Bound, case: Case) -> Sampler:
        if isinstance(peer, Checkout):
            return peer.sampler(case, self.timer)
        if case.launch == EAGER:
            with peer.context():
                sample = called(bound.run(case.mode), case.device, self.timer)

            def within() -> float:
                with peer.context():
                    return sample()

            return within
        steps = graph_steps(case)
        if case.mode == TRAINING:
            return replayed(bound.trained(steps), steps)
        others = cold(peer, bound) if case.launch == COLD else []
        steps = -(-steps // (len(others) + 1)) * (len(others) + 1)
        return replayed(bound.chain(steps, others), steps)

    def rows(self, cases: Sequence[Case], seconds: float) -> list[Json]:
        """Of cases that share their tensors: in each, microseconds of each peer, or bytes."""
        torch.set_num_threads(cases[0].threads)
        bounds: dict[str, Bound] = {}
        right: dict[tuple[str, str], bool] = {}  # of peers and modes
        rows: list[Json] = []
        with precision(cases[0].dtype):
            problem = Problem(cases[0].tensors(), self.seed)
            for case in cases:
                with torch.set_grad_enabled(case.mode not in WITHOUT_GRAD):
                    for peer in self.field:
                        if not peer.supports(case) or (peer.name, case.mode) in right:
                            continue
                        right[peer.name, case.mode] = False
                        with self.forgiving(peer.name, case), peer.context():
                            if peer.name not in bounds:
                                bounds[peer.name] = peer.bind(problem)
                            if peer.computes and case.mode not in MEMORY:
                                verify(peer.name, bounds[peer.name], case.mode)
                            right[peer.name, case.mode] = True
                    able = [p for p in self.field if p.supports(case) and right[p.name, case.mode]]
                    found = self.amounts(case, {peer: bounds[peer.name] for peer in able}, seconds)
                    rows.append(case.columns() | found)
        if any(isinstance(peer, Compiled) and peer.name in bounds for peer in self.field):
            torch.compiler.reset()  # past its recompile limit it would give up
        if cases[0].device == "cuda":
            torch.cuda.empty_cache()
        return rows

    def amounts(self, case: Case, able: dict[Peer, Bound], seconds: float) -> Json:
        if case.mode in MEMORY:
            of = kept if case.mode == KEPT else peak
            return {peer.name: of(bound) for peer, bound in able.items()}
        samplers = {}
        for peer, bound in able.items():
            with self.forgiving(peer.name, case):
                samplers[peer.name] = self.sampler(peer, bound, case)
        if not samplers:
            return {}
        timings = by_turns(samplers, seconds, ROUNDS[case.device], self.seed)
        noise = max(timing.noise for timing in timings.values())
        return {name: timing.median for name, timing in timings.items()} | {"noise": noise}

    def least(self, cases: Sequence[Case]) -> float:
        """Seconds that their rows take anyway, about: as many rounds as there must be, each peer at
        two thirds of the limit, the check against float64, and compilations."""
        roof = limits.rooflines(self.record.data).get(limits.key(cases[0].threads, cases[0].isa))
        total = 0.0
        for case in cases:
            field = [peer for peer in self.field if peer.supports(case)]
            calls = (ROUNDS[case.device].start + 2) * len(field) + 3
            total += 0.1 + 1e-8 * case.bytes + (1.5e-6 * calls * roof.limit(case) if roof else 0)
            total += COMPILATION * sum(isinstance(p, Compiled) for p in field) / len(cases)
        return total

    def course(self, cases: Sequence[Case]) -> None:
        """Measures what is not there yet; on a GPU what there is time for, and not again what an
        earlier process did not survive. Time that a row leaves over goes to those behind it."""
        data = self.record.data
        seen = [*data["rows"], *data["failed"]]
        done = {tuple(Case.of(row).columns().values()) for row in seen}
        todo = [case for case in cases if tuple(case.columns().values()) not in done]
        groups = [list(group) for _, group in groupby(todo, Case.tensors)]
        costs = [self.least(group) for group in groups]
        gc.collect()
        gc.freeze()  # what lives now is not looked at by the collector, which runs before timings
        data["left_out"], flushed = [], self.clock.left()
        with tqdm(groups, unit="cell", smoothing=0, mininterval=5) as progress:
            for index, group in enumerate(progress):
                progress.set_postfix_str(str(group[0].tensors()), refresh=False)
                left, on_gpu = self.clock.left(), group[0].device == "cuda"
                if on_gpu and left < costs[index]:
                    data["left_out"].append(str(group[0].tensors()))
                    continue
                begun = [case.columns() for case in group] if on_gpu else []
                data["failed"] += begun  # until it is done
                if on_gpu or flushed - left > FLUSH:
                    self.record.flush()
                    flushed = left
                spare = (left - sum(costs[index:])) / len(costs[index:]) / len(group)
                with self.forgiving(OWN, group[0]):
                    data["rows"] += self.rows(group, max(spare, SAMPLING[group[0].device]))
                    data["failed"] = [row for row in data["failed"] if row not in begun]
        self.record.flush()
