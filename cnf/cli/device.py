"""The device to compute on, tried before anything is read or written."""

from __future__ import annotations

import os
import platform

import torch

from cnf.error import InputError
from cnf.training.ranks import here


def usable_device(name: str | None) -> torch.device:
    """The device of that name, the CPU for None; "cuda" is a GPU for each of several ranks.

    Raises InputError if it is unknown or not there.
    """
    name = name or "cpu"
    try:
        device = torch.device(name)
        if name == "cuda" and here().world > 1:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    except RuntimeError as error:
        raise InputError(f"{name!r} is no device; use cpu, cuda, cuda:1 or mps") from error
    try:
        torch.ones(1, device=device).item()  # the meta device has no values, others no hardware
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise InputError(f"device {name!r} is not on this machine; try --device cpu") from error
    return device


def hardware(device: torch.device) -> str:
    """What computes there: a GPU's name, or the CPU's cores and how many threads work."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {threads} thread{'s'[: threads > 1]}"
    )
