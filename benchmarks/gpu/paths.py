"""How lstmfused computes a step on CUDA, and how to make it take another way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lstmfused._ops import _C

from .plan import DTYPES, Cell

PATHS = ("few_rows", "tensor_cores", "warpgroups", "products")
_c: Any = _C


def chosen(cell: Cell) -> str:
    """The path of this cell, under what is forced now."""
    dtype = getattr(torch, DTYPES.get(cell.precision, cell.precision))
    inputs, units = cell.shape[:2]
    return str(_c.cuda_path(dtype, cell.batch, inputs, units, cell.precision == "tf32"))


@contextmanager
def forced(path: str) -> Iterator[None]:
    """ "" forces nothing."""
    _c.set_cuda_path(path)
    try:
        yield
    finally:
        _c.set_cuda_path("")
