"""Loads the extension, if it was built for this torch."""

from __future__ import annotations

import torch

from .._version import __version__

__all__ = ["_C", "build_info"]

_BUILD = "pip install --no-build-isolation ."


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


try:
    from .. import _build
except ImportError:
    raise ImportError(f"lstmfused has not been built here: run `{_BUILD}` in its sources") from None
if _minor(_build.TORCH) != _minor(torch.__version__):
    raise ImportError(
        f"lstmfused was built for torch {_build.TORCH}, but torch {torch.__version__} is loaded: "
        f"run `{_BUILD}` in its sources, or install torch {_minor(_build.TORCH)}"
    )
try:
    from .. import _C
except ImportError as error:
    raise ImportError(f"lstmfused does not load ({error}): run `{_BUILD}` in its sources") from None


def build_info() -> dict[str, str]:
    """What was built, for which torch, and which kernel this machine runs."""
    return {
        "lstmfused": __version__,
        "built for torch": _build.TORCH,
        "running torch": torch.__version__,
        "digest of the sources": _build.SOURCES,
        "compiler": _C.compiler,
        "cpu kernels built": _build.VARIANTS,
        "cpu kernel": _C.cpu_kernel(),
        "cuda kernels built": _C.cuda_architectures or "none",
    }
