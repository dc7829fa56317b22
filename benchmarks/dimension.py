"""Time and memory of an exact log-density against the dimension: ours beside its rivals.

    python benchmarks/dimension.py [--rounds 5] [--limit 20] [--quick] [--out docs/dimension.png]

log_prob without gradients, and a training step (log_prob forward and backward), batch 256, width
256, D = 2 … 1024.  Each method has a process of its own for each D and task.  Memory is what the
first evaluation adds to that process's peak (ru_maxrss, after a small warm-up), or for jax what XLA
itself plans for its buffers.  Seconds are medians of interleaved rounds; a method that has spent
its budget on a D sits out the remaining rounds.  A curve ends where one evaluation would take
longer than --limit or more memory than 6 GiB: judged by its growth so far, or stopped in the act.
The slogdet of the full Jacobian is run on the first max(2, 2048 / D) rows of the batch, and its
time and memory are scaled to all.  Linux alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rivals import Rival, available, diffrax, ours, slogdet, torchdiffeq, zuko
from timing import machine

import cnf
from cnf.plot import DATA, INK, LEGEND, MODEL, QUIET, save_figure

BATCH, WIDTH = 256, 256
DIMS = tuple(2**k for k in range(1, 11))
TASKS = {"log_prob": "log_prob, no gradients", "step": "training step"}
MOST_BYTES = 6 * 2**30
BUDGET = 1.5  # seconds of one method at one D
SETUP = 120.0  # seconds to import, compile and warm up
MIB = 2**20
Build = Callable[[int, int, torch.Tensor], Rival]


@dataclass(frozen=True)
class Line:
    """How a method is built and drawn."""

    build: Build
    color: str
    exact: bool = True


@dataclass
class Curve:
    """What a method takes at each D, and why it ended."""

    seconds: dict[int, float] = field(default_factory=dict)
    bytes: dict[int, float] = field(default_factory=dict)
    end: str = ""


OURS, ESTIMATE, JACOBIAN = "cnf, exact (closed form)", "cnf, Hutchinson", "slogdet of the Jacobian"
COLORS = {"torchdiffeq": DATA, "zuko": "#3f9b73", "diffrax": "#9061b5"}


def methods() -> dict[str, Line]:
    """Every method that is installed, ours first."""
    found = {
        OURS: Line(ours, MODEL),
        ESTIMATE: Line(lambda d, w, x: ours(d, w, x, cnf.Hutchinson()), MODEL, False),
    }
    makers = {"torchdiffeq": torchdiffeq, "zuko": zuko, "diffrax": diffrax}
    titles = {"torchdiffeq": "torchdiffeq backprop", "zuko": "zuko CNF", "diffrax": "diffrax jit"}
    for name, make in makers.items():
        if available(name):
            import_module(name)  # once, before the processes fork
            for exact, word in ((True, "exact"), (False, "Hutchinson")):
                build = _bind(make, exact)
                found[f"{titles[name]}, {word}"] = Line(build, COLORS[name], exact)
    return found | {JACOBIAN: Line(slogdet, INK)}


def _bind(make: Callable[..., Rival], exact: bool) -> Build:
    return lambda dim, width, x: make(dim, width, x, exact)


# --- one process for each method, dimension and task ----------------------------------------------


def serve(pipe: Connection, build: Build, dim: int, task: str) -> None:
    """Say when ready, then answer each message with (seconds, bytes added to the peak, NFE)."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, dim)
    rival = build(dim, WIDTH, x)
    planned = rival.planned(task)  # compiles, where there is a compiler
    if planned is None:  # load the libraries and start the threads
        small = build(2, 8, torch.randn(4, 2))
        getattr(small, task)()
    before = _peak()
    pipe.send((planned or 0) / rival.share)
    while pipe.recv():
        start = time.perf_counter()
        getattr(rival, task)()
        seconds = time.perf_counter() - start
        added = _peak() - before if planned is None else planned
        pipe.send((seconds / rival.share, added / rival.share, rival.nfe()))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Worker:
    """A process that runs one task of one method at one D."""

    def __init__(self, build: Build, dim: int, task: str) -> None:
        context = multiprocessing.get_context("fork")  # nothing has started threads in here yet
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, build, dim, task), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.process.start()
        other.close()

    def run(self, limit: float) -> tuple[float, float, int | None]:
        """(seconds, bytes, NFE) of one evaluation; Ended if it passes a limit."""
        self.pipe.send(True)
        seconds, size, nfe = self.answer(limit)
        if seconds > limit:
            raise Ended(f"took {seconds:.0f} s")
        if size > MOST_BYTES:
            raise Ended(f"took {size / 2**30:.1f} GiB")
        return seconds, size, nfe

    def answer(self, limit: float) -> Any:
        """The next message, or Ended once it is late or the process has grown too large."""
        deadline = time.perf_counter() + limit
        while not self.pipe.poll(0.1):
            if time.perf_counter() > deadline:
                raise Ended(f"more than {limit:.0f} s")
            if self._resident() > MOST_BYTES:
                raise Ended("more than 6 GiB")
        try:
            return self.pipe.recv()
        except EOFError:
            raise Ended("failed") from None

    def _resident(self) -> int:
        try:
            pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        except (OSError, IndexError):  # it has just ended
            return 0
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Ended(Exception):
    """Why a curve goes no further."""


# --- the measurement ------------------------------------------------------------------------------


def measure(
    lines: dict[str, Line],
    dim: int,
    task: str,
    rounds: int,
    limit: float,
    found: dict[str, Curve],
) -> int | None:
    """Add one D to every curve that has not ended; our NFE."""
    going = [name for name, curve in found.items() if not _forecast(curve, limit)]
    workers = {name: Worker(lines[name].build, dim, task) for name in going}
    times: dict[str, list[float]] = {}
    nfe = None

    def attempt(name: str) -> None:
        nonlocal nfe
        try:
            seconds, size, evaluations = workers[name].run(limit)
        except Ended as reason:
            found[name].end = f"{reason} at D = {dim}"
            return
        found[name].bytes.setdefault(dim, max(size, 0.0))
        times.setdefault(name, []).append(seconds)
        nfe = evaluations if name == OURS else nfe

    try:
        for name in _ready(workers, dim, found):
            attempt(name)
        spent = {name: values[0] for name, values in times.items()}
        for _ in range(rounds):
            for name in times:
                if spent[name] < BUDGET and not found[name].end:
                    attempt(name)
                    spent[name] += times[name][-1]
    finally:
        for worker in workers.values():
            worker.close()
    for name, values in times.items():  # the first evaluation was the warm-up, unless it is alone
        found[name].seconds[dim] = statistics.median(values[1:] or values)
    return nfe


def _ready(workers: dict[str, Worker], dim: int, found: dict[str, Curve]) -> list[str]:
    """The methods whose process has set itself up and whose plan, if any, fits into memory."""
    ready = []
    for name, worker in workers.items():
        try:
            if worker.answer(SETUP) > MOST_BYTES:
                raise Ended("more than 6 GiB")
            ready.append(name)
        except Ended as reason:
            found[name].end = f"{reason} at D = {dim}"
    return ready


def _forecast(curve: Curve, limit: float) -> bool:
    """Whether the next D is out of reach, if it grows from the last as that from the one before."""
    for values, most, unit, size in (
        (curve.seconds, limit, "s", 1.0),
        (curve.bytes, MOST_BYTES, "GiB", 2.0**30),
    ):
        if len(values) < 2 or curve.end:
            continue
        before, last = list(values.values())[-2:]
        expected = last * max(1.0, last / max(before, 1e-9))
        if expected > most and last > most / 16:
            curve.end = f"about {expected / size:.0f} {unit} at D = {2 * max(values)}"
    return bool(curve.end)


def exponent(values: dict[int, float], least: int = 0) -> float:
    """The slope of log values against log D, by least squares over D ≥ least."""
    dims = [dim for dim in values if dim >= least]
    if len(dims) < 2:
        return float("nan")
    return float(np.polyfit(np.log(dims), np.log([values[dim] for dim in dims]), 1)[0])


# --- what is shown --------------------------------------------------------------------------------


def report(title: str, curves: dict[str, Curve], dims: tuple[int, ...]) -> None:
    for what, unit, scale in (("seconds", "ms", 1e3), ("bytes", "MiB", 1 / MIB)):
        print(f"\n{title}: {what if what == 'seconds' else 'memory'}, {unit}")
        print(f"{'D':32s}" + "".join(f"{dim:9d}" for dim in dims))
        for name, curve in curves.items():
            values = getattr(curve, what)
            cells = (
                f"{values[dim] * scale:9.1f}" if dim in values else f"{'–':>9s}" for dim in dims
            )
            print(f"{name:32s}" + "".join(cells))
        ratios(curves, what, dims)
    for name, curve in curves.items():
        if curve.end:
            print(f"  {name} ends: {curve.end}")


def ratios(curves: dict[str, Curve], what: str, dims: tuple[int, ...]) -> None:
    """Ours exact over ours estimated, every exact rival over ours, and our growth with D."""
    exact, estimate = getattr(curves[OURS], what), getattr(curves[ESTIMATE], what)
    if what == "seconds":
        shared = [f"{exact[d] / estimate[d]:9.2f}" if d in exact and d in estimate else f"{'–':>9s}"
                  for d in dims]  # fmt: skip
        print(f"{'our exact / our Hutchinson':32s}" + "".join(shared))
        for name, curve in curves.items():
            common = [dim for dim in curve.seconds if dim in exact]
            if name not in (OURS, ESTIMATE) and common:
                last = common[-1]
                print(f"  {name}: {curve.seconds[last] / exact[last]:.1f} × ours at D = {last}")
    half = dims[len(dims) // 2]
    print(
        f"  growth of ours: D^{exponent(exact):.2f}, from D = {half} D^{exponent(exact, half):.2f}"
    )


def draw(results: dict[str, dict[str, Curve]], lines: dict[str, Line]) -> Figure:
    """Seconds above, memory below, one column for each task; exact solid, estimates dashed."""
    figure = Figure(figsize=(9.2, 6.6), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
    panels = figure.subplots(2, len(results), sharex=True, sharey="row")
    for column, (task, curves) in enumerate(results.items()):
        for axes, what, scale in ((panels[0, column], "seconds", 1.0),
                                  (panels[1, column], "bytes", 1 / MIB)):  # fmt: skip
            for name, curve in reversed(curves.items()):  # ours on top
                _plot(axes, getattr(curve, what), scale, lines[name], name == OURS)
            _style(axes)
        panels[0, column].set_title(TASKS[task], fontsize=10.5, color=INK, loc="left")
        panels[1, column].set_xlabel("dimension D", color=QUIET, fontsize=9)
    panels[0, 0].set_ylabel("seconds for 256 rows", color=QUIET, fontsize=9)
    panels[1, 0].set_ylabel("memory, MiB", color=QUIET, fontsize=9)
    handles = [_handle(name, line, name == OURS) for name, line in lines.items()]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3, **(LEGEND | {"fontsize": 8.5})
    )
    return figure


def _plot(axes: Axes, values: dict[int, float], scale: float, line: Line, bold: bool) -> None:
    shown = [max(value * scale, 1e-9) for value in values.values()]
    axes.loglog(list(values), shown, **_stroke(line, bold), zorder=4 if bold else 3)


def _stroke(line: Line, bold: bool) -> dict[str, Any]:
    return {
        "color": line.color,
        "linestyle": "-" if line.exact else (0, (3, 2)),
        "linewidth": 2.6 if bold else 1.4,
        "marker": "o" if line.exact else None,
        "markersize": 4.5 if bold else 3.0,
        "alpha": 1.0 if line.exact else 0.85,
    }


def _handle(name: str, line: Line, bold: bool) -> Line2D:
    return Line2D([], [], label=name, **_stroke(line, bold))


def _style(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xticks([4, 16, 64, 256, 1024] if axes.get_xlim()[1] > 128 else [2, 4, 8, 16, 32, 64])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color="#c9ccd3", linewidth=0.8)
    axes.tick_params(colors=QUIET, labelsize=8, width=0.8, length=3)
    axes.grid(color="#e7e9ed", linewidth=0.6)
    axes.set_axisbelow(True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds of one evaluation")
    parser.add_argument("--quick", action="store_true", help="D ≤ 64")
    parser.add_argument("--out", default="docs/dimension.png")
    parser.add_argument("--json", help="write the numbers here as well")
    arguments = parser.parse_args()
    dims = DIMS[:6] if arguments.quick else DIMS
    lines = methods()
    print(machine(), f"\nbatch {BATCH}, width {WIDTH}, dopri5, tolerance 1e-5", flush=True)
    results: dict[str, dict[str, Curve]] = {}
    for task, title in TASKS.items():
        results[task] = {name: Curve() for name in lines}
        evaluations = []
        for dim in dims:
            evaluations.append(
                measure(lines, dim, task, arguments.rounds, arguments.limit, results[task])
            )
        report(title, results[task], dims)
        print(f"  NFE of ours: {', '.join(map(str, evaluations))}", flush=True)
    save_figure(draw(results, lines), arguments.out)
    if arguments.json:
        numbers = {
            "machine": machine(), "batch": BATCH, "width": WIDTH, "rounds": arguments.rounds,
            "curves": {task: {name: vars(curve) for name, curve in curves.items()}
                       for task, curves in results.items()},
        }  # fmt: skip
        Path(arguments.json).write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
