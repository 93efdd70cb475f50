"""What other parts of torch, and other libraries, have to be told of the operators.

Each is told when it is imported, or at once where it is there already: `import lstmfused` imports
none of them.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

__all__ = ["register"]

# Module: who tells it, a function here that is called with it.
_LISTENERS = {
    "fvcore.nn.flop_count": "flops.fvcore",
    "ptflops.aten_ops": "flops.ptflops_operators",
    "ptflops.pytorch_ops": "flops.ptflops_modules",
    "thop.profile": "flops.thop",
    "torch._dynamo.trace_rules": "dynamo.register_rules",
    "torch._dynamo.variables.builder": "dynamo.register",
    "torch.ao.quantization.quantize": "quantization.register",
    "torch.distributed.tensor": "sharding.register",
    "torch.onnx": "onnx.register",
    "torch.onnx._internal.exporter._decomp": "decompositions.register",
    "torch.utils.flop_counter": "flops.register",
}


def _tell(name: str) -> None:
    where, _, what = _LISTENERS[name].rpartition(".")
    try:
        getattr(import_module(f"{__name__}.{where}"), what)(sys.modules[name])
    except Exception as error:  # of another version than those known: its import is not our matter
        warnings.warn(f"lstmfused could not register with {name}: {error!r}", stacklevel=2)


class _WhenImported(MetaPathFinder):
    """Finds nothing itself: has the loader of a module in `_LISTENERS` tell it, once executed."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name not in _LISTENERS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        loader: Any = spec and spec.loader
        if loader is not None:
            loader.exec_module = _then_tell(loader.exec_module, name)
        return spec


def _then_tell(execute: Callable[[Any], None], name: str) -> Callable[[Any], None]:
    def exec_module(module: Any) -> None:
        execute(module)
        if module.__name__ == name:  # some loaders, zipimport's for one, load several modules
            _tell(name)

    return exec_module


def register() -> None:
    for name in _LISTENERS:
        if name in sys.modules:
            _tell(name)
    sys.meta_path.insert(0, _WhenImported())
