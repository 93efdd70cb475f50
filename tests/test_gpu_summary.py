"""What benchmarks.gpu makes of its rows: the floor, the targets, what is shown."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gpu_cases import CEILINGS, MACHINE, ROOT, new_record

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import (
    plan,
    stages,
    summary,
)
from benchmarks.gpu.floor import floor
from benchmarks.gpu.record import Record
from benchmarks.shapes import Shape


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return new_record(tmp_path)


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
            "best": "small_batch",
            "microseconds": {"small_batch": 4.0, "products": 5.0},
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
        "small_batch 4 µs !1.25",
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
