"""The example runs, prints what it promises, and notices a cell that computes something else."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("tqdm")

EXAMPLE = Path(__file__).parent.parent / "examples" / "char_lm.py"
TEXT = "The state is (batch, units); the batch may change from call to call. " * 12
# 103 windows: an epoch is 5 steps of batch 19 and one of batch 8.
OPTIONS = ("--epochs=2", "--batch=19", "--units=8", "--seq=8", "--threads=1")
CURVES = re.compile(r"^ +(\d+)-(\d+) +(\d\.\d{4}) +(\d\.\d{4}) +(\d\.\de[+-]\d\d)$", re.MULTILINE)
WRONG_CELL = """
from torch import nn

class LSTMCell(nn.LSTMCell):
    def forward(self, input, hx=None):
        h, c = super().forward(input, hx)
        {fault}
        return h, c
"""


def run(folder: Path, *first_on_path: str) -> subprocess.CompletedProcess[str]:
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    files = (f"--text={folder / 'text.txt'}", f"--plot={folder / 'curves.png'}")
    return subprocess.run(
        [sys.executable, EXAMPLE, *OPTIONS, *files],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((*first_on_path, *sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_char_lm(tmp_path: Path) -> None:
    process = run(tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "6 steps an epoch, the first with batch 19, the last 8" in process.stdout

    curves = CURVES.findall(process.stdout)
    assert [int(first) for first, *_ in curves] == list(range(1, 13)), process.stdout
    stock = [float(loss) for _, _, loss, _, _ in curves]
    fused = [float(loss) for _, _, _, loss, _ in curves]
    assert fused == pytest.approx(stock, abs=2e-4)
    assert stock[-1] < stock[0]
    assert re.search(r"median, ms +\d+\.\d +\d+\.\d +\d+\.\d\d\n", process.stdout)

    _, sample = process.stdout.split("with batch 1:\n")
    assert sample.startswith(TEXT[:8])
    assert len(sample) == 8 + 400 + 1
    assert set(sample[:-1]) <= set(TEXT)
    assert (tmp_path / "curves.png").exists() == (find_spec("matplotlib") is not None)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("c = c.detach()", id="gradient"),
        pytest.param("h = h * (len(h) != 8)", id="partial batch"),
        pytest.param("h = h * float('nan')", id="nan"),
    ],
)
def test_char_lm_notices_a_wrong_cell(tmp_path: Path, fault: str) -> None:
    (tmp_path / "lstmfused.py").write_text(WRONG_CELL.format(fault=fault), encoding="utf-8")
    process = run(tmp_path, str(tmp_path))
    assert process.returncode == 1, process.stdout + process.stderr
    assert process.stderr.endswith("the two cells do not compute the same\n")
