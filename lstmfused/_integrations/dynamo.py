"""``torch.compile`` refuses what is an :class:`torch.nn.LSTM`, whose operators it cannot trace."""

from __future__ import annotations

from functools import wraps
from typing import Any

from ..modules import LSTM

__all__ = ["register"]


def register(builder: Any) -> None:
    """With what wraps modules for Dynamo: ours it can trace."""
    wrap = builder.VariableBuilder.wrap_module

    @wraps(wrap)
    def wrap_module(self: Any, value: Any) -> Any:
        with builder.config.patch(allow_rnn=builder.config.allow_rnn or isinstance(value, LSTM)):
            return wrap(self, value)

    builder.VariableBuilder.wrap_module = wrap_module
