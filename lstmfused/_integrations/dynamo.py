"""``torch.compile`` refuses what is an :class:`torch.nn.LSTM`, whose operators it cannot trace, and
fails to trace packed sequences before torch 2.13."""

from __future__ import annotations

from functools import wraps
from typing import Any

from ..modules import LSTM

__all__ = ["register", "register_rules"]


def register(builder: Any) -> None:
    """With what wraps modules for Dynamo: ours it can trace."""
    wrap = builder.VariableBuilder.wrap_module

    @wraps(wrap)
    def wrap_module(self: Any, value: Any) -> Any:
        with builder.config.patch(allow_rnn=builder.config.allow_rnn or isinstance(value, LSTM)):
            return wrap(self, value)

    builder.VariableBuilder.wrap_module = wrap_module


def register_rules(trace_rules: Any) -> None:
    """With what says how functions are traced: packed sequences break the graph both ways."""
    rules = trace_rules.manual_torch_name_rule_map
    padding = "torch.nn.utils.rnn.pad_packed_sequence"
    if padding not in rules:  # as it is from torch 2.13 on
        rules[padding] = rules["torch.nn.utils.rnn.pack_padded_sequence"]
        trace_rules.get_torch_obj_rule_map.cache_clear()
