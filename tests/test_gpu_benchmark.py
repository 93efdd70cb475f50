"""The course of benchmarks.gpu: time, the file, order of rows, commands and what they print."""

from __future__ import annotations

import os
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu_cases import Time, new_record, on_disk

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import (
    checks,
    contestants,
    plan,
    stages,
)
from benchmarks.gpu.process import junit, outcomes, run, sanitized
from benchmarks.gpu.record import Clock, DeviceLost, Record
from benchmarks.shapes import Shape


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return new_record(tmp_path)


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


def test_only_the_build_can_end_the_others() -> None:
    assert [name for name, stage in stages.STAGES.items() if stage.vital] == ["build"]


def test_logs_lie_beside_the_result(record: Record) -> None:
    """After each stage, for whoever fetches the one has to have the other, even of half a run."""
    logs = record.path.parent / "logs"

    def writes(context: stages.Context, _: Clock) -> Any:
        context.logs.mkdir(parents=True, exist_ok=True)
        (context.logs / "a.log").write_text("said")
        return {"status": "done"}

    table = {"a": stages.Stage(writes, 0.5)}
    stages.run(stages.Context(record, logs, True, 0), Clock(9, Time()), ("a",), table)
    archive = record.path.with_name("result-logs.tar.gz")
    with tarfile.open(archive) as found:
        assert "./a.log" in found.getnames()


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


def test_outcomes_of_several_workers() -> None:
    """pytest-xdist names the worker first, and the test last."""
    text = """
tests/test_cuda.py::test_parity[a b]
[gw0] [ 25%] PASSED tests/test_cuda.py::test_parity[a b]
[gw1] [ 50%] FAILED tests/test_cuda.py::test_parity[bfloat16] 
[gw1] [100%] SKIPPED tests/test_cuda.py::test_graph
"""
    assert outcomes(text) == {
        "counts": {"passed": 1, "failed": 1, "skipped": 1},
        "failures": [{"name": "tests/test_cuda.py::test_parity[bfloat16]", "lines": []}],
    }


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
    file.write_text("import time\ndef test_right(): pass\ndef test_slow(): time.sleep(600)\n")
    found = checks.tests(Clock(40), tmp_path / "logs", str(file))
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
