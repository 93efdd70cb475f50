"""The unattended run on a GPU, here without one: its course, and what it brings back."""

from __future__ import annotations

import argparse
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.record import ROOT, Clock, Json, Record, load
from tools import gpu_run
from tools.gpu_run import LOST, Stage, python


def saying(code: str) -> Any:
    """A stage's commands: a process that runs this."""
    return lambda seconds: {"log": python("-c", f"seconds = {seconds}; {code}")}


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run, "GRACE", 0.5)


def running(folder: Path, stages: dict[str, Stage], seconds: float = 60) -> Json:
    return gpu_run.run(stages, folder / "out", folder / "logs", Clock(seconds), {"suite": "run"})


def test_no_stage_can_end_another(tmp_path: Path) -> None:
    """Whatever happens to one: results and logs of all come back, in the folder it was told."""

    def absent(_: float) -> Any:
        raise FileNotFoundError("no such tool")

    def broken(_: float) -> Any:
        raise RuntimeError("no plan")

    stages = {
        "right": Stage(saying("print('well')"), 0.5),
        "wrong": Stage(saying("raise SystemExit('a message')"), 0.5),
        "killed": Stage(saying("import os; print('b', flush=True); os.kill(os.getpid(), 9)"), 0.5),
        "stuck": Stage(saying("import time; print('begun', flush=True); time.sleep(600)"), 0.5, 3),
        "parsed": Stage(saying("print('x')"), 0.5, parse=lambda text: {"wrong": [text.strip()]}),
        "absent": Stage(absent, 0.5),
        "broken": Stage(broken, 0.5),
        "unstartable": Stage(lambda _: {"log": (["/absent/command"], {})}, 0.5),
        "last": Stage(saying("print('at the end')"), 0.5),
    }
    found = running(tmp_path, stages)
    assert {name: stage["status"] for name, stage in found["stages"].items()} == {
        **dict.fromkeys(stages, "failed"),
        **{"right": "done", "absent": "left out", "last": "done"},
    }
    assert load(tmp_path / "out" / "stages.json") == found
    results = {k: s["results"]["log"] for k, s in found["stages"].items() if "results" in s}
    assert results["wrong"]["tail"][-1] == "a message"
    assert results["stuck"]["returncode"] is None and "begun" in results["stuck"]["tail"]
    assert results["killed"]["returncode"] == -9
    assert "No such file" in results["unstartable"]["tail"][-1]
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as logs:
        assert "./log.log" in logs.getnames()
    told = gpu_run.told(found)
    for said in ("a message", "no such tool", "RuntimeError: no plan", "log: x", "| last"):
        assert said in told


def test_what_there_is_no_time_for_is_left_out(tmp_path: Path) -> None:
    stages = {
        name: Stage(saying("print(seconds)"), share) for name, share in (("a", 0.5), ("b", 1.0))
    }
    found = running(tmp_path, stages, seconds=3.5)
    assert [stage["status"] for stage in found["stages"].values()] == ["left out", "left out"]
    assert found["stages"]["b"]["reason"] == "no time left"


def test_the_time_of_a_stage_is_its_share_and_capped(tmp_path: Path) -> None:
    told: list[float] = []

    def commands(seconds: float) -> Any:
        told.append(seconds + 2 * gpu_run.GRACE)
        return {}

    running(tmp_path, {"half": Stage(commands, 0.5), "capped": Stage(commands, 1.0, 20)}, 103)
    assert told == [pytest.approx(50, abs=0.5), 20]


def test_another_process_goes_on_behind_a_lost_device(tmp_path: Path) -> None:
    file = tmp_path / "tries"
    lost = f"f = open({str(file)!r}, 'a+'); f.write('x'); f.flush(); f.seek(0)"
    stage = Stage(
        saying(f"{lost}; raise SystemExit({LOST} * (len(f.read()) < 3))"), 0.5, resumes=True
    )
    found = running(tmp_path, {"lost": stage})["stages"]["lost"]
    assert (found["status"], found["restarts"], file.read_text()) == ("done", 2, "xxx")
    always = running(tmp_path, {"lost": Stage(saying("import os; os.abort()"), 0.5, resumes=True)})
    assert always["stages"]["lost"]["restarts"] == gpu_run.RESTARTS


def options(folder: Path, **other: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"out": folder, "revision": "abc", "quick": False, **other})


def test_the_most_valuable_comes_first_and_a_cut_off_file_is_gone_on_with(tmp_path: Path) -> None:
    plan = gpu_run.plan(options(tmp_path))
    assert list(plan) == [
        "build",
        "smoke",
        "crossovers",
        "benchmark",
        "compiled",
        "tests",
        "sanitizer",
    ]

    def given() -> list[str]:
        return list(plan["benchmark"].commands(120)["gpu"][0])

    file = tmp_path / "gpu.json"
    assert {"--gpu", "--budget=120", "--revision=abc", f"--out={file}"} <= set(given())
    Record(file, {"revision": "abc"}).flush()
    assert f"--resume={file}" in given()
    Record(file, {"revision": "older"}).flush()
    assert f"--out={file}" in given()


def test_sanitizers_run_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits here until all have begun."""
    monkeypatch.setattr(gpu_run, "tool", lambda _: None)
    stage = gpu_run.plan(options(tmp_path))["sanitizer"]
    found = running(tmp_path, {"sanitizer": stage})["stages"]["sanitizer"]
    assert found["reason"] == "compute-sanitizer not found"
    fake = tmp_path / "compute-sanitizer"
    wait = (
        f"touch {tmp_path}/$2; while [ $(ls {tmp_path}/*check | wc -l) -lt 4 ]; do sleep 0.1; done"
    )
    fake.write_text(f'#!/bin/sh\n{wait}\necho "$@"\necho "========= ERROR SUMMARY: 0 errors"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(gpu_run, "tool", lambda _: str(fake))
    found = running(tmp_path, {"sanitizer": stage})["stages"]["sanitizer"]
    assert found["status"] == "done" and set(found["results"]) == set(gpu_run.SANITIZERS)
    logs = {name: (tmp_path / "logs" / f"{name}.log").read_text() for name in gpu_run.SANITIZERS}
    assert {k: "kernel_substring=lstmfused" in log for k, log in logs.items()} == {
        name: name != "initcheck" for name in logs
    }


def test_sanitized() -> None:
    assert gpu_run.sanitized("========= ERROR SUMMARY: 0 errors\n")["wrong"] == []
    race = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert gpu_run.sanitized(race)["counts"] == {"errors": 0}
    bad = "========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 2 errors"
    assert gpu_run.sanitized(bad) == {"counts": {"errors": 2}, "wrong": bad.splitlines()}
    assert gpu_run.sanitized("killed before its end")["counts"] == {"errors": None}


def test_outcomes(tmp_path: Path) -> None:
    """Of pytest itself, of its workers, and of a run that was cut off."""
    file = tmp_path / "test_it.py"
    file.write_text("def test_right(): pass\ndef test_wrong(): assert 1 == 2\n")
    command = python("-m", "pytest", file, *gpu_run.PYTEST[:-3], COLUMNS="200")
    gpu_run.ran(command, tmp_path / "log", 60)
    found = gpu_run.outcomes((tmp_path / "log").read_text())
    assert found["counts"] == {"PASSED": 1, "FAILED": 1}
    assert "::test_wrong - assert 1 == 2" in found["wrong"][0]
    cut = """
tests/test_cuda.py::test_parity[float32-a b] PASSED                      [ 25%]
[gw0] [ 50%] PASSED tests/test_cuda.py::test_parity[a b]
[gw1] [ 75%] FAILED tests/test_cuda.py::test_parity[bfloat16]
tests/test_cuda.py::test_hangs
"""
    assert gpu_run.outcomes(cut)["counts"] == {"PASSED": 2, "FAILED": 1}
    line = '{"dtype": "float32", "path": "small_batch", "error": "WrongResult: off"}'
    right = '{"dtype": "float32", "path": "small_batch", "error": null}'
    found = gpu_run.exercised(f"a warning\n{line}\n{right}\n")
    assert found == {"counts": {"checked": 2}, "wrong": [line]}


def test_what_is_built_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the digest of the sources."""
    reason = gpu_run.stale()
    assert reason is None or reason.startswith("what is built: ")
    monkeypatch.setattr(gpu_run, "digest", lambda: "another")
    assert "False" in str(gpu_run.stale())
    command, env = gpu_run.build(60)["build"]
    assert command[1:3] == ["setup.py", "build_ext"] and env["LSTMFUSED_CUDA"] == "1"
    assert gpu_run.built("")["wrong"]
    monkeypatch.setattr(gpu_run, "stale", lambda: None)
    assert gpu_run.build(60) == {} and gpu_run.built("") == {"wrong": []}


def test_kernels_are_carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To where this Python's build looks for them, and only those of the same sources."""
    monkeypatch.setattr(gpu_run, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_run, "CARRIED", tmp_path / "build" / "carried")
    monkeypatch.setattr(gpu_run, "digest", lambda: "1")
    there = tmp_path / "build" / "temp.other-cpython-399"
    there.mkdir(parents=True)
    for name in ("kernels_avx2.o", "kernels_avx2.o.flags", "ops.o"):
        (there / name).write_text(name)
    gpu_run.pack()
    tag = sys.implementation.cache_tag
    monkeypatch.setattr(gpu_run, "digest", lambda: "2")
    gpu_run.unpack()
    assert not list((tmp_path / "build").glob(f"temp*{tag}"))
    monkeypatch.setattr(gpu_run, "digest", lambda: "1")
    gpu_run.unpack()
    (here,) = (tmp_path / "build").glob(f"temp*{tag}")
    assert sorted(file.name for file in here.iterdir()) == [
        "kernels_avx2.o",
        "kernels_avx2.o.flags",
    ]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Here, where there is no GPU: every stage says so, and the results are shown."""
    given = ["gpu_run", f"--out={tmp_path}", f"--logs={tmp_path / 'logs'}", "--deadline=60"]
    monkeypatch.setattr(sys, "argv", [*given, "--stages=smoke,benchmark", "--revision=abc"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_run.main() == 1
    said = capfd.readouterr().out
    assert "gpu: error: there is no GPU that torch can use" in said and "| smoke" in said
    found = load(tmp_path / "stages.json")
    assert list(found["stages"]) == ["smoke", "benchmark"] and found["revision"] == "abc"
    monkeypatch.setattr(sys, "argv", ["gpu_run", f"--show={tmp_path}"])
    assert gpu_run.main() == 0 and "there is no GPU" in capfd.readouterr().out
    assert ROOT.joinpath("tools", "gpu_run.py").exists()
