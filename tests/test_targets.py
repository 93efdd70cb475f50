"""The full run: its course, what it stores, and its verdict on each target."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lstmfused

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the benchmarks are run from the repository, not installed
pytest.importorskip("tqdm")

from benchmarks import contestants, full, machine, profiles, report, targets  # noqa: E402
from benchmarks.__main__ import arguments  # noqa: E402
from benchmarks.memory import KEPT, PEAK, memory  # noqa: E402
from benchmarks.roofline import SIZES, Roofline  # noqa: E402
from benchmarks.rows import row as timed_row  # noqa: E402
from benchmarks.shapes import Case, Shape  # noqa: E402
from benchmarks.targets import TARGETS, Target, judged  # noqa: E402
from benchmarks.verify import Forward, Problem  # noqa: E402

Row = dict[str, Any]
OVER_TORCH = TARGETS[0]._replace(mean=5, each=1.4)


def row(limit: float | None, units: int = 512, batch: int = 64, **microseconds: float) -> Row:
    return {
        "input": units,
        "units": units,
        "batch": batch,
        "dtype": "float32",
        "mode": "inference",
        "threads": 1,
        "microseconds": {name: {"median": time} for name, time in microseconds.items()},
        "limit": limit,
    }


def result(*rows: Row, **parts: Any) -> Row:
    roofs = {"1": {"peak": {"float32": 100.0}, "bandwidth": {}}}
    return {"rows": list(rows), "roofline": roofs, **parts}


def test_reached() -> None:
    verdict = judged(
        OVER_TORCH, result(row(5, lstmfused=10, torch=200), row(5, lstmfused=10, torch=20))
    )
    assert verdict["reached"] is True and verdict["rows"] == 2 and not verdict["causes"]
    assert verdict["measured"] == "6.32x, 2.00x"
    assert verdict["at_limit"] == "12.65x, 4.00x"


def test_missed_by_this_machine() -> None:
    """Even at the limit the mean and the same rows would miss it."""
    rows = row(9, lstmfused=10, torch=30), row(9, lstmfused=10, torch=12)
    verdict = judged(OVER_TORCH, result(*rows))
    assert verdict["reached"] is False
    assert verdict["causes"] == [
        "beyond this machine, the mean at the limit is 2.11x",
        "1 of 2 rows miss it, 1 of them also at the limit",
    ]


def test_missed_by_the_cell() -> None:
    """What the limit would allow is told by groups of rows, and by the worst rows."""
    rows = (
        row(2, 64, 1, lstmfused=4, torch=20),
        row(50, 64, 4096, lstmfused=100, torch=300),
        row(40, 1024, 64, lstmfused=50, torch=60),
        row(60, 1024, 64, lstmfused=75, torch=180),
    )
    verdict = judged(OVER_TORCH._replace(mean=4), result(*rows))
    assert verdict["reached"] is False
    missed, shares, worst = verdict["causes"]
    assert missed == "1 of 4 rows miss it, 0 of them also at the limit"
    assert shares == (
        "share of the limit, H <= 64: 50% at B <= 8, 50% at B > 64; H > 256: 80% at 8 < B <= 64"
    )
    assert worst.startswith(
        "worst 1.20x at 1024→1024 B = 64, 1 thread (lstmfused 50 µs, nn.LSTMCell 60 µs, "
        "80% of the limit); 2.40x at 1024→1024"
    )
    assert worst.count(" at ") == targets.WORST


def test_at_the_limit_a_step_is_not_free() -> None:
    """First it takes what one takes that computes nothing, there or in the median row."""
    small = row(0.1, 16, 1, lstmfused=4, torch=20)
    assert judged(OVER_TORCH, result(small))["at_limit"] == "200.00x, 200.00x"
    others = [row(1, 2, batch, allocate=time) for batch, time in enumerate((3, 5, 9), 1)]
    trained, threaded = row(1, 2, 1, allocate=1), row(1, 2, 1, allocate=1)
    trained["mode"], threaded["threads"] = "training", 2
    found = result(small, trained, threaded, *others)
    assert judged(OVER_TORCH, found)["at_limit"] == "3.92x, 3.92x"
    own = row(0.1, 16, 1, lstmfused=4, torch=20, allocate=2)
    assert judged(OVER_TORCH, result(own, *others))["at_limit"] == "9.52x, 9.52x"
    forced = OVER_TORCH._replace(rows="avx2_rows")  # they have their own
    found = result(*others, avx2_rows=[small, row(1, 2, 1, allocate=4)])
    assert judged(forced, found)["at_limit"] == "4.88x, 4.88x"


def test_samples_are_shared_out_to_parts() -> None:
    kernel = "lstmfused::isa_avx2::"
    report = f"""# Overhead|Shared Object|Symbol
    50.00%|_C.cpython-311-x86_64-linux-gnu.so|[.] {kernel}forward_panel<float>(A const&, B)
    10.00%|_C.cpython-311-x86_64-linux-gnu.so|[.] {kernel}dot_tile<4, 1, false, float, float>
     9.00%|_C.cpython-311-x86_64-linux-gnu.so|[.] {kernel}finish_block<float, float>
     8.00%|_C.cpython-311-x86_64-linux-gnu.so|[.] {kernel}transpose_into<float>
     7.00%|_C.cpython-311-x86_64-linux-gnu.so|[.] lstmfused::(anonymous namespace)::step
     6.00%|[kernel.kallsyms]|[k] clear_page_erms
     4.00%|libgomp-a34b3233.so.1|[.] 0x000000000001dd7a
     3.00%|libc.so.6|[.] malloc
     2.00%|libpython3.11.so.1.0|[.] _PyEval_EvalFrameDefault
     1.00%|libtorch_cpu.so|[.] torch::autograd::Engine::evaluate_function
"""
    assert profiles.shares(report) == pytest.approx(
        {
            "products": 0.6,
            "activations": 0.09,
            "transposing": 0.08,
            "torch": 0.08,
            "new pages": 0.06,
            "waiting for threads": 0.04,
            "allocator": 0.03,
            "Python": 0.02,
        }
    )


def test_a_profile_is_told_with_its_row() -> None:
    slow, other = row(5, lstmfused=10, torch=12), row(5, batch=1, lstmfused=10, torch=200)
    found = result(slow, other)
    assert [name for _, name in profiles.wanted(found)] == ["lstmfused"] * 2
    shares = {"new pages": 0.25, "products": 0.74, "Python": 0.01}
    case = full.case_of(slow).columns()
    found["profiles"] = [{**case, "subject": "lstmfused", "shares": shares}]
    _, groups, worst = judged(OVER_TORCH, found)["causes"]
    assert groups.endswith("50% at B <= 8, 50% at 8 < B <= 64 (74% products, 25% new pages)")
    assert worst.count("50% of the limit; 74% products, 25% new pages)") == 1


def test_without_a_compiler_there_is_no_limit() -> None:
    verdict = judged(OVER_TORCH, result(row(None, lstmfused=10, torch=12)))
    assert verdict["reached"] is False and verdict["at_limit"] == ""
    assert [text.split()[0] for text in verdict["causes"]] == ["1", "worst"]


def target(what: str) -> Target:
    (found,) = (target for target in TARGETS if target.what.startswith(what))
    return found


@pytest.mark.parametrize(("time", "reached"), [(5.2, True), (5.3, False)])
def test_cost(time: float, reached: bool) -> None:
    rows = row(0.1, 16, 1, lstmfused=time, allocate=2.6), row(0.1, 16, 64, lstmfused=9, allocate=2)
    verdict = judged(target("smallest calls"), result(*rows))
    assert verdict["reached"] is reached and verdict["rows"] == 1  # the other has too many rows
    assert verdict["measured"].endswith(f", {time / 2.6:.2f}x")


def test_share() -> None:
    rows = row(8, 256, 64, lstmfused=10), row(7, 256, 1, lstmfused=10), row(1, 64, 64, lstmfused=10)
    assert judged(target("share of the limit"), result(*rows))["measured"] == "80%, 80%"
    assert judged(target("share of the bandwidth"), result(*rows))["measured"] == "70%, 70%"


def test_frozen_and_batch_invariant_are_held_against_the_cell() -> None:
    times: Row = {"lstmfused": 12.0, "lstmfused frozen": 10.0, "lstmfused batch invariant": 18.0}
    measured = result(row(5, **times))
    frozen, invariant = judged(target("frozen"), measured), judged(target("cost of"), measured)
    assert frozen["reached"] is True and frozen["measured"] == "1.20x, 1.20x"
    assert invariant["reached"] is None and invariant["measured"] == "1.50x, 1.50x"
    (unmeasured,) = judged(target("frozen"), result(row(5, lstmfused=1)))["causes"]
    assert unmeasured == "not measured in this run"


def test_bfloat16_dot_products() -> None:
    times: Row = {"lstmfused": 10.0, "lstmfused float32": 16.0}
    measured = result(row(5, **times) | {"dtype": "bfloat16"})
    wanted = target("bfloat16 over our float32, B >= 64")
    assert judged(wanted, measured)["causes"] == ["no bfloat16 dot products here"]
    measured["roofline"]["1"]["peak"]["bfloat16"] = 200.0
    assert judged(wanted, measured)["reached"] is True


def test_memory() -> None:
    """The gates are kept and nothing else; both targets see these rows."""
    torch.set_num_threads(1)
    shape = Shape(24, 32, 16)
    kept, peak = memory(1, (shape,))
    assert (kept["mode"], peak["mode"]) == (KEPT, PEAK)
    assert kept["bytes"]["lstmfused"] == 4 * 4 * 16 * 32 < kept["bytes"]["torch"]
    assert kept["bytes"]["allowed"] == 5 * 4 * 16 * 32
    gradients = 4 * (128 * (24 + 32 + 2) + 16 * (24 + 32 + 32))
    assert all(found > gradients for found in peak["bytes"].values())
    kept["bytes"]["lstmfused"] *= 2
    verdict = judged(target("memory kept"), result(memory=[kept, peak]))
    assert verdict["reached"] is False and verdict["measured"] == "1.60x, 1.60x"
    assert verdict["causes"][-1].startswith("worst 1.60x at 24→32 B = 16, 1 thread (lstmfused 16 K")
    peak["bytes"] = {"lstmfused": 100, "torch": 100}
    assert judged(target("peak memory"), result(memory=[kept, peak]))["reached"] is True


def test_frozen_and_batch_invariant_take_part() -> None:
    modes: list[bool] = []

    class Watched(contestants.BatchInvariant):
        def forward(self, problem: Problem) -> Forward:
            step = super().forward(problem)

            def watched() -> tuple[torch.Tensor, torch.Tensor]:
                modes.append(lstmfused.is_batch_invariant())
                return step()

            return watched

    field = [contestants.Fused(), contestants.Frozen(), Watched()]
    found = timed_row(Case(1, "float32", Shape(3, 5), 2, "inference"), field, 0.05, 0)
    assert set(found["microseconds"]) == {who.name for who in field}
    assert modes and all(modes) and not lstmfused.is_batch_invariant()
    found = timed_row(Case(1, "float32", Shape(3, 5), 65, "inference"), field, 0.05, 0)
    assert "lstmfused frozen" not in found["microseconds"]


def options(monkeypatch: pytest.MonkeyPatch, *given: object) -> Namespace:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--full", *map(str, given)])
    return arguments()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """Full runs without a second process and without what takes seconds to measure; yields the
    commands of the second processes."""
    commands = []

    def in_process(
        command: list[str], env: dict[str, str], check: bool
    ) -> subprocess.CompletedProcess[str]:
        assert env.items() >= full.AVX2.items()
        commands.append(command)
        with monkeypatch.context() as patch:
            patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
            patch.setattr(sys, "argv", ["benchmarks", *command[3:]])
            full.run(arguments())
        return subprocess.CompletedProcess(command, 0)

    roof = Roofline({"float32": 100.0, "float64": 50.0}, dict.fromkeys(SIZES, 10.0))
    overhead: Row = {"microseconds": {}, "over_empty": {}}
    monkeypatch.setattr(full, "roofline", lambda threads: roof)
    monkeypatch.setattr(full, "overhead", lambda field, threads, _: overhead | {"threads": threads})
    monkeypatch.setattr(subprocess, "run", in_process)
    monkeypatch.setattr(machine, "output", lambda *command: "0123456789")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    yield commands


@pytest.mark.filterwarnings("ignore")  # of torch's own, by its profiler
def test_full_run(quick: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "full.json"
    extent = ["--shapes", "3:5", "--batches", "1,2", "--threads", "1", "--budget", "1"]
    extent += ["--contestants", "lstmfused,torch,lstmfused float32"]
    full.run(options(monkeypatch, *extent, "--out", out))
    found = json.loads(out.read_text(encoding="utf-8"))

    keys = [(row["dtype"], row["mode"], row["batch"]) for row in found["rows"]]
    assert sorted(keys) == sorted((*section, b) for section in full.SECTIONS for b in (1, 2))
    for row in found["rows"]:
        names = {"lstmfused", "torch"}
        names |= {"lstmfused float32"} if row["dtype"] == "bfloat16" else set()
        assert set(row["microseconds"]) == names == {"lstmfused", *row["speedup"]}
        assert row["limit"] > 0
    assert [row["batch"] for row in found["avx2_rows"]] == [1, 2]
    assert {(row["dtype"], row["mode"]) for row in found["avx2_rows"]} == set(full.AVX2_SECTIONS)
    assert [row["mode"] for row in found["memory"]] == [KEPT, PEAK]
    assert [file.name for file in tmp_path.iterdir()] == ["full.json"]
    assert "share of the limit" in targets.markdown(found) and report.summary(found)

    # Cut off after some rows, it goes on with the others; not with those of another revision.
    cut = dict(found, rows=found["rows"][:3])
    del cut["avx2"], cut["avx2_rows"]
    out.write_text(json.dumps(cut), encoding="utf-8")
    full.run(options(monkeypatch, *extent, "--resume", out))
    again = json.loads(out.read_text(encoding="utf-8"))
    assert again["rows"][:3] == found["rows"][:3] and len(again["rows"]) == len(found["rows"])
    assert len(again["avx2_rows"]) == 2 and again["seconds"] > cut["seconds"]
    full.run(options(monkeypatch, *extent, "--resume", out))
    assert len(quick) == 2  # there was nothing left to do
    out.write_text(json.dumps(cut | {"revision": "abc"}), encoding="utf-8")
    with pytest.raises(SystemExit, match="is of revision abc, this is 0123456789"):
        full.run(options(monkeypatch, *extent, "--resume", out))


def test_capability_is_that_of_the_process(
    quick: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="asked for avx2, torch runs AVX512"):
        full.run(options(monkeypatch, "--capability", "avx2", "--out", tmp_path / "a.json"))


def test_readme(tmp_path: Path) -> None:
    """One command writes both tables, or checks them."""
    measured = result(row(5, lstmfused=10, torch=20), processor="P", revision="0" * 40, dirty=False)
    measured |= {"date": "2026-01-02T03:04:05", "versions": {"torch": "2"}}
    path, readme = tmp_path / "full.json", tmp_path / "README.md"
    path.write_text(json.dumps(measured), encoding="utf-8")
    readme.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (committed,) = (line.split()[-1] for line in makefile.splitlines() if line[:6] == "RESULT")

    def run(*more: str) -> int:
        command = [sys.executable, "-m", "benchmarks.report", committed, "--full", str(path)]
        command += ["--readme", str(readme), *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode

    assert run("--check") == 1
    assert run() == 0 and run("--check") == 0
    begin, end = report.markers("targets")
    text = readme.read_text(encoding="utf-8").split(begin)[1].split(end)[0]
    assert text.strip() == targets.markdown(measured)
    assert "| float32 inference over nn.LSTMCell " in text and "2.00x, 2.00x" in text
