"""All of benchmarks.gpu that does not need a GPU; what does runs on the CPU under a pretence."""

from __future__ import annotations

import json
import math
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the benchmarks are run from the repository, not installed

from benchmarks.gpu import __main__ as command  # noqa: E402
from benchmarks.gpu import (  # noqa: E402
    ceilings,
    checks,
    contestants,
    crossovers,
    exercise,
    paths,
    plan,
    problem,
    rows,
    stages,
    summary,
    timing,
)
from benchmarks.gpu.floor import floor  # noqa: E402
from benchmarks.gpu.process import junit, outcomes, run, sanitized  # noqa: E402
from benchmarks.gpu.record import Clock, DeviceLost, Record  # noqa: E402
from benchmarks.shapes import Shape  # noqa: E402
from benchmarks.verify import TOLERANCE, WrongResult, verify  # noqa: E402

MACHINE = {
    "revision": "0123456789abcdef",
    "dirty": False,
    "device": {"name": "A Device", "l2_bytes": 50 << 20},
    "versions": {"torch": "2.11.0", "triton": None},
}


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def flags_may_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own test utilities, which other tests import, forbid that to the whole process."""
    flags = torch.backends.flags_frozen.__globals__  # torch.backends itself is a wrapper
    monkeypatch.setitem(flags, "__allow_nonbracketed_mutation_flag", True)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    data = {"machine": MACHINE, "stages": {}, "ceilings": {}, "rows": [], "failed": []}
    return Record(tmp_path / "results" / "result.json", data)


def on_disk(record: Record) -> Any:
    return json.loads(record.path.read_text())


# --------------------------------------------------------------------------------------------------
# Time and the file


def test_clock() -> None:
    now = Time()
    clock = Clock(100, now)
    part, capped = clock.part(0.5), clock.part(0.5, cap=10)
    assert (clock.left(), part.left(), capped.left()) == (100, 50, 10)
    now.now = 60
    assert (clock.left(), part.left(), clock.part(0.5).left()) == (40, 0, 20)


def test_a_cut_off_write_leaves_the_last_whole_file(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    record.stage("build", {"status": "done"})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        record.stage("smoke", {"status": "done"})
    assert on_disk(record)["stages"] == {"build": {"status": "done"}}


def context(record: Record, restarted: bool = False) -> stages.Context:
    return stages.Context(record, record.path.parent, True, 0, restarted)


def taking(now: Time, seconds: float, status: str = "done") -> Callable[..., Any]:
    def stage(context: stages.Context, clock: Clock) -> Any:
        now.now += min(seconds, clock.left())
        return {"status": status, "got": clock.left()}

    return stage


def statuses(record: Record) -> dict[str, str]:
    return {name: stage["status"] for name, stage in on_disk(record)["stages"].items()}


def test_stages_share_the_time(record: Record) -> None:
    now = Time()
    table = {
        "a": stages.Stage(taking(now, 10), 0.5),
        "b": stages.Stage(taking(now, 1000), 0.5, cap=20),
        "c": stages.Stage(taking(now, 1000), 1.0),
        "d": stages.Stage(taking(now, 1), 1.0),
    }
    assert stages.run(context(record), Clock(100, now), tuple("abcd"), table) is None
    assert statuses(record) == {"a": "done", "b": "done", "c": "done", "d": "left out"}
    found = on_disk(record)["stages"]
    assert [found[name]["stage_seconds"] for name in "abc"] == [10, 20, 70 - stages.RESERVE]
    assert found["d"]["reason"] == "no time left"
    assert now.now < 100


def test_nothing_runs_after_a_vital_stage_has_failed(record: Record) -> None:
    now = Time()

    def breaks(*_: Any) -> Any:
        raise RuntimeError("no kernel image")

    table = {
        "first": stages.Stage(breaks, 0.5),
        "build": stages.Stage(taking(now, 1, "failed"), 0.5, vital=True),
        "smoke": stages.Stage(taking(now, 1), 0.5, vital=True),
        "other": stages.Stage(taking(now, 1), 0.5),
    }
    chosen = ("first", "build", "smoke")
    assert stages.run(context(record), Clock(9, now), chosen, table) == "build failed"
    found = on_disk(record)["stages"]
    assert statuses(record) == {"first": "failed", "build": "failed", "smoke": "left out"}
    assert found["smoke"]["reason"] == "build failed"
    assert "RuntimeError: no kernel image" in found["first"]["error"][-1]
    assert record.data["stages"]["other"]["reason"] == "not asked for"


def test_going_on(record: Record) -> None:
    """A later run repeats what failed; a restarted one goes on behind it."""
    now = Time()
    table = {
        "a": stages.Stage(taking(now, 1), 0.5),
        "b": stages.Stage(taking(now, 1, "failed"), 0.5),
        "c": stages.Stage(taking(now, 1, "cut"), 0.5),
    }
    stages.run(context(record), Clock(100, now), tuple("abc"), table)
    begun = now.now
    stages.run(context(record, restarted=True), Clock(100, now), tuple("abc"), table)
    assert now.now == begun + 1
    stages.run(context(record), Clock(100, now), tuple("abc"), table)
    assert now.now == begun + 3


# --------------------------------------------------------------------------------------------------
# Rows and their order


def test_plan() -> None:
    cells = plan.cells()
    assert len(set(map(str, cells))) == len(cells)  # it tells what need not be repeated
    plain = [cell for cell in cells if cell.contestants == plan.PEERS]
    assert len(plain) == len(plan.PRECISIONS) * len(plan.SHAPES) * len(plan.BATCHES)
    assert len(cells) - len(plain) == len(plan.COMPILED_CELLS)
    for cell in plain:
        assert (plan.COLD in cell.modes) == (cell.shape.units >= 512)
    assert all(contestants.FIELD[name] for cell in cells for name in cell.contestants)


@pytest.mark.parametrize("quick", [False, True])
def test_the_targets_come_first(quick: bool) -> None:
    cells = plan.cells(quick)
    tiers = [plan.tier(cell) for cell in cells]
    assert tiers == sorted(tiers)
    first = cells[0]
    assert (first.batch, first.precision) == (128, "bfloat16")
    targeted = [cell for cell in cells if plan.tier(cell) == 1]
    assert {cell.precision for cell in targeted[:2]} <= {"bfloat16", "float32"}
    assert all(cell.batch <= 32 and cell.shape.units <= 512 for cell in targeted)


def test_quick_is_few() -> None:
    assert 5 < len(plan.cells(quick=True)) < 20


def test_graph_steps() -> None:
    def steps(units: int, batch: int) -> int:
        cell = plan.Cell("float32", Shape(units, units), batch)
        return plan.graph_steps(cell.case(training=False))

    assert steps(512, 32) == steps(1024, 128) == plan.STEPS
    assert steps(2048, 4096) == 2


def test_cells_until_the_time_is_over(record: Record) -> None:
    now = Time()
    planned = [plan.Cell("float32", Shape(64, 64), batch) for batch in (1, 2, 3, 4, 5)]
    seconds = []

    def measure(cell: plan.Cell, share: float) -> Any:
        now.now += 4
        seconds.append(share)
        if cell.batch == 2:
            raise RuntimeError("out of memory")
        return [{"cell": str(cell)}]

    found = stages.cells(planned, Clock(15, now), record, measure)
    assert found["status"] == "cut" and found["left_out"] == [str(cell) for cell in planned[3:]]
    assert [row["cell"] for row in on_disk(record)["rows"]] == [str(planned[0]), str(planned[2])]
    assert "out of memory" in on_disk(record)["failed"][0]["error"]
    assert all(0.1 <= share <= 2 for share in seconds)

    found = stages.cells(planned, Clock(60, now), record, measure)
    assert found == {"status": "done", "left_out": []}
    assert len(record.data["rows"]) == 4 and len(record.data["failed"]) == 1


def test_no_compilation_begins_that_may_not_end(record: Record) -> None:
    compiled = plan.Cell("float32", Shape(64, 64), 1, plan.COMPILED)
    plain = compiled._replace(contestants=plan.PEERS)
    clock = Clock(stages.COMPILATION - 1, Time())
    found = stages.cells([compiled, plain], clock, record, lambda c, _: [{"cell": str(c)}])
    assert found["left_out"] == [str(compiled)]
    assert record.data["rows"] == [{"cell": str(plain)}]


def test_a_lost_device_ends_the_process_but_not_the_run(record: Record) -> None:
    cells = [plan.Cell("float32", Shape(64, 64), batch) for batch in (1, 2)]

    def lost(*_: Any) -> Any:
        raise DeviceLost("illegal memory access")

    with pytest.raises(DeviceLost):
        stages.cells(cells, Clock(60, Time()), record, lost)
    assert [entry["cell"] for entry in on_disk(record)["failed"]] == [str(cells[0])]
    found = stages.cells(cells, Clock(60, Time()), record, lambda c, _: [{"cell": str(c)}])
    assert found["status"] == "done" and record.data["rows"] == [{"cell": str(cells[1])}]


def test_restart(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, arguments: ran.append(arguments))
    monkeypatch.setattr(sys, "argv", ["gpu", "--deadline", "99", "--quick"])
    args = command.arguments(["--deadline", "99", "--quick"])
    command.restart(args, record, Clock(50, Time()))
    again = command.arguments(ran[0][3:])
    assert (again.deadline, again.resume, again.restarts) == (50, record.path, 1)
    assert again.quick
    command.restart(args, record, Clock(20, Time()))
    args.restarts = command.RESTARTS
    command.restart(args, record, Clock(50, Time()))
    assert len(ran) == 1


# --------------------------------------------------------------------------------------------------
# Commands and what they print


def test_run(tmp_path: Path) -> None:
    found = run([sys.executable, "-c", "print('so'); raise SystemExit(3)"], tmp_path / "log", 60)
    assert (found["returncode"], found["timed_out"], found["tail"]) == (3, False, ["so"])
    found = run(["/absent/command"], tmp_path / "log", 60)
    assert found["returncode"] is None and "No such file" in found["tail"][-1]
    start = time.monotonic()
    sleep = "print('begun', flush=True); import time; time.sleep(60)"
    found = run([sys.executable, "-c", sleep], tmp_path / "log", 1)
    assert found["timed_out"] and found["tail"][0] == "begun" and found["returncode"] is None
    assert time.monotonic() - start < 20


PYTEST = """
tests/test_cuda.py::test_parity[float32-a b] PASSED                      [ 25%]
tests/test_cuda.py::test_parity[bfloat16] FAILED                         [ 50%]
tests/test_cuda.py::test_graph SKIPPED (no device)                       [ 75%]
tests/test_cuda.py::test_hangs
"""


def test_outcomes_of_a_run_that_was_cut_off() -> None:
    assert outcomes(PYTEST) == {
        "counts": {"passed": 1, "failed": 1, "skipped": 1},
        "failures": [{"name": "tests/test_cuda.py::test_parity[bfloat16]", "lines": []}],
    }
    assert outcomes("")["counts"] == {}


def test_junit() -> None:
    text = """<testsuites><testsuite><testcase classname="a" name="b"/>
    <testcase classname="a" name="c"><failure message="m">def c():\nE   wrong\n</failure></testcase>
    <testcase classname="a" name="d"><skipped/></testcase>
    <testcase classname="a" name="e"><error message="only this"/></testcase>
    </testsuite></testsuites>"""
    assert junit(text) == {
        "counts": {"passed": 1, "failed": 1, "skipped": 1, "errors": 1},
        "failures": [
            {"name": "a::c", "lines": ["def c():", "E   wrong"]},
            {"name": "a::e", "lines": ["only this"]},
        ],
    }


def test_tests_stage(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text("def test_right(): pass\ndef test_wrong(): assert 1 == 2\n")
    found = checks.tests(Clock(60), tmp_path / "logs", str(file))
    assert (found["status"], found["returncode"]) == ("failed", 1)
    assert found["counts"] == {"passed": 1, "failed": 1}
    assert "test_wrong" in found["failures"][0]["name"]
    assert "assert 1 == 2" in "\n".join(found["failures"][0]["lines"])
    found = checks.tests(Clock(60), tmp_path / "logs", str(tmp_path / "absent.py"))
    assert found["status"] == "left out" and "not found" in found["reason"]


def test_tests_stage_ends_in_time(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text("import time\ndef test_right(): pass\ndef test_slow(): time.sleep(60)\n")
    found = checks.tests(Clock(14), tmp_path / "logs", str(file))
    assert found["status"] == "failed" and found["timed_out"]
    assert found["counts"]["passed"] == 1


def test_build_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[str | None] = [
        None,
        "built for torch 2.9",
        None,
        "no _build",
        "built without CUDA",
    ]
    monkeypatch.setattr(checks, "stale", lambda: answers.pop(0))
    monkeypatch.setattr(checks, "python", lambda *_: ["sh", "-c", "echo $LSTMFUSED_CUDA; exit 0"])
    assert checks.build(Clock(9), tmp_path) == {"status": "done", "built": False}
    found = checks.build(Clock(9), tmp_path)
    assert (found["status"], found["reason"]) == ("done", "built for torch 2.9")
    assert found["tail"] == ["1"] and found["seconds"] < 9
    found = checks.build(Clock(9), tmp_path)
    assert (found["status"], found["wrong"]) == ("failed", "built without CUDA")
    answers.append("no _build")
    monkeypatch.setattr(checks, "python", lambda *_: ["sh", "-c", "exit 2"])
    assert checks.build(Clock(9), tmp_path)["wrong"] == "it failed"


def test_what_is_built_is_found_out() -> None:
    """Whatever is loaded here, the question itself is understood."""
    reason = checks.stale()
    assert reason is None or ("Traceback" not in reason and "Error" not in reason)


def test_sanitized() -> None:
    assert sanitized("========= ERROR SUMMARY: 0 errors\n") == {"errors": 0, "report": []}
    race = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert sanitized(race)["errors"] == 0
    bad = "========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 2 errors"
    assert sanitized(bad) == {"errors": 2, "report": bad.splitlines()}
    assert sanitized("killed before its end")["errors"] is None


def test_sanitizer_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "tool", lambda _: None)
    assert checks.sanitize(Clock(9), tmp_path)["reason"] == "compute-sanitizer not found"
    fake = tmp_path / "compute-sanitizer"
    fake.write_text('#!/bin/sh\necho "$@"\necho "========= ERROR SUMMARY: 0 errors"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(checks, "tool", lambda _: str(fake))
    found = checks.sanitize(Clock(60), tmp_path)
    assert found["status"] == "done" and set(found["tools"]) == set(checks.SANITIZERS)
    assert "kernel_substring=lstmfused" in found["tools"]["racecheck"]["tail"][0]
    assert "kernel_substring" not in found["tools"]["initcheck"]["tail"][0]


def test_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "output", lambda *_: None)
    assert checks.revision(None) == {"revision": "unknown", "dirty": None}
    assert checks.revision("abc") == {"revision": "abc", "dirty": None}
    answers = {"rev-parse": "f00", "status": " M file"}
    monkeypatch.setattr(checks, "output", lambda *words: answers[words[1]])
    assert checks.revision(None) == {"revision": "f00", "dirty": True}


# --------------------------------------------------------------------------------------------------
# The floor and the targets

CEILINGS = {
    "copy_gbs": 3000.0,
    "l2_read_gbs": 6000.0,
    "l2_bytes": 50 << 20,
    "matmul_tflops": {"float32": 50.0, "bfloat16": 800.0},
}


def test_floor() -> None:
    def of(
        precision: str, units: int, batch: int, cold: bool = False, training: bool = False
    ) -> Any:
        cell = plan.Cell(precision, Shape(units, units), batch)
        return floor(CEILINGS, cell.case(training), precision, cold)

    weights = 2048 * (1024 + 2) + 5 * 512
    assert of("float32", 512, 1) == pytest.approx(4 * weights / 6000e9 * 1e6)
    assert of("float32", 512, 1, cold=True) == pytest.approx(4 * weights / 3000e9 * 1e6)
    assert of("bfloat16", 2048, 1) == of("bfloat16", 2048, 1, cold=True)  # more than the cache
    flops = 2 * 4096 * 2048 * 4096
    assert of("float32", 1024, 4096) == pytest.approx(flops / 50e12 * 1e6)
    assert of("float32", 1024, 4096, training=True) == pytest.approx(3 * flops / 50e12 * 1e6)
    assert of("float16", 512, 1) is None  # no ceiling
    case = plan.Cell("float32", Shape(1, 1), 1).case(False)
    assert floor({}, case, "float32", False) is floor(None, case, "float32", False) is None


def row(mode: str, batch: int, units: int, ratio: float, **other: Any) -> Any:
    """One where each peer takes `ratio` times lstmfused's 10 microseconds."""
    names = other.pop("peers", ("torch",))

    def time_of(median: float) -> Any:
        return {"median": median, "q1": 0.98 * median, "q3": 1.02 * median}

    return {
        "cell": f"{units} {batch}",
        "precision": "float32",
        "input": units,
        "units": units,
        "batch": batch,
        "mode": mode,
        "microseconds": {"lstmfused": time_of(10), **{k: time_of(10 * ratio) for k in names}},
        "speedup": dict.fromkeys(names, ratio),
        "limit": 5.0,
        "share": {"lstmfused": 0.5},
        "broken": {},
        **other,
    }


def test_targets() -> None:
    found = [
        row("graph", 1, 64, 2.0),
        row("graph", 32, 512, 4.0),
        row("eager", 1, 64, 2.0),
        row("graph", 128, 512, 1.8, precision="bfloat16"),
        row("graph", 128, 512, 0.99),
        row("graph", 64, 512, 1.5),
        row("training", 32, 1024, 2.5),
        row("training", 64, 64, 0.5),
        row("graph", 128, 64, 1.2, peers=("cudnn",)),
        row("graph", 256, 64, 0.2, peers=("cudnn",)),
        row("eager", 1, 64, 0.5, cell="64→64 B=1 float32 compiled"),
    ]
    judged = {entry["name"]: entry for entry in summary.targets(found)}
    graph = judged["graph, B <= 32, H <= 512"]
    assert graph["reached"] is True and graph["rows"] == 2 and graph["below_goal"] == 1
    assert graph["geometric_mean"] == pytest.approx(math.sqrt(8)) and graph["least"] == 2
    eager = judged["eager, B <= 32, H <= 512"]
    assert (eager["reached"], eager["rows"], eager["least"]) == (False, 1, 2)
    assert judged["graph, B = 128, H 512 to 1024, bfloat16"]["reached"] is True
    others = judged["every other, inference"]
    assert (others["reached"], others["rows"], others["below_goal"]) == (False, 2, 1)
    assert others["worst"][0] == "~0.99x 512→512 B=128 float32 graph"
    assert judged["training, B <= 32"]["reached"] is True
    assert judged["every other, training"]["worst"] == ["0.50x 64→64 B=64 float32 training"]
    assert judged["cuDNN, T = 1, B <= 128"]["reached"] is True
    assert judged["compile, reduce-overhead, B <= 128"]["reached"] is None


def test_every_row_belongs_to_one_target_against_torch() -> None:
    against_torch = [target for target in summary.TARGETS if target.peer == "torch"]
    for cell in plan.cells():
        for mode in cell.modes:
            of_row = row(mode, cell.batch, cell.shape.units, 1, precision=cell.precision)
            assert sum(target.wanted(of_row) for target in against_torch) == 1, (cell, mode)


@pytest.fixture
def written(record: Record) -> Record:
    record.data["ceilings"] = CEILINGS
    broken = {"microseconds": {}, "speedup": {}, "share": {}, "error": "out of memory"}
    record.data["rows"] = [
        row("graph", 1, 64, 2.0),
        row("graph cold", 4096, 2048, 0.7, precision="tf32", broken={"cudnn": "no plan"}),
        {**row("eager", 8, 64, 1.0), **broken},
    ]
    record.data["failed"] = [{"cell": "64→64 B=1", "error": "lost"}]
    record.data["crossovers"] = [
        {
            "precision": "float32",
            "units": 512,
            "batch": 8,
            "auto": "products",
            "best": "few_rows",
            "microseconds": {"few_rows": 4.0, "products": 5.0},
            "broken": {},
        },
        {"precision": "tf32", "units": 64, "error": "device lost"},
    ]
    wrong = {"cell": "33→17 B=40 float32", "path": "products", "error": "WrongResult: off"}
    failure = {"name": "test_cuda::test_parity", "lines": ["", "E  assert 1 == 2"]}
    record.data["stages"] = {
        "build": {"status": "failed", "wrong": "it failed", "tail": ["nvcc: no"]},
        "smoke": {"status": "failed", "wrong": [wrong], "checked": 3, "tail": []},
        "tests": {"status": "failed", "counts": {"failed": 1}, "failures": [failure]},
        "sanitizer": {
            "status": "done",
            "tools": {"memcheck": {"errors": 0, "timed_out": True}},
            "stage_seconds": 3.2,
        },
        "crossovers": {"status": "cut", "reason": "no time left", "left_out": ["tf32 64"]},
    }
    record.flush()
    return record


def test_show(written: Record) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--show", str(written.path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for text in (
        "2.00x 10 µs 50%",
        "tf32, graph cold",
        "failed",
        "1 x cudnn: no plan",
        "1 x out of memory",
        "64→64 B=1: lost",
        "few_rows 4 µs !1.25",
        "nvcc: no",
        "33→17 B=40 float32 products: WrongResult: off",
        "test_cuda::test_parity: E  assert 1 == 2",
        "memcheck 0 errors (cut off) (3 s)",
        "no time left; 1 left out",
        "NOT REACHED",
        "0.70x 2048→2048 B=4096 tf32 graph cold",
        "A Device; torch 2.11.0; revision 0123456789",
        "TFLOP/s float32 50",
    ):
        assert text in shown, text
    assert "triton" not in shown


def test_an_empty_result_can_be_shown(record: Record) -> None:
    assert "not measured" in summary.text(record.data)


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.arguments([]).stages == tuple(stages.STAGES)
    assert command.arguments(["--stages", "build,benchmark"]).stages == ("build", "benchmark")
    with pytest.raises(SystemExit):
        command.arguments(["--stages", "build,absent"])
    assert "absent: choose from build, smoke" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("visible", "device", "seen"),
    [
        (None, "0", "0"),
        (None, "cuda:1", "1"),
        ("GPU-a,GPU-b", "1", "GPU-b"),
        ("3", "1", ""),
        ("", "0", ""),
    ],
)
def test_see_only(
    visible: str | None, device: str, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    command.see_only(device)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_resume(record: Record) -> None:
    record.data["rows"] = [{"cell": "a"}]
    record.flush()
    args = command.arguments(["--resume", str(record.path)])
    again = command.opened(args, MACHINE)
    assert (again.path, again.data["rows"]) == (record.path, [{"cell": "a"}])
    with pytest.raises(SystemExit, match="this is"):
        command.opened(args, {**MACHINE, "revision": "other"})
    name = command.opened(command.arguments([]), MACHINE).path.name
    assert name.startswith("a-device-20") and name.endswith("-0123456789.json")


def test_without_a_gpu() -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--device", "99"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=hidden,
        check=False,
    )
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.splitlines()[-1] == "error: there is no GPU that torch can use"


# --------------------------------------------------------------------------------------------------
# What measures, on the CPU in the device's place


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
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(L2_cache_size=1 << 20)
    cuda = {
        "Event": PretendedEvent,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "_sleep": lambda _: None,
        "get_device_properties": lambda _: properties,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for module in (problem, contestants, ceilings, rows):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "capture", PretendedGraph)
    monkeypatch.setattr(timing, "SAMPLE", 1e-5)
    monkeypatch.setattr(timing, "ROUNDS", range(2, 4))
    forced = [""]

    def path(dtype: torch.dtype, B: int, I: int, H: int, tf32: bool) -> str:
        if forced[0] == "tensor_cores" and dtype in (torch.float32, torch.float64) and not tf32:
            return "products"
        return forced[0] or "few_rows"

    def force(name: str) -> None:
        forced[0] = name

    monkeypatch.setattr(paths, "_c", SimpleNamespace(cuda_path=path, set_cuda_path=force))


ABOUT = {"seed": 0, "ceilings": CEILINGS, "l2_bytes": 1 << 16}


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_measure(pretended: None, precision: str) -> None:
    cell = plan.Cell(precision, Shape(24, 32), 3, modes=plan.MODES)
    found = rows.measure(cell, 0, ABOUT)
    assert [entry["mode"] for entry in found] == list(plan.MODES)
    for entry in found:
        assert entry["broken"] == {} and "error" not in entry
        times = entry["microseconds"]
        assert set(times) == set(plan.PEERS)
        assert all(0 < t["q1"] <= t["median"] <= t["q3"] for t in times.values())
        ratio = times["cudnn"]["median"] / times["lstmfused"]["median"]
        assert entry["speedup"]["cudnn"] == pytest.approx(ratio, rel=1e-3)
        assert entry["path"] == "few_rows" and entry["cell"] == str(cell)
        assert (entry["limit"] is None) == (precision == "tf32")
    by_mode = {entry["mode"]: entry for entry in found}
    assert by_mode["graph"]["steps"] == plan.STEPS and by_mode["eager"]["steps"] == 1
    copies = -(-3 * ABOUT["l2_bytes"] // (4 * 32 * (24 + 32 + 2) * (2 if "b" in precision else 4)))  # type: ignore[operator]
    assert by_mode["graph cold"]["steps"] % copies == 0 < by_mode["graph cold"]["steps"]
    json.dumps(found)


def test_what_is_wrong_is_not_timed(pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*_: Any) -> Any:
        raise WrongResult("h is off by 1e-3")

    def no_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    right = verify
    monkeypatch.setattr(
        problem, "verify", lambda name, *of: off() if name == "torch" else right(name, *of)
    )
    monkeypatch.setattr(rows, "training", no_memory)
    cell = plan.Cell(
        "float32", Shape(8, 8), 2, modes=(plan.GRAPH, plan.TRAINING_GRAPH, plan.TRAINING)
    )
    graph, training_graph, training = rows.measure(cell, 0, ABOUT)
    for entry in graph, training:
        assert set(entry["microseconds"]) == {"lstmfused", "cudnn"}
        assert entry["broken"] == {"torch": "WrongResult: h is off by 1e-3"}
    assert training_graph["microseconds"] == training_graph["speedup"] == {}
    assert "out of memory" in training_graph["broken"]["lstmfused"]


def test_a_dead_device_is_noticed(pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        rows.measure(plan.Cell("float32", Shape(8, 8), 2), 0, ABOUT)


def test_precision_is_the_same_for_everyone_and_put_back() -> None:
    flags: Any = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    with problem.precision("tf32"):
        assert [flag.allow_tf32 for flag in flags] == [True, True]
    with problem.precision("float32"):
        assert [flag.allow_tf32 for flag in flags] == [False, False]
    assert [flag.allow_tf32 for flag in flags] == before


def test_tf32_has_a_tolerance_of_its_own(pretended: None) -> None:
    before = dict(TOLERANCE)
    made = problem.GpuProblem(plan.Cell("tf32", Shape(8, 8), 2).case(training=True))

    def rounded(x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> Any:
        h, c = contestants.FIELD["torch"].bind(made).step(x, h, c)
        return h + 1e-3, c

    bound = problem.Bound(made, rounded, lambda: None)
    problem.check("torch", bound, "tf32")
    with pytest.raises(WrongResult):
        problem.check("torch", bound, "float32")
    assert before == TOLERANCE


def test_crossovers(pretended: None, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossovers, "BATCHES", (1, 4))
    monkeypatch.setattr(crossovers, "BACKWARD_BATCHES", (1,))
    monkeypatch.setattr(crossovers, "sizes", lambda _: [("float32", 16), ("bfloat16", 16)])
    found = crossovers.crossovers(Clock(600), record.data, False, record.flush)
    assert found == {"status": "done", "left_out": [], "reason": None, "errors": {}}
    entries = on_disk(record)["crossovers"]
    assert [(e["precision"], e["batch"]) for e in entries] == [
        ("float32", 1),
        ("float32", 4),
        ("bfloat16", 1),
        ("bfloat16", 4),
    ]
    for entry in entries:
        able = set(paths.PATHS) - ({"tensor_cores"} if entry["precision"] == "float32" else set())
        assert set(entry["microseconds"]) == able and entry["best"] in able
        assert entry["broken"] == {}
    assert set(entries[0]["training_us"]) == {"auto", "few_rows", "products"}
    assert "training_us" not in entries[1]
    again = crossovers.crossovers(Clock(0), record.data, False, record.flush)
    assert again["status"] == "done"  # nothing is left to do
    record.data["crossovers"] = []
    again = crossovers.crossovers(Clock(0), record.data, False, record.flush)
    assert again["status"] == "cut" and again["left_out"] == ["float32 16", "bfloat16 16"]


def test_ceilings(pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "MIB", 2**8)
    monkeypatch.setattr(ceilings, "best", lambda *_: 2.0)
    monkeypatch.setattr(torch, "mm", lambda *_, **__: None)
    flushed: list[Any] = []
    found = ceilings.ceilings(Clock(60), True, lambda data: flushed.append(dict(data)))
    assert found["errors"] == {} and found["status"] == "done"
    assert found["copy_gbs"] == pytest.approx(2 * 512 * 2**8 / 2e-6 * 1e-9)
    assert found["matmul_tflops"]["bfloat16"] == pytest.approx(2 * 2048**3 / 2e-6 * 1e-12)
    assert found["l2_read_gbs"] == max(found["l2_read_by_mib"].values())
    assert {"graph_node_us", "eager_empty_us"} <= set(found) and len(flushed) == 7
    json.dumps(found)
    assert ceilings.ceilings(Clock(0), True, flushed.append)["status"] == "cut"


@pytest.mark.parametrize("arguments", [[], ["--unchecked"]])
def test_exercise(
    pretended: None,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(sys, "argv", ["exercise", *arguments])
    assert exercise.main() == 0
    log = tmp_path / "log"
    log.write_text("a warning\n" + capsys.readouterr().out)
    found = checks.exercised(log)
    assert {entry["path"] for entry in found} == set(paths.PATHS)
    assert {entry["precision"] for entry in found} == {*plan.PRECISIONS, "float64"}
    assert all(entry["error"] is None for entry in found)


def test_exercise_tells_what_is_wrong(
    pretended: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def off(*_: Any) -> None:
        raise WrongResult("h is off")

    monkeypatch.setattr(sys, "argv", ["exercise"])
    monkeypatch.setattr(exercise, "check", off)
    assert exercise.main() == 1
    assert '"error": "WrongResult: h is off"' in capsys.readouterr().out


@pytest.fixture
def pretended_run(
    pretended: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., int]:
    """The command itself, with one cell to measure."""
    properties = SimpleNamespace(
        name="A Device", major=9, minor=0, multi_processor_count=132, total_memory=1, uuid="u"
    )
    properties.L2_cache_size = 1 << 16
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for name in ("warm_up", "settle"):
        monkeypatch.setattr(rows, name, lambda: None)
    monkeypatch.setattr(plan, "cells", lambda _: [plan.Cell("float32", Shape(8, 16), 2)])
    monkeypatch.setattr(ceilings, "ceilings", lambda *_: {"status": "done", "errors": {}})
    monkeypatch.setattr(crossovers, "sizes", lambda _: [("float32", 16)])
    monkeypatch.setattr(crossovers, "BATCHES", (1, 2))

    def main(*arguments: str) -> int:
        given = ("--out", str(tmp_path / "out.json"), "--revision", "abc", *arguments)
        monkeypatch.setattr(sys, "argv", ["gpu", *given])
        return command.main()

    return main


def test_the_whole(
    pretended_run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretended_run("--stages", "ceilings,benchmark,crossovers") == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["machine"]["revision"] == "abc"
    assert [row["mode"] for row in found["rows"]] == list(plan.MODES)
    assert len(found["crossovers"]) == 2 and len(found["summary"]) == len(summary.TARGETS)
    assert found["stages"]["benchmark"]["status"] == "done"
    assert found["stages"]["tests"]["reason"] == "not asked for"
    shown = capsys.readouterr().out
    assert "8→16" in shown and "best path, float32" in shown and "out.json" in shown


def test_the_whole_with_a_lost_device(
    pretended_run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any) -> Any:
        raise DeviceLost("illegal memory access")

    ran: list[list[str]] = []
    measure = rows.measure
    monkeypatch.setattr(os, "execv", lambda _, arguments: ran.append(arguments))
    monkeypatch.setattr(rows, "measure", lost)
    assert pretended_run("--stages", "ceilings,benchmark,crossovers") == 2
    stage = json.loads((tmp_path / "out.json").read_text())["stages"]["benchmark"]
    assert stage["status"] == "failed" and "illegal memory access" in stage["error"][0]
    # As in the process that takes over: the file says that the stage is under way.
    (tmp_path / "out.json").write_text(
        (tmp_path / "out.json").read_text().replace('"status": "failed"', '"status": "begun"')
    )
    monkeypatch.setattr(rows, "measure", measure)
    assert pretended_run(*ran[0][3:]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["rows"] == [] and "illegal memory access" in found["failed"][0]["error"]
    assert found["stages"]["crossovers"]["status"] == "done"
