"""Other libraries' interfaces on this core; `cnf.compat.torchdiffeq` is torchdiffeq's."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnf.compat import torchdiffeq as torchdiffeq

__all__ = ["torchdiffeq"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'cnf.compat' has no attribute {name!r}")
    return import_module(f"cnf.compat.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
