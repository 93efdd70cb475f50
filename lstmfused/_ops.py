"""Loads the extension and registers what is made from Python: the fake kernels."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["_C", "build_info"]

_BUILD = "pip install --no-build-isolation ."


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


try:
    from . import _build
except ImportError:
    raise ImportError(f"lstmfused has not been built here: run `{_BUILD}` in its sources") from None
if _minor(_build.TORCH) != _minor(torch.__version__):
    raise ImportError(
        f"lstmfused was built for torch {_build.TORCH}, but torch {torch.__version__} is loaded: "
        f"run `{_BUILD}` in its sources, or install torch {_build.TORCH}"
    )
try:
    from . import _C
except ImportError as error:
    raise ImportError(f"lstmfused does not load ({error}): run `{_BUILD}` in its sources") from None


def _fake_forward(
    input: Tensor,
    hx: Tensor,
    cx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    save_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, H = hx.shape
    return (
        input.new_empty(B, H),
        input.new_empty(B, H),
        input.new_empty(B if save_gates else 0, 4 * H),
    )


def _fake_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    gates: Tensor,
    input: Tensor,
    hx: Tensor,
    cx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    shapes = [
        input.shape,
        hx.shape,
        cx.shape,
        weight_ih.shape,
        weight_hh.shape,
        weight_hh.shape[:1],
        weight_hh.shape[:1],
    ]
    return tuple(
        input.new_empty(shape if wanted else (0,))
        for shape, wanted in zip(shapes, output_mask, strict=True)
    )


torch.library.register_fake("lstmfused::lstm_cell_forward", _fake_forward)
torch.library.register_fake("lstmfused::lstm_cell_backward", _fake_backward)


def build_info() -> dict[str, str]:
    """What was built, for which torch, and which kernel this machine runs."""
    from . import __version__

    return {
        "lstmfused": __version__,
        "built for torch": _build.TORCH,
        "running torch": torch.__version__,
        "compiler": _C.compiler,
        "cpu kernels built": _build.VARIANTS,
        "cpu kernel": _C.cpu_kernel(),
    }
