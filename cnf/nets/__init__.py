"""Vector fields f(t, x) made of layers; each name is loaded when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnf.nets.chain import Chain as Chain
    from cnf.nets.chain import Residual as Residual
    from cnf.nets.conditioning import ConcatLinear as ConcatLinear
    from cnf.nets.conditioning import ConcatSquashLinear as ConcatSquashLinear
    from cnf.nets.conditioning import FourierLinear as FourierLinear
    from cnf.nets.conditioning import HyperLinear as HyperLinear
    from cnf.nets.end_time import learned_end_time as learned_end_time
    from cnf.nets.mlp import MLP as MLP
    from cnf.nets.mlp import BilinearMLP as BilinearMLP
    from cnf.nets.planar import PlanarField as PlanarField
    from cnf.nets.potential import PotentialField as PotentialField
    from cnf.nets.timed import ResidualMLP as ResidualMLP
    from cnf.nets.timed import TimedMLP as TimedMLP
    from cnf.nets.unet import UNet as UNet

# public name → the module beside this file that holds it
_EXPORTS: dict[str, str] = {
    "MLP": "mlp",
    "BilinearMLP": "mlp",
    "Chain": "chain",
    "ConcatLinear": "conditioning",
    "ConcatSquashLinear": "conditioning",
    "FourierLinear": "conditioning",
    "HyperLinear": "conditioning",
    "PlanarField": "planar",
    "PotentialField": "potential",
    "Residual": "chain",
    "ResidualMLP": "timed",
    "TimedMLP": "timed",
    "UNet": "unet",
    "learned_end_time": "end_time",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value  # found without __getattr__ from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
