"""The examples run, print what they promise, and notice what computes something else."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).parent.parent / "examples"
TEXT = "The state is (batch, units); the batch may change from call to call. " * 12
# 103 windows: an epoch is 5 steps of batch 19 and one of batch 8.
OPTIONS = ("--epochs=2", "--batch=19", "--units=8", "--seq=8", "--threads=1")
CURVES = re.compile(r"^ +(\d+)-(\d+)" + r" +(\d\.\d{4})" * 3 + r" +\d\.\de[+-]\d\d$", re.MULTILINE)
WRONG_CELL = """
from torch import nn
from torch.nn import LSTM

class LSTMCell(nn.LSTMCell):
    def forward(self, input, hx=None):
        h, c = super().forward(input, hx)
        {fault}
        return h, c
"""
WRONG_LAYER = """
from torch import nn
from torch.nn import LSTMCell

class LSTM(nn.LSTM):
    def forward(self, input, hx=None):
        h, (h_n, c_n) = super().forward(input, hx)
        {fault}
        return h, (h_n, c_n)
"""
WRONG_RESETS = """
from contextlib import nullcontext as batch_invariant
import torch
from torch import nn

class LSTM(nn.LSTM):
    def forward(self, input, hx, reset):
        {fault}
        steps = []
        for x, new in zip(input, reset):
            hx = [s * ~new[:, None] for s in hx]
            step, hx = super().forward(x[None], hx)
            steps.append(step)
        return torch.cat(steps), hx

def fuse_(model):
    for module in model.modules():
        if type(module) is nn.LSTM:
            module.__class__ = LSTM
"""
WRONG_HOOKS = """
from contextlib import contextmanager
from unittest.mock import patch
from keras.layers import LSTM, LSTMCell

loop, call, report = LSTM.inner_loop, LSTMCell.call, repr

def inner_loop(self, *args, **kwargs):
    last, output, state = loop(self, *args, **kwargs)
    {layer}
    return last, output, state

def step(self, *args, **kwargs):
    h, (h, c) = call(self, *args, **kwargs)
    {cell}
    return h, [h, c]

@contextmanager
def enable():
    with patch.object(LSTM, "inner_loop", inner_loop), patch.object(LSTMCell, "call", step):
        yield
"""


def run(example: str, *options: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`path` comes first among the places where modules are looked for."""
    places = [] if path is None else [str(path)]
    return subprocess.run(
        [sys.executable, EXAMPLES / example, *options],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((*places, *sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
    )


def run_char_lm(folder: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    files = (f"--text={folder / 'text.txt'}", f"--plot={folder / 'curves.png'}")
    return run("char_lm.py", *OPTIONS, *files, path=path)


def test_char_lm(tmp_path: Path) -> None:
    process = run_char_lm(tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "6 steps an epoch, the first with batch 19, the last 8" in process.stdout

    curves = CURVES.findall(process.stdout)
    assert [int(first) for first, *_ in curves] == list(range(1, 13)), process.stdout
    stock, cell, layer = ([float(losses[i]) for losses in curves] for i in (2, 3, 4))
    assert cell == pytest.approx(stock, abs=2e-4)
    assert layer == pytest.approx(stock, abs=2e-4)
    assert stock[-1] < stock[0]
    assert re.search(r"median, ms( +\d+\.\d){3}\n", process.stdout)

    _, sample = process.stdout.split("with batch 1:\n")
    assert sample.startswith(TEXT[:8])
    assert len(sample) == 8 + 400 + 1
    assert set(sample[:-1]) <= set(TEXT)
    assert (tmp_path / "curves.png").exists() == (find_spec("matplotlib") is not None)


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        pytest.param(WRONG_CELL, "c = c.detach()", id="gradient"),
        pytest.param(WRONG_CELL, "h = h * (len(h) != 8)", id="partial batch"),
        pytest.param(WRONG_CELL, "h = h * float('nan')", id="nan"),
        pytest.param(WRONG_LAYER, "h = h.detach()", id="gradient of the layer"),
        pytest.param(WRONG_LAYER, "h = h * (h.shape[1] != 8)", id="partial batch of the layer"),
    ],
)
def test_char_lm_notices_what_is_wrong(tmp_path: Path, wrong: str, fault: str) -> None:
    (tmp_path / "lstmfused.py").write_text(wrong.format(fault=fault), encoding="utf-8")
    process = run_char_lm(tmp_path, path=tmp_path)
    assert process.returncode == 1, process.stdout + process.stderr
    assert process.stderr.endswith("they do not compute the same\n")


def run_recurrent_ppo(folder: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed: lstmfused[rl]")
    options = ("--steps=256", "--units=8", "--threads=1", f"--picture={folder / 'curves.png'}")
    return run("recurrent_ppo.py", *options, path=path)


def test_recurrent_ppo(tmp_path: Path) -> None:
    process = run_recurrent_ppo(tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    assert re.search(r"same actions( +256){3}\n", process.stdout), process.stdout
    ratios = re.search(r"largest \|ratio - 1\|" + r" +(\S+)" * 3, process.stdout)
    assert ratios
    assert float(ratios[1]) < 1e-5
    assert float(ratios[2]) < 1e-5
    assert float(ratios[3]) == 0
    assert (tmp_path / "curves.png").exists() == (find_spec("matplotlib") is not None)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("reset = reset & False", id="resets"),
        pytest.param("hx = [s * 0.5 for s in hx]", id="state"),
        pytest.param("input = input.flip(0)", id="order"),
    ],
)
def test_recurrent_ppo_notices_what_is_wrong(tmp_path: Path, fault: str) -> None:
    (tmp_path / "lstmfused.py").write_text(WRONG_RESETS.format(fault=fault), encoding="utf-8")
    process = run_recurrent_ppo(tmp_path, path=tmp_path)
    assert process.returncode == 1, process.stdout + process.stderr
    assert process.stderr.endswith("the runs do not begin alike\n")


def run_keras_fit(folder: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    if find_spec("keras") is None:  # to import it here would settle its backend
        pytest.skip("keras is not installed: lstmfused[keras]")
    options = ("--epochs=2", "--rows=27", "--steps=6", "--units=8", "--batch=19", "--threads=1")
    return run("keras_fit.py", *options, f"--out={folder / 'curves.png'}", path=path)


def test_keras_fit(tmp_path: Path) -> None:
    process = run_keras_fit(tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    assert re.search(r"4 rows leave  x \(4, 14\) +h \(4, 8\) +c \(4, 8\)\n", process.stdout)
    assert "27 rows in 2 batches of 19, the last of 8\n" in process.stdout
    assert re.search(r"^lstm\w* +LSTM +fused$", process.stdout, re.MULTILINE), process.stdout
    assert len(re.findall(r"^ +\d( +\d\.\d{5}){2}$", process.stdout, re.MULTILINE)) == 2
    assert (tmp_path / "curves.png").exists() == (find_spec("matplotlib") is not None)


@pytest.mark.parametrize(
    ("layer", "cell", "error"),
    [
        pytest.param("last = last.detach()", "", "do not compute the same", id="gradient"),
        pytest.param("last = last * (len(last) != 8)", "", "do not compute the same", id="batch"),
        pytest.param("last = last * float('nan')", "", "do not compute the same", id="nan"),
        pytest.param("", "h = h + 1e-3 * h.mean(0)", "a step computes something else", id="rows"),
        pytest.param("", "c = c * 1.001", "a step computes something else", id="step"),
    ],
)
def test_keras_fit_notices_what_is_wrong(tmp_path: Path, layer: str, cell: str, error: str) -> None:
    (tmp_path / "lstmfused").mkdir()
    (tmp_path / "lstmfused" / "__init__.py").touch()
    wrong = WRONG_HOOKS.format(layer=layer or "pass", cell=cell or "pass")
    (tmp_path / "lstmfused" / "keras.py").write_text(wrong, encoding="utf-8")
    process = run_keras_fit(tmp_path, path=tmp_path)
    assert process.returncode == 1, process.stdout + process.stderr
    assert process.stderr.endswith(f"{error}\n")
