"""The Python of every page runs, in order, as one program; the table of abilities holds."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lstmfused

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [
    p for p in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) if BLOCK.search(p.read_text())
]


def run(page: Path) -> dict[str, Any]:
    text = page.read_text()
    namespace: dict[str, Any] = {"__name__": page.stem}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(page), "exec"), namespace)
    return namespace


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated")
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of Keras's variables
def test_python_blocks_run(page: Path) -> None:
    if "import keras" in page.read_text():
        pytest.importorskip("keras")
    run(page)


def test_the_formula_of_the_readme() -> None:
    found = run(ROOT / "README.md")
    weights = [p.detach() for p in found["cell"].parameters()]
    x, hx = torch.randn(3, 10), (torch.randn(3, 20), torch.randn(3, 20))
    ours = lstmfused.functional.lstm_cell(x, hx, *weights)
    torch.testing.assert_close(ours, found["lstm_cell"](x, hx, *weights))


@pytest.mark.filterwarnings("ignore")  # of torch's own, by the trial of torch's own cell and layer
def test_abilities() -> None:
    """The table is what the trial finds: all works but the profiler, which knows the operations of
    a fixed list of torch's own operators."""
    for package in ("onnx", "onnxruntime", "onnxscript", "tabulate"):
        pytest.importorskip(package, reason=f"the trial needs {package}")
    from benchmarks.format import markers
    from tools import abilities

    found = abilities.markdown()
    lines = [line.strip("| ").split(" | ") for line in found.splitlines() if line.startswith("|")]
    mesh_of_one = "`DTensor`, sharded over the batch"  # torch 2.11 itself fails: see sharded.py
    passed_over = {mesh_of_one} if torch.__version__.startswith("2.11.") else set()
    for column in (2, 4):  # the cell, the layer
        fails = {line[0].strip() for line in lines[2:] if line[column].strip() != "works"}
        assert fails - passed_over == {"the profiler's `with_flops`"}
    begin, end = markers("abilities")
    page = (ROOT / "docs" / "transforms.md").read_text()
    written = page.split(begin)[1].split(end)[0].strip()
    if torch.__version__ in written.splitlines()[0]:
        assert written == found
