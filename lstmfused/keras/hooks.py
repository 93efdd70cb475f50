"""Where Keras is hooked: what its layers call between their checks and their states."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, NamedTuple

import torch
from keras import layers, ops, tree
from torch import Tensor

from . import steps

__all__ = ["Line", "Report", "disable", "enable", "fuse", "report", "unfuse"]


def _traced() -> bool:
    """Whether a graph is made that must run without this package."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or torch.compiler.is_exporting()


@functools.cache
def _say(name: str, why: str) -> None:
    warnings.warn(f"lstmfused.keras leaves layer {name!r} to Keras: {why}", stacklevel=4)


# --------------------------------------------------------------------------------------------------
# What is called instead of Keras's own methods


def _inner_loop(
    original: Callable[..., Any],
    layer: Any,
    sequences: Tensor,
    initial_state: Any,
    mask: Any,
    training: bool = False,
) -> Any:
    """The method of RNN, and that of LSTM."""
    if not steps.has_lstm_cells(layer) or _traced():
        return original(layer, sequences, initial_state, mask, training=training)
    if why := steps.why_not(layer):
        _say(layer.name, why)
        return original(layer, sequences, initial_state, mask, training=training)
    if tree.is_nested(mask):
        mask = mask[0]
    if mask is None and sequences.is_cuda and steps.is_for_cudnn(layer):
        return original(layer, sequences, initial_state, mask, training=training)
    if mask is not None:
        mask = ops.convert_to_tensor(mask).bool()
        mask = mask.reshape(mask.shape[:2]).t()  # (B, T), or (B, T, 1) as Keras, too, takes it
    return steps.inner_loop(layer, sequences.transpose(0, 1), initial_state, mask, bool(training))


def _call(
    original: Callable[..., Any], cell: Any, inputs: Tensor, states: Any, training: bool = False
) -> Any:
    """The method of LSTMCell."""
    if _traced() or inputs.ndim != 2 or steps.why_not_cell(cell):
        return original(cell, inputs, states, training=training)
    h, c = states
    _, h, c = steps.sequence(cell, inputs.unsqueeze(0), h, c, None, False, bool(training))
    return h, [h, c]


_HOOKS: dict[tuple[Any, str], Callable[..., Any]] = {
    (layers.RNN, "inner_loop"): _inner_loop,
    (layers.LSTM, "inner_loop"): _inner_loop,
    (layers.LSTMCell, "call"): _call,
}
_originals: dict[tuple[Any, str], Callable[..., Any]] = {}


def _hooked(owner: Any, name: str) -> Any:
    hook, original = _HOOKS[owner, name], _originals.get((owner, name), owner.__dict__[name])

    @functools.wraps(original)  # Keras looks at signatures
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return hook(original, self, *args, **kwargs)

    method.is_hook = True  # type: ignore[attr-defined]
    return method


# --------------------------------------------------------------------------------------------------
# Everywhere


class _Enabled:
    def __init__(self, before: bool) -> None:
        self._before = before

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        if not self._before:
            disable()


def enable() -> _Enabled:
    """Computes the LSTMs of every Keras model in this process, those made before and those to come.

    Returns:
        a context manager, for those who want it for a while::

            with lstmfused.keras.enable():
                model.fit(x, y)
    """
    before = bool(_originals)
    if not before:
        methods = {(owner, name): _hooked(owner, name) for owner, name in _HOOKS}
        for (owner, name), method in methods.items():
            _originals[owner, name] = owner.__dict__[name]
            setattr(owner, name, method)
    return _Enabled(before)


def disable() -> None:
    """Gives Keras its own methods back."""
    for (owner, name), original in _originals.items():
        setattr(owner, name, original)
    _originals.clear()


# --------------------------------------------------------------------------------------------------
# One model


def _layers_of(model: Any) -> Iterator[Any]:
    """Of the model and its layers those of LSTM cells, and the cells that are in no such layer."""
    found = list(model._flatten_layers())
    rnns = [layer for layer in found if isinstance(layer, layers.RNN)]
    inside = {id(cell) for layer in rnns for cell in steps.cells_of(layer.cell)}
    for layer in found:
        if isinstance(layer, layers.RNN):
            alone = steps.has_lstm_cells(layer)
        else:
            alone = isinstance(layer, layers.LSTMCell) and id(layer) not in inside
        if alone:
            yield layer


def fuse(model: Any) -> Any:
    """As :func:`enable`, for the layers that this model has now, and for no other model. Layers
    that Keras makes anew from their config, when it loads, clones or unpickles a model, are its
    own.

    Returns:
        ``model``.
    """
    for layer in model._flatten_layers():
        for owner, name in _HOOKS:
            if getattr(type(layer), name, None) is owner.__dict__[name]:
                layer.__dict__[name] = MethodType(_hooked(owner, name), layer)
    return model


def unfuse(model: Any) -> Any:
    """Undoes :func:`fuse`; returns ``model``."""
    for layer in model._flatten_layers():
        for _, name in _HOOKS:
            if hasattr(layer.__dict__.get(name), "is_hook"):
                del layer.__dict__[name]
    return model


class Line(NamedTuple):
    """Of a :func:`~lstmfused.keras.report`: ``why`` says why a layer is not fused."""

    layer: str
    kind: str
    fused: bool
    why: str


class Report(list[Line]):
    """A :class:`Line` for each layer of LSTM cells and each cell in no such layer; printed, a
    table."""

    def __str__(self) -> str:
        rows = [(n, kind, "fused" if fused else f"Keras: {why}") for n, kind, fused, why in self]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows)


def report(model: Any) -> Report:
    """Which layers of a model run fused, and why the others do not."""
    lines = Report()
    for layer in _layers_of(model):
        is_layer = isinstance(layer, layers.RNN)
        name = "inner_loop" if is_layer else "call"
        why = steps.why_not(layer) if is_layer else steps.why_not_cell(layer)
        if not why and not hasattr(getattr(layer, name), "is_hook"):
            own = getattr(type(layer), name) in [owner.__dict__.get(name) for owner, _ in _HOOKS]
            why = "not enabled" if own else f"{type(layer).__name__} has its own {name}"
        lines.append(Line(layer.name, type(layer).__name__, not why, why))
    return lines
