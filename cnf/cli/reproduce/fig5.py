"""Figure 5 of Chen et al. 2018: two circles and two moons, densities and samples over time.

A flow that is fitted stays in the folder, so that what was stopped goes on with the other.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from cnf.cli.folder import read_json
from cnf.data.density import Toy, toy
from cnf.error import InputError
from cnf.flow.course import log_density_at, paths
from cnf.flow.flow import Flow
from cnf.flow.report import mean_and_error
from cnf.plot import (
    cell_centres,
    comparison_figure,
    extent_of,
    histogram_log_density,
    save_figure,
)
from cnf.replace import replacing
from cnf.training.seed import seeded

NAMES = ("circles", "moons")
TIMES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
CELLS, DRAWS = 100, 20_000
HELD_OUT = 10_000
STEPS, QUICK_STEPS = 3_000, 1_000  # of each fit


def courses(out: Path, arguments: Namespace) -> dict[str, Any]:
    """Draw both sets over time; the gap of each density to the true one, in nats."""
    flows, gaps = {}, {}
    for name in NAMES:
        law = toy(name)
        flow = _kept(out, law, QUICK_STEPS if arguments.quick else STEPS, arguments.seed)
        with seeded(arguments.seed, torch.device("cpu")), torch.no_grad():
            fresh = law.sample((HELD_OUT,))
            gap, error = mean_and_error((law.log_prob(fresh) - flow.log_prob(fresh)).double())
        flows[name], gaps[name] = flow, {"gap": gap, "gap_error": error}
        if not arguments.json:
            print(f"{name:<10}gap to the true density {gap:.4f} ± {error:.4f} nats")
    path = save_figure(_picture(flows, arguments.seed), out / "fig5.png")
    if not arguments.json:
        print(path)
    return {"figure": str(path), "gaps": gaps, "quick": arguments.quick}


def _kept(out: Path, law: Toy, steps: int, seed: int) -> Flow:
    """The flow of that law that the folder holds, fitted now where it holds none."""
    path, noted = out / f"{law.name}.safetensors", out / f"{law.name}.json"
    settings = {"steps": steps, "seed": seed}
    if not noted.exists():  # written last: what was stopped on the way is fitted again
        flow = Flow(2, seed=seed).fit(law, steps=steps, seed=seed, progress=False)
        flow.save(path)
        with replacing(noted) as file:
            file.write(json.dumps(settings).encode())
        return flow
    if read_json(noted) != settings:
        raise InputError(f"{path} was fitted with other settings; give another --out")
    return Flow.load(path)


@torch.no_grad()
def _picture(flows: dict[str, Flow], seed: int) -> Figure:
    """Density and samples of every flow, a row for each, over time."""
    walks = {name: paths(flow, flow.draw_base(DRAWS, seed), TIMES) for name, flow in flows.items()}
    extent = extent_of(torch.cat(list(walks.values())))
    at = torch.from_numpy(cell_centres(extent, CELLS)).float()
    grids, rows = [], []
    for name, flow in flows.items():
        densities = [log_density_at(flow, at, t).reshape(CELLS, CELLS) for t in TIMES]
        samples = [histogram_log_density(points, extent, CELLS // 2) for points in walks[name]]
        grids += [densities, samples]
        rows += [f"{name}: density", "samples"]
    columns = [f"t = {t:g}" for t in TIMES]
    return comparison_figure(grids, extent, columns, rows, [[""] * len(TIMES)] * len(rows))
