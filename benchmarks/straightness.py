"""What straight paths cost and save: likelihood against evaluations of the field.

    python benchmarks/straightness.py [--seconds 40] [--sets moons 8gaussians]

Fits the same flow to the same rows in several ways, each for as long, and prints for each the
paired gap to the true density on 10,000 fresh points (nats, with its standard error), the
evaluations of a log_prob of 1,000 points with steps that all share, at the flow's own tolerance,
and the kinetic energy of the paths.
"""

from __future__ import annotations

import argparse

import torch
from timing import machine

import cnf
from cnf.flow.regularizer import Regularized
from cnf.training.seed import seeded

ROWS, FRESH = 200_000, 10_000
WAYS = {
    "maximum likelihood": {"method": "ml"},
    "ML, kinetic 0.01": {"method": "ml", "regularizer": cnf.Regularizer(kinetic=0.01)},
    "ML, kinetic 0.05": {"method": "ml", "regularizer": cnf.Regularizer(kinetic=0.05)},
    "ML, kinetic and Jacobian 0.01": {
        "method": "ml",
        "regularizer": cnf.Regularizer(kinetic=0.01, jacobian=0.01),
    },
    "flow matching": {"method": "fm"},
    "flow matching, OT": {"method": "fm", "coupling": "ot"},
    "auto": {},
    "auto, OT, kinetic 0.01": {"coupling": "ot", "regularizer": cnf.Regularizer(kinetic=0.01)},
}


def measured(law: object, seconds: float, way: dict) -> tuple[float, float, int, float]:
    """(gap, its standard error, evaluations, kinetic energy) of a flow fitted in that way."""
    with seeded(0, torch.device("cpu")):
        x, fresh = law.sample((ROWS,)), law.sample((FRESH,))
    flow = cnf.Flow(2, hidden=(128, 128), bandwidth=(0.5, 6.0), seed=0)
    flow.fit(x, seconds=seconds, seed=0, progress=False, **way)
    with torch.no_grad():
        gaps = (law.log_prob(fresh) - flow.log_prob(fresh)).double()
        kinetic = cnf.Regularizer(kinetic=1.0)
        divergence = Regularized(flow.chosen_divergence(), kinetic)
        _, moved = flow.carry_to_base(fresh[:1000], divergence, flow.solver)
    energy = kinetic.measured(moved.along, -1.0)["kinetic"].item()
    return gaps.mean().item(), gaps.std().item() / FRESH**0.5, moved.stats.calls, energy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--sets", nargs="+", default=["moons", "8gaussians"])
    arguments = parser.parse_args()
    print(machine(), flush=True)
    print("| data | training | gap, nats | evaluations | kinetic energy |\n|---|---|---|---|---|")
    for name in arguments.sets:
        for way, settings in WAYS.items():
            gap, error, nfe, energy = measured(cnf.data.toy(name), arguments.seconds, settings)
            print(
                f"| {name} | {way} | {gap:.4f} ± {error:.4f} | {nfe} | {energy:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
