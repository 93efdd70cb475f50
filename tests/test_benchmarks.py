"""The benchmark runs, refuses wrong numbers, and goes on where it was cut off."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import lstmfused
from benchmarks import __main__ as command
from benchmarks import cases, cliffs, limits, problem, record, timing
from benchmarks import run as course
from benchmarks.cases import MODES, STEP, SUITES, Case, Shape
from benchmarks.limits import SIZES, Roofline
from benchmarks.peers import PEERS, BatchInvariant, Compiled, Multiply, Peer
from benchmarks.problem import Bound, Problem, WrongResult, verify
from benchmarks.record import Clock, Record, load
from benchmarks.report import PATHS
from benchmarks.run import DeviceLost, Run
from tools import crossovers, exercise
from tools.gpu_run import exercised

SMALL = Shape(3, 5)
ABLE = [name for name, p in PEERS.items() if p.computes and not isinstance(p, Compiled)]


@pytest.fixture(autouse=True)
def flags_may_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own test utilities, which other tests import, forbid that to the whole process."""
    flags = torch.backends.flags_frozen.__globals__  # torch.backends itself is a wrapper
    monkeypatch.setitem(flags, "__allow_nonbracketed_mutation_flag", True)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """The command, in this process and without what takes seconds to measure; its result."""
    roof = Roofline({"float32": 100.0, "float64": 50.0}, dict.fromkeys(SIZES, 10.0))
    monkeypatch.setattr(limits, "of_processor", lambda threads: roof)
    monkeypatch.setattr(timing, "ROUNDS", {"cpu": range(2, 4), "cuda": range(2, 4)})
    monkeypatch.setattr(course, "ROUNDS", timing.ROUNDS)
    monkeypatch.setattr(record, "output", lambda *command: "0123456789")

    def run(*options: object, expected: int = 0) -> Any:
        out = tmp_path / "result.json"
        given = ["benchmarks", f"--out={out}", "--budget=1", *map(str, options)]
        monkeypatch.setattr(sys, "argv", given)
        assert command.main() == expected
        return load(out)

    return run


def times(row: dict[str, Any]) -> set[str]:
    return {name for name in row if name in PEERS}


def test_the_command(tmp_path: Path) -> None:
    """As a user starts it."""
    out = tmp_path / "result.json"
    extent = ("--shapes=3:5,16:16", "--batches=1,7", "--peers=lstmfused,torch,empty nn.Module")
    start = [sys.executable, "-m", "benchmarks", *extent, "--budget=3", f"--out={out}"]
    done = subprocess.run(start, cwd=record.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = load(out)
    assert {(r["units"], r["batch"], r["mode"]) for r in found["rows"]} == {
        (units, batch, mode) for units in (5, 16) for batch in (1, 7) for mode in STEP
    }
    for row in found["rows"]:
        least = (row["units"], row["batch"], row["mode"]) == (16, 1, "inference")
        assert times(row) == {"lstmfused", "torch", *["empty nn.Module"] * least}
        assert all(row[name] > 0 for name in times(row)) and row["noise"] >= 0
    # The metadata of a wheel may lack the local part, +cu130 for one.
    names = (torch.__version__, torch.__version__.partition("+")[0])
    assert found["build"] and found["versions"]["torch"] in names
    (roof,) = limits.rooflines(found).values()
    assert roof.limit(Case.of(found["rows"][0])) > 0
    for said in ("geometric mean", "| 3→5 ", "A call at 16→16", "Limits", found["processor"]):
        assert said in done.stdout
    assert out.with_suffix(".png").exists()


def stay(module: torch.nn.Module, **options: object) -> torch.nn.Module:
    return module


@pytest.mark.parametrize("suite", [name for name in SUITES if name != "full" and "gpu" not in name])
@pytest.mark.filterwarnings("ignore")  # of torch's own, by its profiler
def test_suites(
    suite: str,
    benchmarks: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch, "compile", stay)
    flag = () if suite == "default" else (f"--{suite}",)
    found = benchmarks(*flag, "--shapes=3:5", "--threads=1")
    of = SUITES[suite]._replace(shapes=(SMALL,), threads=(1,))
    wanted = [case.columns() for case in of.cases(1)]
    assert [{k: row[k] for k in wanted[0]} for row in found["rows"]] == [
        {k: case[k] for k in wanted[0]} for case in wanted
    ]
    supported = {name for name in of.peers for case in of.cases(1) if PEERS[name].supports(case)}
    assert set().union(*map(times, found["rows"])) == supported
    shown = capsys.readouterr().out
    assert "3→5" in shown and ("KiB" in shown) == (suite == "memory")


def test_against_another_checkout(benchmarks: Callable[..., Any], tmp_path: Path) -> None:
    extent = ("--shapes=3:5", "--batches=2", "--threads=1")
    found = benchmarks(f"--against={record.ROOT}", *extent)
    assert [{*row} & {"lstmfused", "before"} for row in found["rows"]] == [
        {"lstmfused", "before"} for _ in STEP
    ]
    with pytest.raises(SystemExit, match=r"lstmfused of .*, built there, was asked for"):
        benchmarks(f"--against={tmp_path}", *extent)


@pytest.mark.filterwarnings("ignore")
def test_full_run(
    benchmarks: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With its second process, and again from a file that was cut off."""
    children = []
    capability = torch.backends.cpu

    def in_process(start: list[str], env: dict[str, str], **_: Any) -> None:
        assert env.items() >= command.ONLY_AVX2.items()
        children.append(start)
        with monkeypatch.context() as patch:
            patch.setattr(capability, "get_cpu_capability", lambda: "AVX2")
            patch.setattr(sys, "argv", start[2:])
            assert command.main() == 0

    monkeypatch.setattr(subprocess, "run", in_process)
    monkeypatch.setattr(capability, "get_cpu_capability", lambda: "AVX512")
    peers = "lstmfused,torch,lstmfused float32,lstmfused batch-invariant"
    extent = ("--full", "--shapes=3:5", "--batches=1,2", "--threads=1", f"--peers={peers}")
    found = benchmarks(*extent)
    kinds = [(row["dtype"], row["mode"]) for row in found["rows"] if "isa" not in row]
    steps = {(dtype, mode) for dtype in SUITES["full"].dtypes for mode in STEP}
    assert set(kinds) == steps | {("float32", mode) for mode in cases.MEMORY}
    assert [row["batch"] for row in found["rows"] if row.get("isa") == "avx2"] == [1, 2]
    assert set(found["roofline"]) == {"1", "1 avx2"} and len(children) == 1

    path = tmp_path / "result.json"
    for key, value in (("rows", found["rows"][:3]), ("seconds", 0.0)):
        found[key] = value
    Record(path, found).flush()
    again = benchmarks(*extent, f"--resume={path}")
    assert again["rows"][:3] == found["rows"] and len(again["rows"]) == len(kinds) + 2
    Record(path, found | {"revision": "abc"}).flush()
    with pytest.raises(SystemExit, match="is of revision abc, this is 0123456789"):
        benchmarks(*extent, f"--resume={path}")
    with pytest.raises(SystemExit, match="asked for avx2, torch runs AVX512"):
        benchmarks("--full", "--isa=avx2")


# --------------------------------------------------------------------------------------------------
# What is computed


# By torch itself, when forward mode is first used.
@pytest.mark.filterwarnings("ignore:.torch.jit.[a-z_]*. is deprecated")
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in cases.MEMORY])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", ABLE)
def test_peers_are_right(name: str, dtype: str, mode: str) -> None:
    """One step, and a sequence of them."""
    peer, shape = PEERS[name], SMALL._replace(batch=7)
    for steps in (1, 3) if name not in ("cudnn", "lstmfused packed int8") else (1,):
        case = Case(shape, 7, mode, dtype, torch.get_num_threads(), steps)
        if not peer.supports(case) or peer.missing():
            assert name not in ("lstmfused", "torch")
            continue
        with torch.set_grad_enabled(mode not in cases.WITHOUT_GRAD), peer.context():
            verify(name, peer.bind(Problem(case)), mode)


@pytest.mark.parametrize("mode", STEP)
@pytest.mark.parametrize("sequence", cases.SEQUENCES)
@pytest.mark.parametrize("name", [name for name in SUITES["layer"].peers if PEERS[name].computes])
def test_peers_are_right_over_a_sequence(name: str, sequence: str, mode: str) -> None:
    peer, found = PEERS[name], []
    for steps in (1, 5):
        case = Case(SMALL, 7, mode, threads=1, steps=steps, sequence=sequence)
        if peer.supports(case) and not peer.missing():
            with torch.set_grad_enabled(mode == cases.TRAINING):
                verify(name, peer.bind(Problem(case)), mode)
            found.append(steps)
    whole = name == "lstmfused" or (sequence == cases.LAYER and name == "torch")
    untrained = name == "lstmfused packed" and mode == cases.TRAINING
    assert untrained or found[-1:] == [5] or name in ("torch", "onnxruntime")
    assert not whole or found == [1, 5]


def test_products_alone_multiply_what_a_layer_does() -> None:
    """Torch counts as many operations as a case is said to have."""
    for mode in STEP:
        case = Case(SMALL, 7, mode, threads=1, steps=5, sequence=cases.LAYER)
        given, trained = Problem(case).leaves.values(), mode == cases.TRAINING
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(trained):
            output, c = Multiply.apply(*given)  # type: ignore[no-untyped-call]
            if trained:
                torch.autograd.backward((output, c), (output, c))
        assert counter.get_total_flops() == case.flops


def wrong(spoil: Callable[[Problem, Tensor, Tensor], object]) -> Peer:
    """torch's cell, spoilt after a training step."""

    class Wrong(Bound):
        def run(self, mode: str) -> Any:
            right = super().run(mode)

            def step() -> tuple[Tensor, ...]:
                h, c = (output.detach().clone() for output in right())
                spoil(self.problem, h, c)
                return h, c

            return step

    class Spoilt(Peer):
        def bind(self, problem: Problem) -> Bound:
            return Wrong(**vars(super().bind(problem)))

    return Spoilt("lstmfused spoilt")


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (lambda p, h, c: h.add_(1e-4), "h is off by 1.0e-04"),
        (lambda p, h, c: c[0].fill_(torch.nan), "c is off by nan"),
        (lambda p, h, c: h.resize_(1, 5), r"h has shape \(1, 5\), not \(7, 5\)"),
        (lambda p, h, c: p.leaves["hx"].grad[-1].add_(1e-2), "grad hx is off"),
        (lambda p, h, c: setattr(p.leaves["bias_hh"], "grad", None), "grad bias_hh has shape None"),
    ],
)
def test_wrong_numbers_end_the_run(spoil: Any, where: str, tmp_path: Path) -> None:
    new = Record(tmp_path / "result.json", {"rows": [], "failed": []})
    running = Run(new, [PEERS["torch"], wrong(spoil)], Clock(1))
    with pytest.raises(WrongResult, match=f"wrong at 3→5 B=7 float32, training.*: {where}"):
        running.course([Case(SMALL, 7, "training")])
    assert new.data["rows"] == []


def test_a_peer_that_breaks_is_left_out(tmp_path: Path) -> None:
    class Broken(Peer):
        def bind(self, problem: Problem) -> Bound:
            raise RuntimeError("no such kernel")

    new = Record(tmp_path / "result.json", {"rows": [], "failed": []})
    Run(new, [PEERS["lstmfused"], Broken("broken")], Clock(0)).course([Case(SMALL, 1)])
    (row,), (broken,) = new.data["rows"], new.data["broken"]
    assert times(row) == {"lstmfused"} and "no such kernel" in broken["error"]


def test_batch_invariant_mode_is_on_while_it_is_timed(tmp_path: Path) -> None:
    modes = []

    class Watched(BatchInvariant):
        def bind(self, problem: Problem) -> Bound:
            right = super().bind(problem)

            def call() -> Any:
                modes.append(lstmfused.is_batch_invariant())
                return right.call()

            return Bound(right.problem, right.step, call)

    new = Record(tmp_path / "result.json", {"rows": [], "failed": []})
    Run(new, [Watched("lstmfused", lstmfused.LSTMCell)], Clock(0)).course([Case(SMALL, 1)])
    assert modes and all(modes) and not lstmfused.is_batch_invariant()


def test_limit() -> None:
    roof = Roofline({"float32": 100.0, "float64": 50.0}, {0: 20.0, 2**20: 10.0})
    square = Shape(512, 512)
    many, one = (Case(square, batch) for batch in (512, 1))
    assert roof.limit(many) == pytest.approx(2 * 512 * 1024 * 2048 / 100e9 * 1e6)
    weights = 4 * (2048 * (1024 + 2) + 5 * 512)
    assert roof.limit(one) == pytest.approx(weights / 10e9 * 1e6)
    assert roof.limit(many._replace(mode="training")) == pytest.approx(3 * roof.limit(many))
    assert roof.limit(many._replace(dtype="float64")) == pytest.approx(2 * roof.limit(many))
    small = Case(Shape(64, 64), 1)
    cold = small._replace(launch="cold graph")  # whose weights no cache holds
    assert roof.limit(cold) == pytest.approx(2 * roof.limit(small))


def test_grids() -> None:
    default = {(case.shape, case.batch) for case in SUITES["default"].cases(1)}
    assert {(shape, shape.batch) for shape in cases.SHAPES} <= default
    gpu = SUITES["gpu"].cases(1)
    assert len(set(gpu)) == len(gpu)
    assert (gpu[0].batch, gpu[0].dtype) == (128, "bfloat16")
    assert all((c.launch == "cold graph") <= (c.shape.units >= 512) for c in gpu)
    tiers = [cases.worth(case)[0] for case in gpu]
    assert tiers == sorted(tiers) and {c.dtype for c in gpu} == set(cases.GPU_DTYPES)
    assert course.graph_steps(Case(Shape(512, 512), 32)) == course.STEPS
    assert course.graph_steps(Case(Shape(2048, 2048), 4096)) == 2


# --------------------------------------------------------------------------------------------------
# On a GPU, under a pretence


class PretendedGraph:
    def __init__(self, body: Callable[[], object]) -> None:
        self.replay = body
        body()


class PretendedEvent:
    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: PretendedEvent) -> float:
        return (other.at - self.at) * 1e3


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Where cases are told to be of a GPU, and their tensors are not."""
    properties = SimpleNamespace(L2_cache_size=1 << 16)
    for name in ("synchronize", "empty_cache", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "Event", PretendedEvent)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(timing, "capture", PretendedGraph)
    monkeypatch.setattr(timing, "TURN", {"cpu": 1e-5, "cuda": 1e-5})
    monkeypatch.setattr(limits, "DEVICE", "cpu")
    ones, made = torch.ones, Problem.__init__

    def on_cpu(self: Problem, case: Case, seed: int = 0) -> None:
        made(self, case._replace(device="cpu"), seed)

    monkeypatch.setattr(Problem, "__init__", on_cpu)
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    new = Record(tmp_path / "gpu.json", {"rows": [], "failed": [], "suite": "gpu"})
    return Run(new, [PEERS[name] for name in ("lstmfused", "torch", "cudnn")], Clock(60))


@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16"])
def test_launches(gpu: Run, dtype: str) -> None:
    suite = SUITES["gpu"]._replace(shapes=(Shape(24, 512),), batches=(3,), dtypes=(dtype,))
    gpu.course(suite.cases(1))
    rows = gpu.record.data["rows"]
    assert len(rows) == 5 and {row.get("launch", "eager") for row in rows} == set(cases.LAUNCHES)
    assert all(times(row) == {"lstmfused", "torch", "cudnn"} for row in rows)
    assert "broken" not in gpu.record.data and not gpu.record.data["failed"]
    assert load(gpu.record.path)["rows"] == [record.short(row) for row in rows]


def test_tf32_has_a_tolerance_of_its_own_and_flags_are_put_back() -> None:
    flags: Any = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    with problem.precision("tf32"):
        assert [flag.allow_tf32 for flag in flags] == [True, True]
    assert [flag.allow_tf32 for flag in flags] == before
    for dtype, right in (("tf32", True), ("float32", False)):
        given = PEERS["torch"].bind(Problem(Case(SMALL, 2, dtype=dtype)))
        h, c = given.call()
        rounded = Bound(given.problem, given.step, lambda h=h, c=c: (h + 1e-4, c))  # type: ignore[misc]
        if right:
            verify("torch", rounded, "inference")
        else:
            with pytest.raises(WrongResult):
                verify("torch", rounded, "inference")


def test_what_there_is_no_time_for_is_left_out(gpu: Run) -> None:
    gpu.clock = Clock(0)
    gpu.course([Case(SMALL, 1, device="cuda")])
    assert gpu.record.data["rows"] == [] and len(gpu.record.data["left_out"]) == 1


def test_on_a_gpu_nothing_wrong_ends_the_run_but_a_lost_device(
    gpu: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (Case(SMALL, batch, device="cuda") for batch in (1, 2))
    gpu.field = [*gpu.field, wrong(lambda p, h, c: h.add_(1))]
    gpu.course([first])
    assert "is off" in gpu.record.data["broken"][0]["error"] and len(gpu.record.data["rows"]) == 1

    def dead() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", dead)
        with pytest.raises(DeviceLost, match="is off"):
            gpu.course([first, second])
    # Another process goes on behind it.
    assert [row["batch"] for row in load(gpu.record.path)["failed"]] == [2]
    gpu.course([first, second])
    assert len(gpu.record.data["rows"]) == 1


PROPERTIES = {"device": "cuda", "processor": "A GPU", "cuda": "13"}


@pytest.fixture
def paths(gpu: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Of the extension: which path a step takes, and how it is forced along another."""
    forced = [""]

    def path(dtype: torch.dtype, B: int, I: int, H: int, tf32: bool) -> str:
        half = dtype in (torch.bfloat16, torch.float16)
        able = half or (tf32 and forced[0] == "tensor_cores") or forced[0] in ("", "small_batch")
        return (forced[0] if able else "products") or "small_batch"

    def force(name: str) -> None:
        forced[0] = name

    monkeypatch.setattr(crossovers, "_c", SimpleNamespace(cuda_path=path, set_cuda_path=force))
    return gpu


def test_a_run_on_a_gpu_is_shown(
    gpu: Run, benchmarks: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    roof = Roofline(dict.fromkeys(cases.DTYPES, 100.0), {0: 20.0, 2**20: 10.0})
    monkeypatch.setattr(record, "gpu", lambda: PROPERTIES)
    monkeypatch.setattr(limits, "of_gpu", lambda: roof)
    found = benchmarks("--gpu", "--shapes=64:512", "--batches=2", "--revision=abc", "--budget=60")
    assert (found["processor"], found["device"], found["revision"]) == ("A GPU", "cuda", "abc")
    assert len(found["rows"]) == 5 * len(cases.GPU_DTYPES) and not found["failed"]
    shown = capsys.readouterr().out
    for said in ("64→512", "A GPU, ", "graph, B <= 32, H <= 512", "cold graph", "nn.LSTM, cuDNN"):
        assert said in shown


def test_crossovers(
    paths: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(record, "gpu", lambda: PROPERTIES)
    for name, some in (("GPU_DTYPES", ("float32", "bfloat16")), ("GPU_SQUARE", (Shape(8, 8),))):
        monkeypatch.setattr(crossovers, name, some)
    monkeypatch.setattr(crossovers, "GPU_BATCHES", (1, 300))
    out = tmp_path / "crossovers.json"
    monkeypatch.setattr(sys, "argv", ["crossovers", f"--out={out}", "--revision=abc"])
    assert crossovers.main() == 0 and "fastest path, bfloat16" in capsys.readouterr().out
    found = load(out)
    single, half = {"small_batch", "products"}, set(PATHS)
    training = {"training small_batch", "training products"}
    about = {"dtype", "units", "batch", "path"}
    assert [set(row) - about for row in found["crossovers"]] == [
        single | training, single, half | training, half
    ]  # fmt: skip
    again = ["crossovers", f"--resume={out}", "--revision=abc", "--budget=0"]
    monkeypatch.setattr(sys, "argv", again)
    assert crossovers.main() == 0 and load(out)["left_out"] == []


@pytest.mark.parametrize("options", [[], ["--unchecked"]])
def test_exercise(
    paths: Run, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["exercise", *options])
    assert exercise.main() == 0
    found = exercised(capsys.readouterr().out)
    assert found["counts"]["checked"] > 60 and not found["wrong"]

    def off(*_: Any) -> None:
        raise WrongResult("h is off")

    monkeypatch.setattr(exercise, "verify", off)
    assert exercise.main() == (not options)
    assert bool(exercised(capsys.readouterr().out)["wrong"]) == (not options)


def test_ceilings(gpu: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MIB", 2**8)
    monkeypatch.setattr(limits, "replayed", lambda *_: lambda: 2.0)
    monkeypatch.setattr(torch, "mm", lambda *_, **__: None)
    roof = limits.of_gpu()
    assert roof.bandwidth[int(0.8 * (1 << 16))] == pytest.approx(2 * 512 * 2**8 / 2e-6 * 1e-9)
    assert roof.peak["bfloat16"] == pytest.approx(2 * 8192**3 / 2e-6 * 1e-9)
    assert max(roof.bandwidth.values()) == roof.bandwidth[0]


# --------------------------------------------------------------------------------------------------
# The file, and cliffs


def test_a_cut_off_write_leaves_the_last_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = Record(tmp_path / "a.json", {"rows": [{"a": 1.23456}, {"b": "c"}], "none": []})
    new.flush()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    new.data["rows"] = []
    with pytest.raises(KeyboardInterrupt):
        new.flush()
    assert load(new.path) == {"rows": [{"a": 1.235}, {"b": "c"}], "none": []}


def test_cliffs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A ratio that is too large again and again is one; what was so once is not."""
    found = [{"a": 1.0, "b": 9.0}, {"a": 1.0, "b": 2.0}, *[{"a": 1.0, "b": 4.0}] * cliffs.ATTEMPTS]
    monkeypatch.setattr(cliffs.Cliff, "ratios", lambda _: found.pop(0))
    pair = [cliffs.Cliff(name, {}, 3, {}) for name in ("once", "always")]
    monkeypatch.setattr(cliffs, "cliffs", lambda: pair)
    monkeypatch.setattr(cliffs, "keep_memory", lambda: None)
    assert cliffs.main() == 1 and not found
    once, always = capsys.readouterr().out.splitlines()[-2:]
    assert "CLIFF" not in once and "4.00x" in always and "CLIFF" in always


def test_calls_of_cliffs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is right and runs; those of many rows are as slow as others of fewer."""
    monkeypatch.setattr(cliffs.Cliff, "ratios", lambda _: {"normal": 1.0})
    monkeypatch.setattr(cliffs, "LOPSIDED", ((Shape(3, 3), 1000),))
    names = []
    for cliff in cliffs.cliffs():
        names.append(cliff.name.split(",")[0].split()[0])
        for call in cliff.calls.values():
            call()
    assert set(names) == {"denormals", "near", "threads", "several"}
