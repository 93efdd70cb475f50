"""The LSTM cell that PyTorch should have had: one step, one fused kernel."""

__version__ = "0.1.0"

from . import functional, reference
from ._ops import build_info
from .frozen import FrozenLSTMCell, freeze
from .invariance import batch_invariant, is_batch_invariant, set_batch_invariant
from .modules import LazyLSTMCell, LSTMCell, fuse, unfuse

__all__ = [
    "FrozenLSTMCell",
    "LSTMCell",
    "LazyLSTMCell",
    "batch_invariant",
    "build_info",
    "freeze",
    "functional",
    "fuse",
    "is_batch_invariant",
    "reference",
    "set_batch_invariant",
    "unfuse",
]
