"""Every Python block of the README runs, in order, as one program; its table of abilities holds."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated")
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of Keras's variables
def test_python_blocks_run() -> None:
    text = README.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert blocks
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(README), "exec"), namespace)


@pytest.mark.filterwarnings("ignore")  # of torch's own, by the trial of torch's own cell
def test_abilities() -> None:
    """The README's table is what the trial finds: all works but the profiler, which knows the
    operations of a fixed list of torch's own operators."""
    for package in ("onnx", "onnxruntime", "onnxscript", "tabulate"):
        pytest.importorskip(package, reason=f"the trial needs {package}")
    from benchmarks.format import markers
    from tools import abilities

    found = abilities.markdown()
    lines = [line.strip("| ").split(" | ") for line in found.splitlines()[2:]]
    fails = {name.strip() for name, _, ours in lines if ours.strip() != "works"}
    assert fails == {"the profiler's `with_flops`"}
    begin, end = markers("abilities")
    written = README.read_text().split(begin)[1].split(end)[0].strip()
    if torch.__version__ in written.splitlines()[0]:
        assert written == found
