"""The swap of a model's cells and layers."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from .cell import LSTMCell
from .lstm import LSTM

__all__ = ["fuse_", "unfuse_"]

M = TypeVar("M", bound=nn.Module)
Kind = type[nn.Module]

FUSED: dict[Kind, Kind] = {nn.LSTMCell: LSTMCell, nn.LSTM: LSTM}


def fuse_(model: M) -> M:
    """Makes every :class:`torch.nn.LSTMCell` in ``model`` an :class:`LSTMCell` and every
    :class:`torch.nn.LSTM` an :class:`LSTM`, in place.

    Each stays the same object with the same parameters, hooks and mode, so optimizers and other
    references remain valid. Parametrized ones, those of FSDP2's ``fully_shard`` and those of
    subclasses without a ``forward`` of their own are swapped, too, and stay what else they are.

    What may compute something else is left alone, which a warning tells: subclasses with a
    ``forward`` of their own, and what has had its ``forward`` replaced on the instance.

    Returns:
        ``model``.
    """
    return _swap(model, fuse=True)


def unfuse_(model: M) -> M:
    """The way back: makes every :class:`LSTMCell` in ``model`` a :class:`torch.nn.LSTMCell` and
    every :class:`LSTM` a :class:`torch.nn.LSTM`.

    What is left alone, lazy cells not yet called among them, a warning tells, as in :func:`fuse_`.
    """
    return _swap(model, fuse=False)


def _swap(model: M, fuse: bool) -> M:
    left = []
    module: Any
    for name, module in model.named_modules():
        kind = type(module)
        plain = next((plain for plain in FUSED if isinstance(module, plain)), None)
        if plain is None:
            continue
        old, new = (plain, FUSED[plain]) if fuse else (FUSED[plain], plain)
        if kind.forward is new.forward:
            continue
        if "forward" in vars(module):
            why = "its forward has been replaced on the instance"
        elif kind.forward is old.forward:
            lazy: Any = isinstance(module, LazyModuleMixin) and module
            if not (lazy and lazy.has_uninitialized_params()):
                module.__class__ = swapped_class(kind, old, new)
                continue
            why = "it is lazy and has not been called yet"
        elif isinstance(module, FUSED[plain]) is fuse:  # already, in its own way
            continue
        else:
            why = f"{kind.__name__} has a forward of its own"
        left.append(f"{name or 'the model'} ({why})")
    if left:
        warnings.warn(f"left alone: {', '.join(left)}", stacklevel=3)
    return model


def swapped_class(kind: type[Any], old: Kind, new: Kind) -> Kind:
    """``kind``, which computes what ``old`` computes, with ``new`` in its place."""
    if kind is old:
        return new
    if kind.__module__.startswith("torch."):  # by a parametrization or FSDP, which know its bases
        bases = (swapped_class(b, old, new) if issubclass(b, old) else b for b in kind.__bases__)
        body = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        return type(kind.__name__, tuple(bases), body)
    before: Kind | None = vars(kind).get("_swapped")
    return before or _subclass(kind, new)  # type: ignore[arg-type]


@cache
def _subclass(kind: type[Any], new: Kind) -> Kind:
    body = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    body |= {"forward": new.forward, "__reduce_ex__": _reduce_ex, "_swapped": kind, "_new": new}
    return type(kind.__name__, (kind, new), body)


def _reduce_ex(self: Any, protocol: int) -> Any:
    """A class that is made here cannot be found by its name: it is made again."""
    made: Any = object.__reduce_ex__(self, max(protocol, 2))
    return _made_again, (self._swapped, self._new), *made[2:]


def _made_again(kind: type[Any], new: Kind) -> Any:
    return object.__new__(_subclass(kind, new))  # type: ignore[arg-type]
