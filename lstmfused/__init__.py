"""The LSTM cell that PyTorch should have had: one step, one fused kernel."""

__version__ = "0.1.0"

from . import _integrations, functional, reference
from ._integrations.decompositions import decompositions
from ._ops import build_info
from .convert import fuse, unfuse
from .frozen import FrozenLSTMCell, freeze
from .invariance import batch_invariant, is_batch_invariant, set_batch_invariant
from .modules import LazyLSTMCell, LSTMCell

__all__ = [
    "FrozenLSTMCell",
    "LSTMCell",
    "LazyLSTMCell",
    "batch_invariant",
    "build_info",
    "decompositions",
    "freeze",
    "functional",
    "fuse",
    "is_batch_invariant",
    "reference",
    "set_batch_invariant",
    "unfuse",
]

_integrations.register()
