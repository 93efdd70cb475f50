"""The LSTM cell that PyTorch should have had: one step, one fused kernel."""

from . import _integrations, functional, reference
from ._integrations.decompositions import decompositions
from ._ops import build_info
from ._version import __version__
from .invariance import batch_invariant, is_batch_invariant, set_batch_invariant
from .modules import (
    LSTM,
    LazyLSTMCell,
    LSTMCell,
    PackedLSTM,
    PackedLSTMCell,
    fuse_,
    pack,
    unfuse_,
)

__all__ = [
    "LSTM",
    "LSTMCell",
    "LazyLSTMCell",
    "PackedLSTM",
    "PackedLSTMCell",
    "__version__",
    "batch_invariant",
    "build_info",
    "decompositions",
    "functional",
    "fuse_",
    "is_batch_invariant",
    "pack",
    "reference",
    "set_batch_invariant",
    "unfuse_",
]

# Names of earlier versions, until 1.0.
fuse, unfuse, freeze, FrozenLSTMCell = fuse_, unfuse_, pack, PackedLSTMCell

_integrations.register()
