"""Batch-invariant mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ._ops import _C

_mode = False  # as the extension has it, where a graph can see it

__all__ = ["batch_invariant", "is_batch_invariant", "set_batch_invariant"]


def set_batch_invariant(mode: bool) -> None:
    """Makes each row of h and c depend on nothing but that row, to the bit, or lets it go again.

    A kernel otherwise orders a row's additions as suits the whole batch, so the same row in another
    batch may differ in its last bits (results are always the same from run to run and for every
    number of threads). In this mode row i of h and c is bit-identical for every batch size, for
    every position in the batch and for every number of threads, at the cost of speed in small
    batches of narrow cells and large batches of wide ones.

    A layer, :class:`LSTM`, then has the bits of its cells called step by step, for every number of
    steps, with resets and lengths, too. What comes after it has to keep them:
    :class:`torch.nn.Linear` does not.

    It holds for cell and layer on CPU, in all dtypes, compiled or not, until it is set again, in
    the whole process, as :func:`torch.use_deterministic_algorithms` does. Gradients stay as they
    are. Where no batch-invariant kernel is (CUDA tensors, forward-mode derivatives, transforms of
    ``torch.func``, ``vmap`` over weights), the step raises :class:`NotImplementedError`.
    """
    global _mode
    _C.set_batch_invariant(mode)
    _mode = _C.batch_invariant()


def is_batch_invariant() -> bool:
    """Whether the batch-invariant mode is set: see :func:`set_batch_invariant`."""
    return _mode


@contextmanager
def batch_invariant(mode: bool = True) -> Iterator[None]:
    """A context, or decorator, in which the batch-invariant mode is set: see
    :func:`set_batch_invariant`. The mode is the whole process's, not the thread's.

    Example::

        >>> cell, x = LSTMCell(10, 20), torch.randn(64, 10)
        >>> with lstmfused.batch_invariant():
        ...     assert torch.equal(cell(x)[0][3], cell(x[3])[0])
    """
    before = is_batch_invariant()
    set_batch_invariant(mode)
    try:
        yield
    finally:
        set_batch_invariant(before)
