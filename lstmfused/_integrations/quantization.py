"""``torch.ao.quantization.quantize_dynamic`` makes torch's quantized cell of ours, too."""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import nn

from ..modules import LSTMCell
from ..modules.convert import swapped_class

__all__ = ["register"]


def register(quantize: Any) -> None:
    from torch.ao.nn.quantized import dynamic
    from torch.ao.quantization import quantization_mappings

    class Quantized(dynamic.LSTMCell):
        """What makes torch's quantized cell of ours: it takes torch's own only."""

        @classmethod
        def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> nn.Module:
            plain = object.__new__(swapped_class(type(mod), LSTMCell, nn.LSTMCell))
            vars(plain).update(vars(mod))
            made: nn.Module = dynamic.LSTMCell.from_float(plain)
            return made

    quantization_mappings.DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS[LSTMCell] = Quantized

    # Types are looked up exactly: who asks for torch's cell, as by default, asks for ours, too.
    propagate = quantize.propagate_qconfig_

    @wraps(propagate)
    def propagate_qconfig_(module: Any, qconfig_dict: Any = None, *rest: Any, **named: Any) -> Any:
        if qconfig_dict and nn.LSTMCell in qconfig_dict:
            qconfig_dict = {LSTMCell: qconfig_dict[nn.LSTMCell], **qconfig_dict}
        return propagate(module, qconfig_dict, *rest, **named)

    quantize.propagate_qconfig_ = propagate_qconfig_
