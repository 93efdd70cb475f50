"""The LSTM cell that PyTorch should have had: one step, one fused kernel."""

__version__ = "0.1.0"

from . import functional, reference
from ._ops import build_info
from .modules import LazyLSTMCell, LSTMCell, fuse, unfuse

__all__ = [
    "LSTMCell",
    "LazyLSTMCell",
    "build_info",
    "functional",
    "fuse",
    "reference",
    "unfuse",
]
