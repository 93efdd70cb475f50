"""The package as it is installed, on its own: these tests run far from its sources, beside torch
and pytest alone."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lstmfused

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}


def close(ours: list[Tensor], torchs: list[Tensor], tolerance: float = 1e-5) -> None:
    for found, expected in zip(ours, torchs, strict=True):
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def trained(module: nn.Module, output: Tensor, *wanted: Tensor) -> list[Tensor]:
    """An output and its gradients."""
    grads = torch.autograd.grad(output.square().sum(), [*wanted, *module.parameters()])
    return [output, *grads]


def python(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_what_is_installed() -> None:
    here = Path(lstmfused.__file__)
    try:
        installed = distribution("lstmfused")
    except PackageNotFoundError:
        pytest.skip("built in place")
    if installed.locate_file("lstmfused/__init__.py") != here:
        pytest.skip("installed in editable mode")
    assert installed.version.split("+")[0] == lstmfused.__version__
    minor = ".".join(torch.__version__.split(".")[:2])
    assert f"torch=={minor}.*" in (installed.requires or [])
    for name in ("py.typed", "_C.pyi", "_build.pyi"):
        assert here.with_name(name).is_file(), name
    assert not list(here.parent.rglob("*.cpp"))


def test_command() -> None:
    printed = python("-m", "lstmfused")
    info = lstmfused.build_info()
    assert all(f"{key:<18} {value}" in printed.splitlines() for key, value in info.items())


@pytest.mark.parametrize("module", ["keras", "onnx", "numpy"])
def test_asks_for_torch_alone(module: str) -> None:
    """numpy, where it is installed, is torch's to import."""
    python("-c", f"import sys; sys.modules[{module!r}] = None; import lstmfused")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_cell(batch: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.LSTMCell(30, 50, dtype=dtype)
    fused = lstmfused.LSTMCell(30, 50, dtype=dtype)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(batch, 30, dtype=dtype)
    h, c = torch.randn(2, batch, 50, dtype=dtype)
    with torch.no_grad():
        close(list(fused(x, (h, c))), list(plain(x, (h, c))), TOLERANCE[dtype])
    if dtype == torch.float64:
        inputs = [t.requires_grad_() for t in (x, h, c)]
        ours, torchs = (trained(m, torch.cat(m(x, (h, c))), *inputs) for m in (fused, plain))
        close(ours, torchs, TOLERANCE[dtype])


def test_layer() -> None:
    torch.manual_seed(0)
    plain = nn.LSTM(20, 40, num_layers=2, bidirectional=True)
    fused = lstmfused.LSTM(20, 40, num_layers=2, bidirectional=True)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(9, 3, 20, requires_grad=True)
    ours, torchs = (trained(m, m(x)[0], x) for m in (fused, plain))
    close(ours, torchs, 1e-4)


def test_reset() -> None:
    layer, x = lstmfused.LSTM(5, 8), torch.randn(6, 2, 5)
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[4] = True
    with torch.no_grad():
        close([layer(x, reset=reset)[0][4:]], [layer(x[4:])[0]])


@pytest.mark.parametrize(("weights", "tolerance"), [(torch.float32, 1e-5), (torch.int8, 0.05)])
def test_packed(weights: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"cell": nn.LSTMCell(30, 50), "layer": nn.LSTM(30, 50)})
    packed = lstmfused.pack(model, weight_dtype=weights)
    x = torch.randn(4, 3, 30)
    with torch.no_grad():
        close(list(packed["cell"](x[0])), list(model["cell"](x[0])), tolerance)
        close([packed["layer"](x)[0]], [model["layer"](x)[0]], tolerance)


def test_gradients() -> None:
    cell = lstmfused.LSTMCell(3, 4, dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cell, (x,))
    assert torch.autograd.gradgradcheck(cell, (x,))


def test_batch_invariant() -> None:
    cell, x = lstmfused.LSTMCell(10, 20), torch.randn(64, 10)
    with lstmfused.batch_invariant(), torch.no_grad():
        assert torch.equal(cell(x)[0][3:4], cell(x[3:4])[0])


def test_export() -> None:
    """By the shapes that the operators promise, and the registrations that are made at import."""
    model, x = nn.Sequential(lstmfused.LSTMCell(10, 20)), torch.randn(3, 10)
    exported = torch.export.export(model, (x,)).module()
    close(list(exported(x)), list(model(x)))
