"""Latency of an ODE-Net against its budget of evaluations, on one thread.

    python benchmarks/latency.py [--run RUN] [--data FOLDER] [--rounds 30] [--out docs/latency.png]

The quick preset's net (32 channels, a strided stem), within 1 to 32 evaluations of the field, for
one image and for 32: as the module with its ODE block, and as the torch.export program that `cnf
export` writes, reloaded.  Steps are Euler's, of which every evaluation pays for one.  With --run
the net is that of a trained run, and its error on the images that were held back from its training
is told for each budget.
"""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path

import torch
from matplotlib.figure import Figure
from timing import machine, medians

import cnf
from cnf.cli.mnist.classifier import read_classifier
from cnf.odenet.classification import judge
from cnf.odenet.fixed_grid import exported, write_program
from cnf.odenet.recipe import images_of, split
from cnf.odenet.settings import Settings
from cnf.plot import DATA, INK, LEGEND, MODEL, QUIET, save_figure

BUDGETS = (1, 2, 4, 8, 16, 32)
BATCHES = (1, 32)
KINDS = ("block", "program")
COLORS = {"block": DATA, "program": MODEL}


def reloaded(net: cnf.ODENet, shape: tuple[int, ...]) -> torch.nn.Module:
    """The net as a program, written and read again."""
    file = BytesIO()
    write_program(exported(net, shape), file)
    file.seek(0)
    return torch.export.load(file).module()


@torch.no_grad()
def latencies(
    net: cnf.ODENet, shape: tuple[int, ...], budget: int, rounds: int
) -> dict[str, float]:
    """Median seconds of a call by kind and batch, such as "program 32"."""
    net.block.method, net.block.nfe = "euler", budget
    program = reloaded(net, shape)
    runs = {}
    for batch in BATCHES:
        images = torch.rand(batch, *shape)
        runs[f"block {batch}"] = lambda x=images: net(x)
        runs[f"program {batch}"] = lambda x=images: program(x)
    return medians(runs, rounds, warmup=5)


def validation_error(net: cnf.ODENet, settings: Settings, data: str | None) -> float:
    """The error on the images that were held back from the run's training."""
    parts = split(images_of(settings.dataset, data, False), settings.validation, settings.seed)
    return judge(net, parts.validation_images, parts.validation_labels).error


def draw(found: dict[int, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(4.8, 3.4), facecolor="white")
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for batch, style in zip(BATCHES, ("-", "--"), strict=True):
        for kind in KINDS:
            milliseconds = [1e3 * one[f"{kind} {batch}"] for one in found.values()]
            label = f"{kind}, {batch} image{'s'[: batch > 1]}"
            axes.loglog(list(found), milliseconds, style, marker="o", markersize=3,
                        color=COLORS[kind], label=label)  # fmt: skip
    axes.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
    axes.minorticks_off()
    axes.set_title("milliseconds a call", fontsize=10.5, color=INK, loc="left")
    axes.set_xlabel("evaluations of the field", color=QUIET, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e7e9ed", linewidth=0.6)
    axes.tick_params(colors=QUIET, labelsize=8)
    axes.legend(**LEGEND)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", help="a run of `cnf mnist classify`")
    parser.add_argument("--data", help="the folder that holds the IDX files")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", default="docs/latency.png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, settings, shape = cnf.ODENet(width=32, stem="strided").eval(), None, (1, 28, 28)
    if arguments.run:
        net, settings, shape = read_classifier(Path(arguments.run))
    print(machine())
    heads = [f"{kind} {batch}" for batch in BATCHES for kind in KINDS]
    error = f"{'error %':>10s}" if settings else ""
    print(f"{'NFE':>4s}" + "".join(f"{head:>12s}" for head in heads) + error + "   (ms)")
    found = {}
    for budget in BUDGETS:
        found[budget] = latencies(net, shape, budget, arguments.rounds)
        cells = "".join(f"{1e3 * found[budget][head]:12.2f}" for head in heads)
        if settings:
            cells += f"{100 * validation_error(net, settings, arguments.data):10.2f}"
        print(f"{budget:4d}{cells}", flush=True)
    print(save_figure(draw(found), arguments.out))


if __name__ == "__main__":
    main()
