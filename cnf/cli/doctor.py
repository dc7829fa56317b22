"""`cnf doctor`: what is installed, what computes here, where data are, and whether cnf works.

The self-test compares with formulas: no part of cnf is judged by another part of it.
"""

from __future__ import annotations

import math
import os
import platform
import re
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnf import __version__
from cnf.cli.device import usable_device
from cnf.cli.folder import json_text
from cnf.data.idx import SETS, VARIABLE, cache_folder, where
from cnf.error import InstallationError
from cnf.flow.flow import Flow
from cnf.ode.solution import solve

NEEDED = ("torch", "numpy", "scipy", "scikit-learn", "matplotlib", "safetensors", "tqdm")
OPTIONAL = ("pandas", "pyro-ppl", "tensorboard", "torchdiffeq")
BOUND = 1e-4  # of an error that rounding and tolerance explain, in single precision as well


@dataclass(frozen=True)
class Trial:
    """One part of the self-test: how far off the answer was, and how far it may be."""

    name: str
    error: float
    bound: float = BOUND

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # not where it is NaN


def run(arguments: Namespace) -> None:
    """Print the report.  Raises InstallationError where something in it is wrong."""
    found = report(usable_device(arguments.device))
    print(json_text(found, indent=2) if arguments.json else "\n".join(_lines(found)))
    if found["faults"]:
        raise InstallationError(". ".join(found["faults"]))


def report(device: torch.device) -> dict[str, Any]:
    """All that is known of this installation; under "faults" a sentence for each."""
    start = time.perf_counter()
    trials, faults = _tried(device)
    packages = {name: _version(name) for name in NEEDED}
    return {
        "versions": {
            "cnf": __version__,
            "python": platform.python_version(),
            "system": platform.platform(),
            **packages,
            "torch": torch.__version__,  # with what it was built for
        },
        "optional": {name: _version(name) for name in OPTIONAL},
        "devices": devices(),
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count()},
        "data": _data(),
        "self_test": [asdict(trial) | {"passed": trial.passed} for trial in trials],
        "device": str(device),
        "seconds": time.perf_counter() - start,
        "faults": [*_missing(packages), *_misplaced(), *faults],
    }


# --- what is there --------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    """The version that is installed, None where none is."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _missing(packages: dict[str, str | None]) -> Iterator[str]:
    """A sentence for each package that is needed and not there, or too old."""
    for name, version in packages.items():
        least = _least(name)
        if version is None:
            yield f"{name} is not installed; pip install {name}"
        elif least is not None and _numbers(version) < _numbers(least):
            yield f"{name} is {version}, but cnf needs {least}; pip install --upgrade {name}"


def _least(package: str) -> str | None:
    """The least version that cnf asks for, None where that is not known."""
    try:
        asked = metadata.requires("cnf-torch") or []
    except metadata.PackageNotFoundError:  # run from its sources
        return None
    found = (re.match(rf"{re.escape(package)}>=([\d.]+)", one) for one in asked)
    return next((match.group(1) for match in found if match), None)


def _numbers(version: str) -> tuple[int, ...]:
    """Its first three numbers: 2.13.0+cpu is (2, 13, 0)."""
    found = re.match(r"[\d.]*", version)
    return tuple(int(part) for part in (found.group() if found else "").split(".") if part)[:3]


def devices() -> dict[str, str]:
    """What torch can compute on here: the device's name for torch, and its maker's."""
    found = {"cpu": platform.processor() or platform.machine()}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            found[f"cuda:{i}"] = torch.cuda.get_device_name(i)
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    return found


def _data() -> dict[str, Any]:
    """Where sets of images are looked for, and the folder of each, None where it is in none."""
    folders: dict[str, str | None] = {}
    for name in SETS:
        folder = where(name)
        folders[name] = None if folder is None else str(folder)
    return {VARIABLE: os.environ.get(VARIABLE), "cache": str(cache_folder()), **folders}


def _misplaced() -> Iterator[str]:
    given = os.environ.get(VARIABLE)
    if given and not Path(given).is_dir():
        yield f"{VARIABLE} names {given}, which is no folder; correct or unset it"


# --- the self-test --------------------------------------------------------------------------------


def _tried(device: torch.device) -> tuple[list[Trial], list[str]]:
    """The outcome of each trial, and a sentence for each that failed."""
    trials, faults = [], []
    for name, trial in TRIALS.items():
        try:
            done = Trial(name, trial(device))
        except Exception as error:  # whatever a broken installation raises
            done = Trial(name, math.nan)
            faults.append(f"the self-test of the {name} stopped ({error!r}); {_AGAIN}")
        else:
            if not done.passed:
                faults.append(f"the self-test of the {name} is off by {done.error:.1e}; {_AGAIN}")
        trials.append(done)
    return trials, faults


_AGAIN = "install cnf and torch again, or try --device cpu"


def _solver_error(device: torch.device) -> float:
    """Of y' = -2 t y, whose solution is exp(-t²)."""
    y0 = torch.ones(3, device=device)
    y = solve(lambda t, y: -2 * t * y, y0, [0.0, 1.0], rtol=1e-6, atol=1e-7).y[-1]
    return float((y - math.exp(-1)).abs().max())


def _gradient_error(device: torch.device) -> float:
    """Of y' = a y: dy(1)/da = exp(a), for a = 1/2."""
    a = torch.tensor(0.5, device=device, requires_grad=True)
    y = solve(lambda t, y: a * y, torch.ones(1, device=device), [0.0, 1.0], rtol=1e-6).y[-1]
    (found,) = torch.autograd.grad(y.sum(), a)
    return abs(float(found) - math.exp(0.5))


class _Growth(nn.Module):
    """x' = x / 2, which carries a standard normal to a normal of standard deviation exp(1/2)."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.rate * x


@torch.no_grad()
def _log_prob_error(device: torch.device) -> float:
    """Of a flow whose density is normal."""
    flow = Flow(2, field=_Growth(), whiten=False, rtol=1e-6, atol=1e-7).to(device)
    x = torch.tensor([[0.0, 0.0], [1.0, -2.0]], device=device)
    exact = -(x**2).sum(1) / (2 * math.e) - 1 - math.log(2 * math.pi)
    return float((flow.log_prob(x) - exact).abs().max())


TRIALS: dict[str, Callable[[torch.device], float]] = {
    "solver": _solver_error,
    "gradient": _gradient_error,
    "log_prob": _log_prob_error,
}


# --- in words -------------------------------------------------------------------------------------


def _lines(found: dict[str, Any]) -> list[str]:
    threads, data = found["threads"], found["data"]
    tests = [
        (one["name"], f"{'passed' if one['passed'] else 'FAILED'}, off by {one['error']:.1e}")
        for one in found["self_test"]
    ]
    torch_threads = f"{threads['torch']} of {threads['cores']} cores"
    places = [(SETS[name].title, data[name] or "not found, would be downloaded") for name in SETS]
    sections = (
        ("versions", [(name, version or "missing") for name, version in _items(found["versions"])]),
        ("optional", [(name, version or "-") for name, version in _items(found["optional"])]),
        ("computes on", [*_items(found["devices"]), ("threads", torch_threads)]),
        ("data", [(VARIABLE, data[VARIABLE] or "not set"), ("cache", data["cache"]), *places]),
        (f"self-test on {found['device']}, {found['seconds']:.1f} s", tests),
    )
    lines = [line for title, rows in sections for line in ("", title, *_rows(rows))][1:]
    return lines if found["faults"] else [*lines, "", "all is well"]


def _items(part: dict[str, Any]) -> list[tuple[str, Any]]:
    return list(part.items())


def _rows(rows: list[tuple[str, Any]]) -> list[str]:
    return [f"  {name:<16}{text}" for name, text in rows]
