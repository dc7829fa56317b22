"""Accuracy over the solver, and what the kinetic energy does to the evaluations.

    python benchmarks/grids.py [--dataset mnist] [--data FOLDER] [--epochs 3] [--seed 0]

First, nets that are trained with a coarse grid, a fine one and adaptive steps, each judged with all
of these solvers.  A net that is an ODE is as good with a finer solver as with its own; one that
needs its grid is marked (*), by the test of `cnf mnist classify`.  Second, nets trained with more
and more weight on the kinetic energy: their error, and the evaluations that dopri5 needs for them.
The quick preset but for the solver and the epochs; errors are those on the images held back, 5,000
of MNIST and 270 of the digits (--dataset digits, 60 epochs).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from timing import machine

from cnf.odenet.classification import FINE, depends_on_solver, judge, judge_solvers
from cnf.odenet.network import ODENet
from cnf.odenet.recipe import ImageTraining, Split, build, images_of, split
from cnf.odenet.settings import Settings, chosen
from cnf.training.seed import seeded

TRAINED: dict[str, dict[str, Any]] = {
    "euler, 2": {"method": "euler", "nfe": 2},
    "midpoint, 4": {"method": "midpoint", "nfe": 4},
    "rk4, 16": {"method": "rk4", "nfe": 16},
    "dopri5, 1e-3": {"method": "dopri5", "rtol": 1e-3},
}
JUDGED = TRAINED | {FINE: {"method": "dopri5", "rtol": 1e-5}}
WEIGHTS = (0.0, 0.01, 0.03, 0.1, 0.3)
ENERGY_SOLVER = {"method": "midpoint", "nfe": 8}
TOLERANCES = (1e-3, 1e-5)


def trained(settings: Settings, parts: Split) -> ODENet:
    """A net with its best weights."""
    with seeded(settings.seed, torch.device("cpu")):
        net = build(settings, parts.shape, parts.classes)
        assert isinstance(net, ODENet)
        training = ImageTraining(net, parts, settings)
        for _ in training:
            pass
        training.select()
    return net


def grids(settings: Settings, parts: Split) -> None:
    print("\nvalidation error %, trained with (down) and judged with (across)")
    print(f"{'':16s}" + "".join(f"{name:>14s}" for name in JUDGED), flush=True)
    images, labels = parts.validation_images, parts.validation_labels
    for name, solver in TRAINED.items():
        net = trained(settings.changed(**solver), parts)
        own = judge(net, images, labels)
        cells = ""
        for other, one in judge_solvers(net, images, labels, JUDGED):
            marked = other != name and depends_on_solver(own, one, labels)
            cells += f"{100 * one.error:13.2f}{'*' if marked else ' '}"
        print(f"{name:16s}{cells}", flush=True)


def energies(settings: Settings, parts: Split) -> None:
    print(f"\nkinetic energy, trained with midpoint, {ENERGY_SOLVER['nfe']} evaluations")
    heads = ("weight", "error %", *(f"NFE at {rtol:.0e}" for rtol in TOLERANCES))
    print("".join(f"{head:>14s}" for head in heads), flush=True)
    images, labels = parts.validation_images, parts.validation_labels
    solvers: Mapping[str, Mapping[str, Any]] = {
        f"{rtol}": {"method": "dopri5", "rtol": rtol} for rtol in TOLERANCES
    }
    for weight in WEIGHTS:
        net = trained(settings.changed(**ENERGY_SOLVER, energy=weight), parts)
        error = judge(net, images, labels).error
        spent = [one.nfe for _, one in judge_solvers(net, images, labels, solvers)]
        cells = "".join(f"{count:14.1f}" for count in spent)
        print(f"{weight:14g}{100 * error:14.2f}{cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--data", help="the folder that holds the IDX files")
    parser.add_argument("--epochs", type=int, help="times through the images (3; 60 of digits)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("grids", "energies"))
    arguments = parser.parse_args()
    epochs = arguments.epochs or (60 if arguments.dataset == "digits" else 3)
    given = {"dataset": arguments.dataset, "epochs": epochs, "seed": arguments.seed}
    settings = chosen("quick", given)
    data = images_of(settings.dataset, arguments.data, not arguments.data)
    parts = split(data, settings.validation, settings.seed)
    print(machine(), flush=True)
    if arguments.only != "energies":
        grids(settings, parts)
    if arguments.only != "grids":
        energies(settings, parts)


if __name__ == "__main__":
    main()
