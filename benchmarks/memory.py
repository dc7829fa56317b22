"""Memory and time of forward and backward against the number of steps, for every gradient.

    python benchmarks/memory.py [--quick] [--rounds 3] [--out docs/memory.png]

rk4 with 10 to 3,000 fixed steps over a batch of 1,024 states of 64 float32 numbers (0.25 MiB), the
field a net of two layers.  Every solve runs in a process of its own, whose peak of resident memory
is read before and after: what is shown is the difference.  There glibc is told to map every large
block, so that what is freed goes back at once, and one thread computes, so that one heap counts.
Times are those of other processes, medians over rounds in which the methods take turns; one round
from 1,000 steps on.  A method ends where it would pass 6 GiB or a minute.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from timing import machine
from torch import nn

import cnf
from cnf.plot import INK, LEGEND, QUIET, save_figure

BATCH, DIM = 1024, 64
COUNTS = (10, 30, 100, 300, 1000, 3000)
MOST_BYTES, MOST_SECONDS = 6 * 2**30, 60.0
MIB = 2**20
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
GRADIENTS: dict[str, object] = {
    "backprop": cnf.Backprop(),
    "checkpoint, stages": cnf.Checkpoint("stages"),
    "checkpoint, steps": cnf.Checkpoint("steps"),
    "checkpoint, sqrt": cnf.Checkpoint("sqrt"),
    "reversible": cnf.Reversible(),
    "adjoint": cnf.Adjoint(),
}
COLORS = ("#c2652d", "#2f6fb5", "#5a93cf", "#3f9b73", "#9061b5", INK)


def solve_once(gradient: object, steps: int, batch: int = BATCH) -> float:
    """Seconds of one solve, forward and backward."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, DIM))
    y0 = torch.randn(batch, DIM)
    start = time.perf_counter()
    solution = cnf.solve(
        lambda t, y: net(y), y0, [0.0, 1.0], method="rk4", step_size=1 / steps, gradient=gradient,
    )  # fmt: skip
    solution.y[-1].square().mean().backward()
    return time.perf_counter() - start


def serve(name: str, steps: int) -> None:
    """Print seconds and bytes of one solve, after one of a few rows that loads the libraries, and
    whose steps fill the lists of freed tuples that Python keeps.
    """
    gradient = GRADIENTS[name]
    solve_once(gradient, 1000, 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = solve_once(gradient, steps)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([seconds, (after - before) * 1024]))


def measure(
    name: str, steps: int, environment: Mapping[str, str] | None = None
) -> tuple[float, float]:
    """(seconds, bytes) of a solve in a process of its own."""
    found = subprocess.run(
        [sys.executable, __file__, "--serve", name, str(steps)],
        env=os.environ | dict(environment or {}), capture_output=True, text=True, check=True,
        timeout=600,
    )  # fmt: skip
    seconds, size = json.loads(found.stdout)
    return seconds, size


def slope(values: dict[int, float]) -> float:
    """The exponent of growth from 100 steps on."""
    counts = [count for count in values if count >= 100]
    if len(counts) < 2:
        return math.nan
    sizes = [max(values[count], 1.0) for count in counts]
    return float(np.polyfit(np.log(counts), np.log(sizes), 1)[0])


def table(counts: Sequence[int], rounds: int) -> dict[str, dict[str, dict[int, float]]]:
    """bytes and seconds of every gradient at every number of steps."""
    found = {name: {"bytes": {}, "seconds": {}} for name in GRADIENTS}
    for steps in counts:
        times: dict[str, list[float]] = {}
        names = [name for name, values in found.items() if not _ends(values, steps)]
        for name in names:
            found[name]["bytes"][steps] = measure(name, steps, MAPPED)[1]
        for _ in range(rounds if steps < 1000 else 1):
            for name in names:
                times.setdefault(name, []).append(measure(name, steps)[0])
        for name, seconds in times.items():
            found[name]["seconds"][steps] = statistics.median(seconds)
        print(f"{steps} steps done", flush=True)
    return found


def _ends(values: dict[str, dict[int, float]], steps: int) -> bool:
    """Whether so many steps would take too much, if it grows as it did."""
    for known, most in ((values["bytes"], MOST_BYTES), (values["seconds"], MOST_SECONDS)):
        counts = [count for count in known if count < steps]
        if len(counts) >= 2:
            last, before = counts[-1], counts[-2]
            growth = max(known[last], 1.0) / max(known[before], 1.0)
            power = math.log(max(growth, 1.0)) / math.log(last / before)
            if known[last] * (steps / last) ** power > most:
                return True
    return False


def report(found: dict[str, dict[str, dict[int, float]]], counts: Sequence[int]) -> None:
    for what, unit, scale in (("bytes", "MiB", MIB), ("seconds", "s", 1.0)):
        print(f"\n{what if what == 'seconds' else 'memory'}, {unit}")
        print(f"{'steps':22s}" + "".join(f"{count:10d}" for count in counts) + "   growth")
        for name, values in found.items():
            cells = (
                f"{values[what][count] / scale:10.2f}" if count in values[what] else f"{'–':>10s}"
                for count in counts
            )
            print(f"{name:22s}" + "".join(cells) + f"   steps^{slope(values[what]):.2f}")
    shared = [c for c in counts if c in found["backprop"]["seconds"]]
    print(f"\ntime over backprop's at {shared[-1]} steps:")
    for name, values in found.items():
        ratios = [values["seconds"][c] / found["backprop"]["seconds"][c] for c in shared]
        print(f"  {name:20s} {ratios[-1]:6.2f}  (median {statistics.median(ratios):.2f})")
    for name in ("reversible", "adjoint"):
        sizes = found[name]["bytes"].values()
        print(f"{name}: largest over smallest memory {max(sizes) / min(sizes):.3f}")


def draw(found: dict[str, dict[str, dict[int, float]]]) -> Figure:
    figure = Figure(figsize=(8.6, 3.8), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.08)
    for axes, what, scale, title in zip(
        figure.subplots(1, 2), ("bytes", "seconds"), (MIB, 1.0), ("memory, MiB", "seconds"),
        strict=True,
    ):  # fmt: skip
        for (name, values), color in zip(found.items(), COLORS, strict=True):
            shown = [value / scale for value in values[what].values()]
            axes.loglog(
                list(values[what]), shown, marker="o", markersize=3, color=color, label=name
            )
        axes.set_title(title, fontsize=10.5, color=INK, loc="left")
        axes.set_xlabel("steps", color=QUIET, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e7e9ed", linewidth=0.6)
        axes.tick_params(colors=QUIET, labelsize=8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, **LEGEND)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="up to 300 steps")
    parser.add_argument("--out", default="docs/memory.png")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve[0], int(arguments.serve[1]))
        return
    counts = COUNTS[:4] if arguments.quick else COUNTS
    print(machine(), flush=True)
    found = table(counts, arguments.rounds)
    report(found, counts)
    save_figure(draw(found), arguments.out)


if __name__ == "__main__":
    main()
