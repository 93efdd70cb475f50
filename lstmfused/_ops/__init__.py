"""The operators: the extension that has them, and what is registered with them from Python."""

from . import fake, vmap  # noqa: F401  # to register
from .load import _C, build_info

__all__ = ["_C", "build_info"]
