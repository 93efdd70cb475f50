"""What of benchmarks.gpu measures on a device, here on the CPU under a pretence."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_cases import CEILINGS, new_record, on_disk

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import (
    ceilings,
    checks,
    contestants,
    crossovers,
    exercise,
    paths,
    plan,
    problem,
    rows,
    summary,
    timing,
)
from benchmarks.gpu.record import Clock, DeviceLost, Record
from benchmarks.shapes import Shape
from benchmarks.verify import TOLERANCE, WrongResult, verify


@pytest.fixture(autouse=True)
def flags_may_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own test utilities, which other tests import, forbid that to the whole process."""
    flags = torch.backends.flags_frozen.__globals__  # torch.backends itself is a wrapper
    monkeypatch.setitem(flags, "__allow_nonbracketed_mutation_flag", True)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return new_record(tmp_path)


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
        single = dtype in (torch.float32, torch.float64)
        if (forced[0] == "tensor_cores" and single and not tf32) or (
            forced[0] == "warpgroups" and single
        ):
            return "products"
        return forced[0] or "small_batch"

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
        assert entry["path"] == "small_batch" and entry["cell"] == str(cell)
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
        single = {"tensor_cores", "warpgroups"} if entry["precision"] == "float32" else set()
        able = set(paths.PATHS) - single
        assert set(entry["microseconds"]) == able and entry["best"] in able
        assert entry["broken"] == {}
    assert set(entries[0]["training_us"]) == {"auto", "small_batch", "products"}
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
