"""The cell as modules, and the swap of a model's cells."""

from .cell import LazyLSTMCell, LSTMCell
from .convert import fuse_, unfuse_
from .packed import PackedLSTMCell, pack

__all__ = ["LSTMCell", "LazyLSTMCell", "PackedLSTMCell", "fuse_", "pack", "unfuse_"]
