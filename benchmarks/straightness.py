"""What straight paths cost and save: likelihood against evaluations of the field.

    python benchmarks/straightness.py [--out FOLDER] [--sets moons …] [--ways …] [--steps 6000]
    python benchmarks/straightness.py [--out FOLDER] --table

The same flow is fitted in several ways to a law that is drawn from anew for every batch, each for
as many steps.  Then, at the flow's own tolerance for evaluation (dopri5, rtol and atol 1e-5, 1e-4
nats of the log-determinant a step): the paired gap to the true density on 10,000 fresh points,
with its standard error; evaluations of log_prob and of sampling on 1,000 points, with steps that
all rows share and, in the mean, with steps of each row's own, as `log_prob` and `sample` take them;
and the kinetic energy of the paths.  Then, with a budget of evaluations in the tolerance's place,
the fewest with which log-densities are off by 0.01 nats in the mean and samples by 0.01 standard
deviations, by the best of four methods.  None of them depends on how busy the machine is.  A
"smooth field" has no sines and one wave of time; "mild" is a kinetic weight of 0.05 and a
Jacobian's of 0.005, "strong" four times as much.

A run can be stopped and started again: each (set, way, seed) is a line of results.jsonl in --out,
and its flow a file beside it.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import machine
from torch import Tensor

import cnf
from cnf.data.density import TOY_NAMES, Toy
from cnf.flow.continuous import Solver
from cnf.flow.regularizer import Regularized
from cnf.training.seed import seeded

FRESH, LOOKED_AT = 10_000, 1_000
LIKELIHOOD_SHARE = 0.1  # of the steps, where maximum likelihood follows flow matching
GOOD = 0.01  # nats, and standard deviations of the data
BUDGETS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128, 192, 256)
RESULTS = "results.jsonl"
Stage = dict[str, Any]  # arguments of a fit, its steps as a share of the whole


def matched(**settings: Any) -> Stage:
    return {"method": "fm", "share": 1 - LIKELIHOOD_SHARE, "batch_size": 1024, **settings}


def likely(share: float = LIKELIHOOD_SHARE, lr: float = 1e-3, **weights: float) -> Stage:
    regularizer = cnf.Regularizer(**weights)
    return {"method": "ml", "share": share, "lr": lr, "batch_size": 512, "regularizer": regularizer}


class Way(NamedTuple):
    """The stages of a training; the bandwidth of the field's sines, (low, high) or None for none;
    and the waves of time that shifts and gates are made of.
    """

    stages: tuple[Stage, ...]
    bandwidth: tuple[float, float] | None = (0.5, 6.0)
    waves: int = 4


MILD, STRONG = {"kinetic": 0.05, "jacobian": 0.005}, {"kinetic": 0.2, "jacobian": 0.02}
WAYS: dict[str, Way] = {
    "ML": Way((likely(1.0, 2e-3),)),
    "ML, kinetic": Way((likely(1.0, 2e-3, kinetic=0.05),)),
    "ML, mild": Way((likely(1.0, 2e-3, **MILD),)),
    "FM": Way((matched(share=1.0),)),
    "FM with OT": Way((matched(share=1.0, coupling="ot"),)),
    "FM, then ML": Way((matched(), likely())),
    "FM with OT, then ML": Way((matched(coupling="ot"), likely())),
    "FM with OT, then ML, mild": Way((matched(coupling="ot"), likely(**MILD))),
    "FM with OT, then ML, strong": Way((matched(coupling="ot"), likely(**STRONG))),
    "smooth field, FM, then ML": Way((matched(), likely()), None, 1),
    "smooth field, FM with OT, then ML, mild": Way(
        (matched(coupling="ot"), likely(**MILD)), None, 1
    ),
    "smooth field, FM with OT, then ML, strong": Way(
        (matched(coupling="ot"), likely(**STRONG)), None, 1
    ),
}


def fitted(law: Toy, way: str, arguments: argparse.Namespace, seed: int) -> cnf.Flow:
    """The flow, after all stages of the way."""
    stages, bandwidth, waves = WAYS[way]
    with seeded(seed, torch.device("cpu")):
        field = cnf.nets.BilinearMLP(2, arguments.hidden, bandwidth=bandwidth, frequencies=waves)
    flow = cnf.Flow(2, field=field)
    for stage in stages:
        settings = {name: value for name, value in stage.items() if name != "share"}
        steps = max(1, round(stage["share"] * arguments.steps))
        flow.fit(law, steps=steps, seed=seed, progress=False, **settings)
    return flow


def measured(law: Toy, flow: cnf.Flow) -> dict[str, float]:
    """Gap, kinetic energy and evaluations of a flow, by name."""
    with seeded(10_000, torch.device("cpu")):  # no seed of a training
        fresh = law.sample((FRESH,))
    with torch.no_grad():
        gaps = (law.log_prob(fresh) - flow.log_prob(fresh)).double()
        found = {"gap": gaps.mean().item(), "error": gaps.std().item() / FRESH**0.5}
        for name, per_sample in (("shared", False), ("own", True)):
            control = replace(flow.solver.control, per_sample=per_sample)
            solver = replace(flow.solver, control=control)
            to_base, to_data, energy = evaluations(flow, fresh[:LOOKED_AT], solver)
            found |= {f"log_prob, {name}": to_base, f"sample, {name}": to_data}
        found |= least_budgets(flow, fresh[:LOOKED_AT])
    return found | {"energy": energy}


def least_budgets(flow: cnf.Flow, x: Tensor) -> dict[str, float]:
    """The fewest evaluations that are good enough for log_prob and for sampling, inf for none."""
    settings = flow.tradeoff(x, nfe=BUDGETS).settings[:-1]  # the last is the tolerance's
    of_log_prob = [one.nfe for one in settings if one.log_prob_error <= GOOD]
    of_samples = [one.nfe for one in settings if one.sample_error <= GOOD]
    return {
        "log_prob, budget": min(of_log_prob, default=math.inf),
        "sample, budget": min(of_samples, default=math.inf),
    }


def evaluations(flow: cnf.Flow, x: Tensor, solver: Solver) -> tuple[float, float, float]:
    """Evaluations a row needs to the base and to the data, and the paths' kinetic energy."""
    kinetic, given = cnf.Regularizer(kinetic=1.0), flow.conditioned()
    divergence = Regularized(flow.chosen_divergence(), kinetic)
    _, moved = flow.carry_to_base(x, divergence, solver, given)
    z = flow.draw_base(len(x), 0)
    way = {"method": solver.method, "control": solver.control}
    back = cnf.solve(given.field, z, (0.0, 1.0), **way)
    to_base, to_data = (torch.as_tensor(s.nfe).double().mean() for s in (moved.stats, back.stats))
    energy = kinetic.measured(moved.along, -1.0)["kinetic"]
    return to_base.item(), to_data.item(), energy.item()


def table(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Means over seeds, a line for each set and way."""
    columns = ("shared", "own", "budget")
    heads = (f"{what}, {' | '.join(columns)}" for what in ("log p", "sample"))
    print(f"| data | training | gap, nats | {' | '.join(heads)} | energy |")
    print("|---" * 10 + "|")
    for name in arguments.sets:
        for way in arguments.ways:
            found = [row for row in rows if (row["set"], row["way"]) == (name, way)]
            if not found:
                print(f"missing: {name}, {way}")
                continue
            mean = {
                key: sum(row[key] for row in found) / len(found)
                for key, value in found[0].items()
                if key not in ("set", "way", "seed", "steps", "hidden")
            }
            counts = " | ".join(
                f"{mean[f'{what}, {steps}']:.0f}"
                for what in ("log_prob", "sample")
                for steps in columns
            )
            gap = f"{mean['gap']:.4f} ± {mean['error'] / len(found) ** 0.5:.4f}"
            print(f"| {name} | {way} | {gap} | {counts} | {mean['energy']:.2f} |")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/straightness", help="folder of the results")
    parser.add_argument("--sets", nargs="+", default=["moons", "8gaussians"], choices=TOY_NAMES)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--hidden", nargs="+", type=int, default=[64, 64])
    parser.add_argument("--table", action="store_true", help="print what was measured")
    arguments = parser.parse_args()
    path = Path(arguments.out) / RESULTS
    if arguments.table:
        table(rows_of(path), arguments)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    settings = {"steps": arguments.steps, "hidden": arguments.hidden}
    done = [(row["set"], row["way"], row["seed"]) for row in rows_of(path)]
    for seed in arguments.seeds:
        for name in arguments.sets:
            for way in arguments.ways:
                if (name, way, seed) in done:
                    continue
                law = cnf.data.toy(name)
                row = {"set": name, "way": way, "seed": seed, **settings}
                flow = fitted(law, way, arguments, seed)
                flow.save(path.parent / f"{name}-{list(WAYS).index(way)}-{seed}.safetensors")
                row |= measured(law, flow)
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
