"""The benchmark runs, refuses wrong numbers, and its report keeps the README honest."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the benchmarks are run from the repository, not installed
pytest.importorskip("tqdm")

from benchmarks import cliffs, compiled, machine, report  # noqa: E402
from benchmarks.contestants import Contestant, Fused, OnnxRuntime, Torch  # noqa: E402
from benchmarks.roofline import SIZES, Roofline  # noqa: E402
from benchmarks.shapes import (  # noqa: E402
    BATCHES,
    DOUBLE_BACKWARD,
    DOUBLE_SHAPES,
    MODES,
    SHAPES,
    Case,
    Shape,
    grid,
)
from benchmarks.verify import Problem, WrongResult, verify  # noqa: E402


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def case(mode: str = "training", dtype: str = "float32") -> Case:
    return Case(torch.get_num_threads(), dtype, Shape(3, 5), 7, mode)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("benchmarks") / "result.json"
    extent = ("--shapes", "3:5", "--batches", "1,7", "--contestants", "lstmfused,torch")
    done = python("benchmarks", *extent, "--budget", 5, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "geometric mean" in done.stdout
    return out


def test_run(result: Path) -> None:
    found = json.loads(result.read_text())
    assert [(row["batch"], row["mode"]) for row in found["rows"]] == [
        (batch, mode) for batch in (1, 7) for mode in MODES
    ]
    for row in found["rows"]:
        times = row["microseconds"]
        assert set(times) == {"lstmfused", "torch"}
        assert all(0 < t["q1"] <= t["median"] <= t["q3"] for t in times.values())
        ratio = times["torch"]["median"] / times["lstmfused"]["median"]
        assert row["speedup"] == {"torch": pytest.approx(ratio)}
    assert found["build_info"] and found["versions"]["torch"] == torch.__version__
    for row in found["double_backward"]:
        assert set(row["microseconds"]) == {"lstmfused", "torch"}
    assert len(found["double_backward"]) == len(DOUBLE_SHAPES) * len(DOUBLE_BACKWARD)
    assert {"empty nn.Module", "lstmfused"} <= set(found["overhead"][0]["microseconds"])


@pytest.mark.parametrize("mode", [*MODES, *DOUBLE_BACKWARD])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("contestant", [Fused(), Torch(), OnnxRuntime()], ids=lambda c: c.name)
def test_contestants_are_right(contestant: Contestant, dtype: str, mode: str) -> None:
    problem = Problem(case(mode, dtype))
    if contestant.missing() or not contestant.supports(problem.case):
        pytest.skip(contestant.missing() or f"{contestant.name} has no {dtype} {mode}")
    with torch.set_grad_enabled(mode != "inference"):
        verify(contestant.name, problem, problem.step(contestant.forward(problem)))


def spoil_h(problem: Problem, h: torch.Tensor, c: torch.Tensor) -> None:
    h += 1e-4


def spoil_nan(problem: Problem, h: torch.Tensor, c: torch.Tensor) -> None:
    c[0, 0] = torch.nan


def spoil_shape(problem: Problem, h: torch.Tensor, c: torch.Tensor) -> None:
    h.resize_(1, 5)


def spoil_gradient(problem: Problem, h: torch.Tensor, c: torch.Tensor) -> None:
    assert problem.hx.grad is not None
    problem.hx.grad[-1, -1] += 1e-2


def spoil_missing(problem: Problem, h: torch.Tensor, c: torch.Tensor) -> None:
    problem.bias_hh.grad = None


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (spoil_h, "h is off by 1.0e-04"),
        (spoil_nan, "c is off by nan"),
        (spoil_shape, r"h has shape \(1, 5\), not \(7, 5\)"),
        (spoil_gradient, "grad hx is off"),
        (spoil_missing, "grad bias_hh has shape None"),
    ],
)
def test_wrong_numbers_are_caught(spoil: Callable[..., None], where: str) -> None:
    problem = Problem(case())
    right = problem.step(Torch().forward(problem))

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        h, c = (output.detach() for output in right())
        spoil(problem, h, c)
        return h, c

    with pytest.raises(WrongResult, match=f"lstmfused is wrong at 3→5 B=7 .*: {where}"):
        verify("lstmfused", problem, step)


def test_limit() -> None:
    roof = Roofline({"float32": 100.0, "float64": 50.0}, dict.fromkeys(SIZES, 10.0))
    square = Shape(512, 512)
    many, one = (Case(1, "float32", square, batch, "inference") for batch in (512, 1))
    assert roof.limit(many) == pytest.approx(2 * 512 * 1024 * 2048 / 100e9 * 1e6)
    weights = 2048 * (1024 + 2)
    assert roof.limit(one) == pytest.approx(4 * (weights + 5 * 512) / 10e9 * 1e6)
    assert roof.limit(many._replace(mode="training")) == pytest.approx(3 * roof.limit(many))
    assert roof.limit(many._replace(dtype="float64")) == pytest.approx(2 * roof.limit(many))


def test_default_grid_has_every_shape_at_its_own_batch() -> None:
    cases = {(case.shape, case.batch) for case in grid([1], ["float32"], SHAPES, BATCHES, MODES)}
    assert {(shape, shape.batch) for shape in SHAPES} <= cases


def test_report(result: Path, tmp_path: Path) -> None:
    readme, picture = tmp_path / "README.md", tmp_path / "picture.png"
    begin, end = report.markers("benchmark")
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n", encoding="utf-8")
    command = ("benchmarks.report", result, "--readme", readme)

    assert python(*command, "--check").returncode == 1
    assert "old" in readme.read_text(encoding="utf-8")
    done = python(*command, "--plot", picture)
    assert done.returncode == 0, done.stderr
    assert picture.exists() == bool(find_spec("matplotlib"))
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "| 3→5 " in text and "**Inference**" in text and "old" not in text
    assert python(*command, "--check").returncode == 0
    readme.write_text(text.replace("3→5", "3→6"), encoding="utf-8")
    assert python(*command, "--check").returncode == 1


def test_report_needs_markers() -> None:
    with pytest.raises(SystemExit, match="benchmark:begin"):
        report.insert("a README without them", "text")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # which torch's compiler does
@pytest.mark.parametrize("steps", [1, 3])
def test_compiled(steps: int) -> None:
    rows = [compiled.row(case(mode), steps, seconds=0.1, backend="aot_eager") for mode in MODES]
    for row in rows:
        times = {name: timing["median"] for name, timing in row["microseconds"].items()}
        assert set(times) == {"eager", "compiled", "eager, then floor"}
        assert row["floor"] > 0
        assert row["over_eager"] == pytest.approx(times["compiled"] / times["eager"])
        both = times["eager, then floor"]
        assert row["over_eager_and_floor"] == pytest.approx(times["compiled"] / both)
    text = compiled.summary({**machine.describe(), "rows": rows})
    assert torch.__version__ in text and machine.processor() in text
    assert len(re.findall(rf"^\| 3→5 +\| +7 \| +{steps} \|", text, re.MULTILINE)) == len(MODES)


def test_compiled_refuses_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: torch.nn.Module, **options: object) -> Callable[..., tuple[object, ...]]:
        return lambda *arguments: tuple(2 * t for t in module(*arguments))

    monkeypatch.setattr(torch, "compile", wrong)
    with pytest.raises(WrongResult, match="h is off"):
        compiled.row(case("inference"), seconds=0)


def test_calls_against_another_checkout(tmp_path: Path) -> None:
    done = python("benchmarks.calls", "--against", ".", "--rounds", 2)
    assert done.returncode == 0, done.stderr
    ratios = [float(ratio) for ratio in re.findall(r"µs there, (\S+) of it", done.stdout)]
    assert len(ratios) == 2
    assert all(0.3 < ratio < 3 for ratio in ratios)  # the same checkout on both sides
    done = python("benchmarks.calls", "--against", tmp_path, "--rounds", 1)
    assert done.returncode != 0
    assert str(tmp_path) in done.stderr


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_second_order(tmp_path: Path, clock: str) -> None:
    out = tmp_path / "second.json"
    extent = ("--units", "5,16", "--batches", 3, "--threads", 1, "--budget", 2, "--clock", clock)
    done = python("benchmarks.second_order", *extent, "--out", out)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [(row["mode"], row["units"]) for row in found["rows"]] == [
        (mode, units) for mode in DOUBLE_BACKWARD for units in (5, 16)
    ]
    for row in found["rows"]:
        times = {name: timing["median"] for name, timing in row["microseconds"].items()}
        assert row["speedup"] == {"torch": pytest.approx(times["torch"] / times["lstmfused"])}
        where = f"{row['mode']}, {row['units']} units, batch 3, threads 1"
        assert f"{where}: lstmfused {times['lstmfused']:.0f} µs" in done.stdout
    assert [row["units"] for row in found["transforms"]] == [5, 16]
    lines = report.second_order(found).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[4:]] == list(DOUBLE_BACKWARD)


def test_frozen(tmp_path: Path) -> None:
    out = tmp_path / "frozen.json"
    extent = ("--shapes", "3:5", "--batches", "1,7", "--threads", 1, "--budget", 2)
    done = python("benchmarks.frozen", *extent, "--out", out)
    assert done.returncode == 0, done.stderr
    for dtype in ("float32", "bfloat16", "int8"):
        assert f"{dtype} weights, larger batches: geometric mean" in done.stdout
    rows = json.loads(out.read_text())["rows"]
    assert [row["batch"] for row in rows] == [1, 7]
    for row in rows:
        times = {name: timing["median"] for name, timing in row["microseconds"].items()}
        own = times.pop("lstmfused")
        assert row["speedup"] == {name: own / time for name, time in times.items()}


def test_cliffs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A ratio that is too large again and again is one; what was so once is not."""
    found = [{"a": 1.0, "b": 9.0}, {"a": 1.0, "b": 2.0}, *[{"a": 1.0, "b": 4.0}] * cliffs.ATTEMPTS]
    monkeypatch.setattr(cliffs.Cliff, "ratios", lambda _: found.pop(0))
    for name in ("denormals", "odd_sizes", "threads"):
        monkeypatch.setattr(cliffs, name, lambda: ())
    pair = [cliffs.Cliff("once", {}, 3), cliffs.Cliff("always", {}, 3)]
    monkeypatch.setattr(cliffs, "callers", lambda: pair)
    monkeypatch.setattr(cliffs, "keep_memory", lambda: None)
    assert cliffs.main() == 1 and not found
    once, always = capsys.readouterr().out.splitlines()[-2:]
    assert "CLIFF" not in once and "4.00x" in always and "CLIFF" in always


@pytest.mark.parametrize("cases", [cliffs.denormals, cliffs.odd_sizes, cliffs.threads])
def test_calls_of_cliffs(cases: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cliffs.Cliff, "ratios", lambda _: {"normal": 1.0})
    for cliff in cases():
        for call in cliff.calls.values():
            call()
