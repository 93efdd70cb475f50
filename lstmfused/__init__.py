"""The LSTM cell that PyTorch should have had: one step, one fused kernel."""

__version__ = "0.1.0"

from . import functional, reference
from ._ops import build_info
from .invariance import batch_invariant, is_batch_invariant, set_batch_invariant
from .modules import LazyLSTMCell, LSTMCell, fuse, unfuse

__all__ = [
    "LSTMCell",
    "LazyLSTMCell",
    "batch_invariant",
    "build_info",
    "functional",
    "fuse",
    "is_batch_invariant",
    "reference",
    "set_batch_invariant",
    "unfuse",
]
