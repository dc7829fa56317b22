"""Figure 3 of Chen et al. 2018: what accuracy costs in a trained ODE-Net."""

from __future__ import annotations

import copy
import json
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnf.cli.device import usable_device
from cnf.cli.finished import SOLVER, finished, given
from cnf.cli.folder import STEPS
from cnf.cli.mnist.classifier import read_classifier
from cnf.cli.training import tell
from cnf.error import InputError
from cnf.odenet.network import ODENet
from cnf.odenet.recipe import images_of, split
from cnf.plot import cost_figure, save_figure

TOLERANCES = [10.0 ** (-k / 2) for k in range(2, 11)]
IMAGES = 128
ROUNDS, QUICK_ROUNDS = 5, 2  # of every time, of which the median is told
DRAWN = 400  # points of the course of training


def costs(out: Path, arguments: Namespace) -> dict[str, Any]:
    """Error, time and backward evaluations against forward evaluations, and the last over training.

    Of the run in --run; without it a net is trained first, with dopri5 at 1e-3 and the adjoint,
    unless the folder holds one.
    """
    folder = _run_folder(out, arguments)
    net, settings, _ = read_classifier(folder)
    if not isinstance(net, ODENet):
        raise InputError(f"the net in {folder} has no ODE; name a run of --net odenet")
    device = usable_device(arguments.device)
    data = images_of(settings.dataset, arguments.data, not arguments.data)
    images = split(data, settings.validation, settings.seed).validation_images[:IMAGES]
    with torch.no_grad():
        features = net.to(device).features(images.to(device))
    tell(arguments, "solving to the end in double precision")
    exact = _exact(net, features)
    measured = []
    for rtol in TOLERANCES[:: 2 if arguments.quick else 1]:
        rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
        measured.append(_cost(net, features, exact, rtol, rounds))
        tell(arguments, _told(measured[-1]))
    records = [one for one in _records(folder / STEPS) if one["nfe"] is not None]
    thinned = records[:: max(1, len(records) // DRAWN)]
    trained = [(one["step"], one["nfe"], one["nfe_backward"]) for one in thinned]
    path = save_figure(cost_figure(measured, trained), out / "fig3.png")
    tell(arguments, f"drawn in {path}")
    if not arguments.json:
        print("\n".join(map(_told, measured)))
    return {"figure": str(path), "run": str(folder), "costs": measured, "training": trained}


def _run_folder(out: Path, arguments: Namespace) -> Path:
    if arguments.run is not None:
        return Path(arguments.run)
    told = given(arguments, *SOLVER, "--gradient", "adjoint")
    finished(out / "odenet", told, arguments)
    return out / "odenet"


@torch.no_grad()
def _exact(net: ODENet, features: Tensor) -> Tensor:
    """Where the ODE ends, in double precision, to which the tolerances are compared.

    A hundredth of the smallest is enough, and kinks make less of it long.
    """
    block = copy.deepcopy(net.block).double()
    block.gradient = "checkpoint"
    with block.using(method="dopri5", rtol=1e-7):
        return block(features.double())


def _cost(
    net: ODENet, features: Tensor, exact: Tensor, rtol: float, rounds: int
) -> dict[str, float]:
    """What one solve of the block costs at a tolerance, and how far it is off."""
    block, seconds = net.block, []
    with block.using(method="dopri5", rtol=rtol, gradient="adjoint"):
        with torch.no_grad():
            for _ in range(rounds):
                seconds.append(_seconds(lambda: block(features), features.device))
        start = features.clone().requires_grad_()
        end = block(start)
        (end / end.detach().norm()).square().sum().backward()
        assert block.stats is not None
        return {
            "rtol": rtol,
            "nfe": block.stats.nfe,
            "nfe_backward": block.stats.nfe_backward,
            "seconds": statistics.median(seconds),
            "error": ((end.detach() - exact).norm() / exact.norm()).item(),
        }


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _told(one: dict[str, float]) -> str:
    return (
        f"rtol {one['rtol']:.0e}: {one['nfe']} evaluations, {one['nfe_backward']} backward, "
        f"{one['seconds']:.3f} s, relative error {one['error']:.1e}"
    )


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a run's steps."""
    try:
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)
    except ValueError as error:
        raise InputError(f"{path} is damaged; name another --run, or train it again") from error
