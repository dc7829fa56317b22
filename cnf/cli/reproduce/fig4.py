"""Figure 4 of Chen et al. 2018: planar normalizing flows of depth K against planar continuous flows
of width M, both fitted by reverse KL to densities that are known up to a constant.

Every fit that is finished stays in the folder, so that what was stopped goes on from there.
"""

from __future__ import annotations

import json
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from cnf.data.energy import ENERGIES, Energy
from cnf.error import InputError
from cnf.flow.flow import Flow
from cnf.flow.planar import ChainReverseKL, PlanarChain
from cnf.nets.planar import PlanarField
from cnf.plot import cell_centres, comparison_figure, histogram_log_density, save_figure
from cnf.replace import replacing
from cnf.training.loop import Best, Plan, train
from cnf.training.seed import seeded

SIZES = (2, 8, 32)
EXTENT = (-4.5, 4.5, -4.5, 4.5)
CELLS = 90
DRAWS = 20_000  # by which a flow is judged and drawn


@dataclass(frozen=True)
class Effort:
    """Steps of both kinds of flow, and draws of a step."""

    chain_steps: int
    flow_steps: int
    batch: int


FULL = Effort(10_000, 1_000, 512)
QUICK = Effort(1_500, 250, 128)


@dataclass(frozen=True)
class Fitted:
    """Draws of a fitted flow, (n, 2), and KL(q‖p) in nats."""

    draws: np.ndarray
    kl: float


def planar_flows(out: Path, arguments: Namespace) -> dict[str, Any]:
    """Draw what every flow made of every density; KL(q‖p) of each, in nats."""
    effort = QUICK if arguments.quick else FULL
    found: dict[str, dict[str, list[Fitted]]] = {}
    for name, energy in ENERGIES.items():
        log_z = energy.log_integral()
        found[name] = {"NF": [], "CNF": []}
        for size in SIZES:
            for kind in KINDS:
                fitted = _kept(out, kind, energy, size, effort, arguments.seed, log_z)
                found[name][kind].append(fitted)
                if not arguments.quiet:
                    told = f"{name}: {kind} of size {size}, KL {fitted.kl:.3f} nats"
                    print(told, file=sys.stderr)
    kl = {name: {kind: [f.kl for f in fits] for kind, fits in kinds.items()}
          for name, kinds in found.items()}  # fmt: skip
    path = save_figure(_picture(found), out / "fig4.png")
    if not arguments.json:
        print("\n".join([*_table(kl), str(path)]))
    return {"figure": str(path), "sizes": SIZES, "kl": kl, "quick": arguments.quick}


def _kept(
    out: Path, kind: str, energy: Energy, size: int, effort: Effort, seed: int, log_z: float
) -> Fitted:
    """The fit of that kind and size that the folder holds, made now where it holds none."""
    path = out / f"{energy.name.replace(' ', '-')}-{kind}-{size}.npz"
    settings = json.dumps({**asdict(effort), "draws": DRAWS, "seed": seed})
    if not path.exists():
        with seeded(seed, torch.device("cpu")):
            fitted = KINDS[kind](energy, size, effort, log_z)
        with replacing(path) as file:
            np.savez(file, draws=fitted.draws, kl=fitted.kl, settings=settings)
        return fitted
    try:
        with np.load(path) as found:
            draws, kl, made_with = (found[name] for name in ("draws", "kl", "settings"))
    except (OSError, ValueError, LookupError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged; remove it, and it is fitted again") from error
    if str(made_with) != settings:
        raise InputError(f"{path} was fitted with other settings; remove it, or give another --out")
    return Fitted(draws, float(kl))


def fit_chain(energy: Energy, depth: int, effort: Effort, log_z: float) -> Fitted:
    """A planar normalizing flow of that depth."""
    chain = PlanarChain(2, depth)
    objective = ChainReverseKL(chain, energy.log_prob)
    draws = torch.randn(DRAWS, 2)

    @torch.no_grad()
    def score() -> float:
        return objective(draws[:2000]).item()

    best, plan = Best(), Plan("kl", steps=effort.chain_steps, lr=2e-2, validations=20)
    for _ in train(
        objective, lambda: torch.randn(effort.batch, 2), plan, validate=score, best=best
    ):
        pass
    with torch.no_grad():
        for parameter, weight in zip(objective.parameters(), best.weights, strict=True):
            parameter.copy_(weight)
        return Fitted(chain(draws)[0].numpy(), objective(draws).item() + log_z)


def fit_flow(energy: Energy, width: int, effort: Effort, log_z: float) -> Fitted:
    """A planar continuous flow of that width."""
    flow = Flow(2, field=PlanarField(2, width), rtol=1e-4, atol=1e-4, logdet_atol=1e-3)
    flow.fit_to_density(
        energy.log_prob, steps=effort.flow_steps, batch_size=effort.batch, lr=2e-2, progress=False
    )
    x, log_q = flow.sample(DRAWS, return_log_prob=True)
    return Fitted(x.numpy(), (log_q - energy.log_prob(x)).mean().item() + log_z)


KINDS: dict[str, Callable[[Energy, int, Effort, float], Fitted]] = {
    "NF": fit_chain,
    "CNF": fit_flow,
}


def _picture(found: dict[str, dict[str, list[Fitted]]]) -> Figure:
    columns = ["target", *(f"NF, K = {k}" for k in SIZES), *(f"CNF, M = {m}" for m in SIZES)]
    grids, captions = [], []
    for name, kinds in found.items():
        fits = [*kinds["NF"], *kinds["CNF"]]
        target = _grid(ENERGIES[name])
        grids.append(
            [target, *(histogram_log_density(fit.draws, EXTENT, CELLS // 2) for fit in fits)]
        )
        captions.append(["", *(f"KL {fit.kl:.3f}" for fit in fits)])
    return comparison_figure(grids, EXTENT, columns, list(found), captions)


def _grid(energy: Energy) -> np.ndarray:
    at: Tensor = torch.from_numpy(cell_centres(EXTENT, CELLS))
    return energy.log_prob(at).numpy().reshape(CELLS, CELLS)


def _table(kl: dict[str, dict[str, list[float]]]) -> list[str]:
    heads = [f"{kind} {size}" for kind in ("NF", "CNF") for size in SIZES]
    lines = [f"{'KL(q‖p), nats':<16}" + "".join(f"{head:>9}" for head in heads)]
    for name, kinds in kl.items():
        values = [*kinds["NF"], *kinds["CNF"]]
        lines.append(f"{name:<16}" + "".join(f"{value:9.3f}" for value in values))
    return lines
