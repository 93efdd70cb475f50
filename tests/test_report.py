"""What is made of results: verdicts on targets, tables, and pages kept as they say."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report
from benchmarks.cases import TRAINING, Case, Shape
from benchmarks.frame import frame
from benchmarks.peers import PEERS
from benchmarks.problem import Problem
from benchmarks.record import RESULTS, ROOT, Json, load
from benchmarks.targets import GPU_TARGETS, TARGETS, WORST, Target, Verdict, judged, verdicts
from tools import profiles


def row(units: int = 512, batch: int = 64, **other: Any) -> Json:
    return Case(Shape(units, units), batch).columns() | other


def result(*rows: Json, **parts: Any) -> Json:
    roofs = {"1": {"peak": {"float32": 100.0}, "bandwidth": {"0": 1e9}}}
    about: Json = {"suite": "full", "device": "cpu", "processor": "P", "revision": "0" * 40}
    about |= {"dirty": False, "date": "2026-01-02T03:04:05", "versions": {"torch": "2"}}
    return about | {"clock": "wall", "roofline": roofs, "rows": list(rows)} | parts


def limit(units: int, batch: int = 64) -> float:
    return Case(Shape(units, units), batch).flops / 100e9 * 1e6


def target(what: str) -> Target:
    (found,) = (t for t in (*TARGETS, *GPU_TARGETS) if t.what.startswith(what))
    return found


def verdict(what: str, *rows: Json, **parts: Any) -> Verdict:
    return judged(target(what), frame(result(*rows, **parts)))


def test_reached_and_missed() -> None:
    over = target("float32 inference over nn")._replace(mean=5, each=1.4)
    rows = [row(lstmfused=10.0, torch=200.0), row(batch=8, lstmfused=10.0, torch=20.0)]
    found = judged(over, frame(result(*rows)))
    assert found.reached is True and found.told("ratio") == "6.32x, 2.00x"
    found = judged(over._replace(mean=7), frame(result(*rows)))
    assert found.reached is False and found.missed == 0
    rows[1]["torch"] = 13.0
    found = judged(over._replace(mean=1), frame(result(*rows)))
    assert found.reached is False and found.missed == 1


def test_at_the_limit_a_step_is_not_free() -> None:
    """First it takes what one takes that computes nothing, there or in the median row."""
    at = limit(512)
    one = row(lstmfused=4 * at, torch=8 * at)
    assert verdict("float32 inference over nn", one).told("at limit") == "8.00x, 8.00x"
    others = [row(2, batch, allocate=at * k) for batch, k in enumerate((1, 3, 9), 1)]
    trained = row(2, 1, allocate=at * 0.1, mode=TRAINING)
    threaded = row(2, 1, allocate=at * 0.1, threads=2)
    found = verdict("float32 inference over nn", one, trained, threaded, *others)
    assert found.told("at limit") == "2.00x, 2.00x" and found.told("share") == "1.00x, 1.00x"
    own = one | {"allocate": at}
    assert verdict("float32 inference over nn", own, *others).told("at limit") == "4.00x, 4.00x"


@pytest.mark.parametrize(("time", "reached"), [(5.2, True), (5.3, False)])
def test_cost(time: float, reached: bool) -> None:
    rows = row(16, 1, lstmfused=time, allocate=2.6), row(16, 64, lstmfused=9.0, allocate=2.0)
    found = verdict("smallest calls", *rows)
    assert found.reached is reached and len(found.rows) == 1  # the other has too many rows
    assert found.told("ratio") == f"{time / 2.6:.2f}x, {time / 2.6:.2f}x"


def test_other_forms() -> None:
    shares = [row(256, batch, lstmfused=limit(256, batch) / 0.8) for batch in (1, 64)]
    assert verdict("share of the limit", *shares).told("ratio") == "80%, 80%"
    own = {"lstmfused": 12.0, "lstmfused packed": 10.0, "lstmfused batch-invariant": 18.0}
    assert verdict("packed", row() | own).reached is True
    invariant = verdict("cost of", row() | own)
    assert invariant.reached is None and invariant.told("ratio") == "1.50x, 1.50x"
    forced = row(lstmfused=1.0, torch=3.0, isa="avx2")
    found = verdict("AVX2", forced, row(lstmfused=1.0, torch=9.0))
    assert found.told("ratio") == "3.00x, 3.00x"
    assert verdict("packed", row(lstmfused=1.0)).reached is None
    half = row(lstmfused=10.0, dtype="bfloat16") | {"lstmfused float32": 16.0}
    judgements = verdicts(result(half), frame(result(half)))
    assert not any(v.target.what.startswith("bfloat16 over our") for v in judgements)


def test_memory() -> None:
    """The gates are kept and nothing else."""
    from benchmarks.memory import kept, peak

    torch.set_num_threads(1)
    case = Case(Shape(24, 32), 16, TRAINING)
    bounds = {name: PEERS[name].bind(Problem(case)) for name in ("lstmfused", "torch")}
    saved: Json = {name: kept(bound) for name, bound in bounds.items()}
    assert saved["lstmfused"] == 4 * 4 * 16 * 32 < saved["torch"]
    gradients = 4 * (128 * (24 + 32 + 2) + 16 * (24 + 32 + 32))
    assert all(peak(bound) > gradients for bound in bounds.values())
    found = verdict("memory kept", row(32, 16, mode="memory kept", **saved))
    assert found.reached is True and found.told("ratio") == "0.80x, 0.80x"
    saved["lstmfused"] *= 2
    assert verdict("memory kept", row(32, 16, mode="memory kept", **saved)).reached is False


def test_every_row_of_a_gpu_belongs_to_one_target_against_torch() -> None:
    from benchmarks.cases import SUITES

    rows = [case.columns() | {"lstmfused": 1.0, "torch": 2.0} for case in SUITES["gpu"].cases(1)]
    every = frame(result(*rows))
    against = [judged(t, every).rows.index for t in GPU_TARGETS if t.peer == "torch"]
    assert sorted(index for of in against for index in of) == sorted(every.index)
    assert len(judged(target("graph, B <= 32"), every).rows) > 100


def test_samples_are_shared_out_to_parts() -> None:
    kernel = "lstmfused::isa_avx2::"
    said = f"""# Overhead|Shared Object|Symbol
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
    parts = {"products": 0.6, "activations": 0.09, "transposing": 0.08, "torch": 0.08}
    parts |= {"new pages": 0.06, "waiting for threads": 0.04, "allocator": 0.03, "Python": 0.02}
    assert profiles.shares(said) == pytest.approx(parts)


def test_missed_targets_are_told_with_their_worst_rows_and_profiles() -> None:
    rows = [row(512, batch, lstmfused=10.0, torch=12.0 + batch / 9) for batch in range(1, 10)]
    found = result(*rows)
    assert [case.batch for case, _ in profiles.wanted(found)][:WORST] == [1, 2, 3]
    found["profiles"] = [
        row(512, 2, subject="lstmfused", products=0.74, Python=0.01, **{"new pages": 0.25})
    ]
    (told, *_) = report.missed(found, verdicts(found, frame(found)))
    assert told.startswith("**float32 inference over nn.LSTMCell**")
    (line,) = (line for line in told.splitlines() if "B=2 " in line)
    assert "74% products, 25% new pages |" in line and "Python" not in line and "1.22x" in line


def test_crossovers() -> None:
    one: Json = {"dtype": "float32", "units": 512, "batch": 8, "path": "products"}
    entries = [one | {"small_batch": 4.0, "products": 5.0}]
    entries.append(one | {"units": 64, "path": "small_batch", "small_batch": 2.0})
    (told,) = report.crossing(entries)
    small, large = told.splitlines()[-2:]
    assert "| 64 " in small and "small_batch 2 µs |" in small
    assert "| 512 " in large and "small_batch 4 µs !1.25 |" in large
    assert "fastest path, float32" in report.summary(result(crossovers=entries, suite="run"))


# --------------------------------------------------------------------------------------------------
# The pages, and the committed results


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what is written."""
    for name in report.files():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "docs" / "images").mkdir()
    monkeypatch.setattr(report, "ROOT", tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr("sys.argv", ["report", *options])
    return report.main()


def test_pages(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is committed is what the results say; what is not is found, and mended."""
    pages = report.files()
    for name, text in pages.items():
        assert (written / name).read_text(encoding="utf-8") == text
    for name, texts in report.blocks().items():
        for block, shown in texts.items():
            assert shown.count("\n") < 25  # a screen
            spoilt, changes = re.subn(r"\d\.\d\dx", "9.99x", shown, count=1)
            assert changes, block
            (written / name).write_text(pages[name].replace(shown, spoilt), encoding="utf-8")
            assert not report.is_written(name, pages[name])
    (written / "benchmarks" / "results" / "README.md").unlink()
    assert run(monkeypatch, "--check") == 1
    wrong = {*report.blocks(), str(Path("benchmarks", "results", "README.md"))}
    told = capsys.readouterr().out
    assert {name for name in pages if f"{name} is not what the results say" in told} == wrong
    assert run(monkeypatch) == 0
    for name, text in pages.items():
        assert (written / name).read_text(encoding="utf-8") == text
    (written / "README.md").write_text("a README without markers", encoding="utf-8")
    with pytest.raises(SystemExit, match="summary:begin"):
        run(monkeypatch)


def test_pictures(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture that a page shows is drawn, or drawn by hand."""
    assert run(monkeypatch) == 0
    drawn = {path.name for path in (written / "docs" / "images").iterdir()}
    by_hand = {"batch_and_units.svg", "how_it_works.svg"}
    committed = {path.name for path in (ROOT / "docs" / "images").iterdir()}
    pages = (ROOT / "README.md", *ROOT.glob("docs/*.md"))
    named = {k for page in pages for k in re.findall(r"images/([a-z_]+\.svg)", page.read_text())}
    assert drawn | by_hand == committed == named


def test_every_committed_result_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    suites = [load(path)["suite"] for path in RESULTS.glob("*.json")]
    assert sorted(suites) == [
        "crossovers",
        "default",
        "full",
        "gpu",
        "gpu-compiled",
        "keras",
        "layer",
        "second-order",
    ]
    for suite in suites:
        assert report.summary(report.newest(suite))
    with pytest.raises(SystemExit, match="no result of the suite other"):
        report.newest("other")
