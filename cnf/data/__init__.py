"""Data: toy sets with known densities, images and tables; each name is loaded when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnf.data.density import TOY_NAMES as TOY_NAMES
    from cnf.data.density import toy as toy
    from cnf.data.digits import bits_per_dim as bits_per_dim
    from cnf.data.digits import dequantize as dequantize
    from cnf.data.digits import load_digits as load_digits
    from cnf.data.idx import Images as Images
    from cnf.data.idx import mnist as mnist
    from cnf.data.table import Table as Table
    from cnf.data.table import read_table as read_table
    from cnf.data.table import write_table as write_table

# public name → the module beside this file that holds it
_EXPORTS: dict[str, str] = {
    "Images": "idx",
    "TOY_NAMES": "density",
    "Table": "table",
    "bits_per_dim": "digits",
    "dequantize": "digits",
    "load_digits": "digits",
    "mnist": "idx",
    "read_table": "table",
    "toy": "density",
    "write_table": "table",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value  # found without __getattr__ from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
