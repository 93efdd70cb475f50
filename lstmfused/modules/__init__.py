"""The cell and the layer as modules, and the swap of a model's."""

from .cell import LazyLSTMCell, LSTMCell
from .convert import fuse_, unfuse_
from .lstm import LSTM
from .packed import PackedLSTM, PackedLSTMCell, pack

__all__ = [
    "LSTM",
    "LSTMCell",
    "LazyLSTMCell",
    "PackedLSTM",
    "PackedLSTMCell",
    "fuse_",
    "pack",
    "unfuse_",
]
