"""What TorchScript compiles in the place of Python that it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["scripted_as"]

F = TypeVar("F", bound=Callable[..., Any])


def scripted_as(source: Callable[..., Any]) -> Callable[[F], F]:
    """Python runs what is decorated, and TorchScript compiles ``source``, an equivalent that it has
    the words for: it reads a function's source as :mod:`inspect` does, which looks for
    ``__wrapped__``. Names in ``source`` are looked up where the decorated function is."""

    def decorate(function: F) -> F:
        function.__wrapped__ = source  # type: ignore[attr-defined]
        return function

    return decorate
