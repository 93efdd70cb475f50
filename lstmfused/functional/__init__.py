"""The step and the layer as functions."""

from .cell import lstm_cell
from .layer import lstm

__all__ = ["lstm", "lstm_cell"]
