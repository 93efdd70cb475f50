"""``torch.ao.quantization.quantize_dynamic`` makes torch's quantized modules of ours, too."""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import nn

from ..modules.convert import FUSED, swapped_class

__all__ = ["register"]


def register(quantize: Any) -> None:
    from torch.ao.nn.quantized import dynamic
    from torch.ao.quantization import quantization_mappings

    class FromFused:
        """What makes torch's quantized module of ours: it takes torch's own only."""

        @classmethod
        def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> nn.Module:
            plain, fused = next(pair for pair in FUSED.items() if isinstance(mod, pair[1]))
            of_torch = object.__new__(swapped_class(type(mod), fused, plain))
            vars(of_torch).update(vars(mod))
            made: nn.Module = getattr(dynamic, plain.__name__).from_float(of_torch)
            return made

    for fused in FUSED.values():
        quantization_mappings.DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS[fused] = FromFused

    # Types are looked up exactly: who asks for torch's modules, as by default, asks for ours, too.
    propagate = quantize.propagate_qconfig_

    @wraps(propagate)
    def propagate_qconfig_(module: Any, qconfig_dict: Any = None, *rest: Any, **named: Any) -> Any:
        asked = qconfig_dict or {}
        also = {FUSED[plain]: asked[plain] for plain in FUSED if plain in asked}
        return propagate(module, also | asked if also else qconfig_dict, *rest, **named)

    quantize.propagate_qconfig_ = propagate_qconfig_
