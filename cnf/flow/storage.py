"""Models on disk: weights as safetensors, settings as JSON in its header; no code is run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cnf.error import InputError
from cnf.flow.base import LEARNED, LearnedBase
from cnf.flow.divergence import ClosedForm, Hutchinson, Tangents
from cnf.ode.gradient.adjoint import Adjoint
from cnf.ode.gradient.backprop import Backprop
from cnf.ode.gradient.checkpoint import Checkpoint
from cnf.ode.gradient.reversible import Reversible
from cnf.ode.tableau import Tableau
from cnf.replace import replacing

FORMAT = 2  # of the file; raised when an older reader would misread it
ADDED = (".sines",)  # endings of names that older files lack: the settings say the same
VALUES = {
    kind.__name__: kind
    for kind in (
        ClosedForm,
        Tangents,
        Hutchinson,
        Backprop,
        Checkpoint,
        Adjoint,
        Reversible,
        Tableau,
    )
}
KINDS: dict[str, Any] = {**VALUES, **LEARNED}


class Model(NamedTuple):
    """What kind of model a file holds, for the sentences of its errors.

    maker: what writes such files; again: how to make another; mismatch: why one may not fit.
    """

    name: str
    maker: str
    again: str
    mismatch: str


FLOW = Model("flow", "flow.save", "fit again", "was it saved with another field= or base=?")


class Stored(NamedTuple):
    """What a file holds: the settings that make the model, and tensors by name."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor]


def pack(name: str, value: Any) -> Any:
    """A setting as JSON: a plain value as it is, a known frozen value as its kind and fields."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, LearnedBase):
        return {"kind": type(value).__name__, **value.settings}
    if type(value).__name__ in VALUES:
        return {"kind": type(value).__name__, **asdict(value)}
    raise InputError(
        f"{name}={value!r} is of your own making and cannot be stored with the flow; store it "
        f"with one of {', '.join(VALUES)}, or a name"
    )


def unpack(value: Any) -> Any:
    """A setting from JSON, the inverse of `pack`."""
    if isinstance(value, Mapping) and "kind" in value:
        fields = {key: part for key, part in value.items() if key != "kind"}
        return KINDS[value["kind"]](**fields)
    return value


def write(
    path: str | os.PathLike[str],
    module: nn.Module,
    settings: Mapping[str, Any],
    model: Model = FLOW,
) -> None:
    """Write a module's tensors and its settings, atomically.

    Raises InputError where the folder does not exist or cannot be written.
    """
    # copies: weights that a field ties would share memory, which the format has no words for
    tensors = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in module.state_dict().items()
    }
    header = json.dumps({"format": FORMAT, **settings})
    target = Path(path)
    try:
        with replacing(target) as file:
            file.write(save(tensors, {"cnf": header}))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"the {model.name} cannot be written to {target} ({reason}); name a file in a folder "
            "that exists and is yours to write"
        ) from error


def read(path: str | os.PathLike[str], model: Model = FLOW) -> Stored:
    """What a file of `write` holds; raises InputError for any other file."""
    target = Path(path)
    if os.path.isdir(target):
        raise InputError(f"{target} is a folder; give the model file in it")
    if not os.path.exists(target):
        raise InputError(f"there is no file {target}; give the path that {model.maker} wrote")
    try:
        with safe_open(target, framework="pt") as file:
            header = (file.metadata() or {}).get("cnf")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        settings = json.loads(header) if header else None
    except PermissionError as error:
        raise InputError(f"{target} cannot be read ({error.strerror}); is it yours?") from error
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise damaged(target, model) from error
    if not isinstance(settings, dict) or "format" not in settings:
        raise damaged(target, model)
    if settings["format"] != FORMAT:
        raise InputError(
            f"{target} has format {settings['format']!r}, this version reads format {FORMAT}; "
            "install the version that wrote it"
        )
    if _asks_for_too_much(settings, sum(tensor.numel() for tensor in tensors.values())):
        raise damaged(target, model)
    try:
        unpacked = {k: unpack(v) for k, v in settings.items() if k != "format"}
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(target, model) from error
    return Stored(unpacked, tensors)


def _asks_for_too_much(settings: Mapping[str, Any], stored: int) -> bool:
    """Whether a flow of these settings has more of something than the file has numbers.

    Such a flow is not even made: a damaged width could fill the memory.
    """
    widths = () if settings.get("own_field") else settings.get("hidden")
    base = settings.get("base")
    sizes = [settings.get("dim"), settings.get("context")]
    sizes += list(widths) if isinstance(widths, list) else []
    sizes += [base.get("dim"), base.get("components")] if isinstance(base, Mapping) else []
    return any(isinstance(size, int) and size > stored for size in sizes)


def damaged(path: str | os.PathLike[str], model: Model = FLOW) -> InputError:
    """What is said of a file that no model can be made of."""
    return InputError(
        f"{path} is damaged or is no file that {model.maker} wrote; restore it or {model.again}"
    )


def fill(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    model: Model = FLOW,
) -> None:
    """Put stored tensors into a module of the same settings.

    Raises InputError where names or shapes differ, or a value is not finite.
    """
    expected = module.state_dict()
    missing = {name for name in expected.keys() - tensors.keys() if not name.endswith(ADDED)}
    unknown = tensors.keys() - expected.keys()
    if missing or unknown:
        raise InputError(
            f"{path} does not fit the {model.name}: missing {sorted(missing)[:3]}, unknown "
            f"{sorted(unknown)[:3]}; {model.mismatch}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise InputError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(expected[name].shape)}; {model.mismatch}"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{path}: {name} holds values that are not finite; {model.again}")
    module.load_state_dict(dict(tensors))
