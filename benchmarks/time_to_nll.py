"""Wall-clock to a gap: how long a flow is trained until its density is as near as that.

    python benchmarks/time_to_nll.py --out runs/time_to_nll [--sets moons …] [--seeds 0 1 2]
                                     [--methods cnf …] [--cap 180] [--threads 1]
    python benchmarks/time_to_nll.py --out runs/time_to_nll --tune [--methods …]
    python benchmarks/time_to_nll.py --out runs/time_to_nll --table

The gap is the mean of log p*(x) − log p(x) in nats on 5,000 fresh points.  Every batch is drawn
anew from the law, for all methods and on the clock.  The clock runs while a flow is trained, and
stands still while its gap is measured.  Averaged weights are judged, of the same average for all.

- "cnf" and "cnf, ML only": `Flow(2).fit(law, seconds=S)`, its defaults and method="ml".  A fit
  plans its learning rate over the seconds that it is given, so fits of 1.5, 2.1, 3, … seconds are
  each run from nothing; the time to a gap is that of the shortest fit that ends within it.  After
  the fit of 24 seconds comes that of the cap, and those between where it reached something new.
- "zuko CNF": `zuko.flows.CNF(2)` as its documentation trains it, exact trace and defaults.
- "FFJORD": concatsquash 64-64-64 with tanh, Hutchinson's estimate in training and the exact trace
  in judging, torchdiffeq's odeint_adjoint by dopri5 at 1e-5 with the seminorm.
  Both rivals get standardized data, Adam at a constant rate, and the rate and batch size that are
  best on 8gaussians after --tune-seconds; their gap is looked at whenever the clock has grown by a
  half, and the first look within a gap is the time to it.

A run can be stopped and started again: each (set, seed, method) is a line of results.jsonl in
--out, and those that are there are not run again; what was found in tuning is in tuning.jsonl.
With --threads 1 a run needs one core, and two runs may share the folder and two cores, the second
with --backwards, from the last set to the first. Have --tune done before.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rivals import available, standard_normal
from timing import machine
from torch import Tensor, nn

import cnf
from cnf.data.density import TOY_NAMES, Toy
from cnf.plot import INK, LEGEND, QUIET, save_figure
from cnf.training.loop import Average, Plan

AIMS = (0.1, 0.05, 0.02)  # nats
FRESH = 5_000
BUDGETS = (1.5, 2.1, 3.0, 4.2, 6.0, 8.5, 12.0, 17.0, 24.0)  # seconds of our fits, before the cap
BETWEEN = (66.0,)  # and after it, where it reached an aim that those had not
FIRST_LOOK, LOOK_GROWTH = 1.0, 1.5
GRACE = 60.0  # seconds beyond the cap that one step of a rival may take
RATES, BATCHES = (1e-3, 3e-3, 1e-2, 3e-2), (64, 256, 1024)
TUNED_ON, TUNING_SEED = "8gaussians", 1000
RESULTS, TUNING = "results.jsonl", "tuning.jsonl"


class Look(NamedTuple):
    """A gap that was measured after so many seconds of training."""

    seconds: float
    gap: float
    error: float


class Setting(NamedTuple):
    """What a rival is trained with."""

    rate: float
    batch: int


class Task(NamedTuple):
    """A law to learn, points to judge by and their true log-densities, and when to stop."""

    law: Toy
    points: Tensor
    truth: Tensor
    seed: int
    cap: float
    enough: float
    first: float  # second of the first look at a rival

    def look(self, seconds: float, log_prob: Callable[[Tensor], Tensor]) -> Look:
        with torch.no_grad():
            gaps = (self.truth - log_prob(self.points)).double()
        return Look(seconds, gaps.mean().item(), gaps.std().item() / math.sqrt(len(gaps)))


Run = Callable[[Task], Iterator[Look]]


def task(name: str, seed: int, cap: float, enough: float, first: float = FIRST_LOOK) -> Task:
    torch.manual_seed(10_000 + seed)  # no seed of a training
    law = cnf.data.toy(name)
    points = law.sample((FRESH,))
    return Task(law, points, law.log_prob(points), seed, cap, enough, first)


# --- ours -----------------------------------------------------------------------------------------


def ours(method: str) -> Run:
    def run(task: Task) -> Iterator[Look]:
        """A look at the end of each fit, until one is good enough."""
        best = math.inf
        for seconds in [*(budget for budget in BUDGETS if budget < task.cap), task.cap]:
            before = best
            yield (look := fitted(task, method, seconds))
            best = min(best, look.gap)
            if best <= task.enough and seconds < task.cap:
                return
        least = before  # of the fits shorter than the cap
        for seconds in (budget for budget in BETWEEN if budget < task.cap):
            if not any(best <= aim < least for aim in AIMS):
                return
            yield (look := fitted(task, method, seconds))
            least = min(least, look.gap)

    return run


def fitted(task: Task, method: str, seconds: float) -> Look:
    flow = cnf.Flow(2, seed=task.seed)
    start = time.perf_counter()
    flow.fit(task.law, method=method, seconds=seconds, seed=task.seed, progress=False)
    return task.look(time.perf_counter() - start, flow.log_prob)


# --- rivals ---------------------------------------------------------------------------------------


class Standardized(nn.Module):
    """A rival's density of what was standardized: log_prob(z) of rows (n, 2), in two modes.

    `estimate` is what training uses; `exact` what is judged.
    """

    def __init__(self, inner: nn.Module, sample: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("mean", sample.mean(0))
        self.register_buffer("scale", sample.std(0))

    def forward(self, x: Tensor, exact: bool) -> Tensor:
        return self.inner((x - self.mean) / self.scale, exact) - self.scale.log().sum()


class ZukoCNF(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        import zuko

        self.flow = zuko.flows.CNF(2)

    def forward(self, z: Tensor, exact: bool) -> Tensor:
        return self.flow().log_prob(z)  # its trace is exact by default


class ConcatSquash(nn.Linear):
    """(W x + b) σ(g t + c) + s t.  Source: Grathwohl et al. 2019, their toy experiments."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.gate = nn.Linear(1, outputs)
        self.shift = nn.Linear(1, outputs, bias=False)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        t = t.reshape(1, 1)
        return super().forward(x) * torch.sigmoid(self.gate(t)) + self.shift(t)


class Dynamics(nn.Module):
    """d(z, log-determinant)/dt of concatsquash layers; noise (n, 2), None for the exact trace."""

    def __init__(self) -> None:
        super().__init__()
        widths = (2, 64, 64, 64, 2)
        self.layers = nn.ModuleList(map(ConcatSquash, widths, widths[1:]))
        self.noise: Tensor | None = None

    def velocity(self, t: Tensor, z: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            z = torch.tanh(layer(t, z))
        return self.layers[-1](t, z)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        keep = torch.is_grad_enabled()  # no second graph where nobody needs it
        with torch.enable_grad():
            z = state[0].requires_grad_(True)
            dz = self.velocity(t, z)
            if self.noise is None:
                columns = (
                    torch.autograd.grad(dz[:, i].sum(), z, create_graph=keep, retain_graph=True)
                    for i in range(2)
                )
                trace = sum(column[0][:, i] for i, column in enumerate(columns))
            else:
                pulled = torch.autograd.grad(dz, z, self.noise, create_graph=keep)[0]
                trace = (pulled * self.noise).sum(-1)
        return (dz, trace) if keep else (dz.detach(), trace.detach())


class FFJORD(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dynamics = Dynamics()
        self.register_buffer("times", torch.tensor([0.0, 1.0]))

    def forward(self, z: Tensor, exact: bool) -> Tensor:
        from torchdiffeq import odeint_adjoint

        self.dynamics.noise = None if exact else torch.randint(0, 2, z.shape) * 2.0 - 1.0
        ends, integrals = odeint_adjoint(
            self.dynamics, (z, torch.zeros(len(z))), self.times, method="dopri5",
            rtol=1e-5, atol=1e-5, adjoint_options={"norm": "seminorm"},
        )  # fmt: skip
        return standard_normal(ends[-1]) + integrals[-1]


RIVALS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "zuko CNF": ("zuko", ZukoCNF),
    "FFJORD": ("torchdiffeq", FFJORD),
}


def trained(build: Callable[[], nn.Module], setting: Setting, task: Task) -> Iterator[Look]:
    """A look at a rival whenever its clock has grown by a half, until it is good enough."""
    torch.manual_seed(task.seed)
    start = time.perf_counter()
    model = Standardized(build(), task.law.sample((10_000,)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=setting.rate)
    average = Average(parameters, Plan.memory)
    clock, due = time.perf_counter() - start, task.first
    while clock < task.cap:
        start = time.perf_counter()
        with at_most(task.cap - clock + GRACE):
            if step(model, optimizer, task.law.sample((setting.batch,))):
                average.update()
        clock += time.perf_counter() - start
        if clock < min(due, task.cap):
            continue
        due = LOOK_GROWTH * clock
        with average.in_place(), at_most(2 * GRACE):
            look = task.look(clock, lambda x: model(x, exact=True))
        yield look
        if look.gap <= task.enough:
            return


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> bool:
    """One step of maximum likelihood; whether it was taken: not where nothing finite came out."""
    optimizer.zero_grad()
    try:
        loss = -model(batch, exact=False).mean()
        if not math.isfinite(loss.item()):
            return False
        loss.backward()
    except AssertionError:  # torchdiffeq's word for a step that vanished
        return False
    norm = nn.utils.clip_grad_norm_(model.parameters(), Plan.clip)
    if not math.isfinite(norm.item()):
        return False
    optimizer.step()
    return True


class TooLong(Exception):
    """A step that did not end: zuko's loop has no limit."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TooLong in the block once so many seconds have passed."""

    def ring(number: int, frame: object) -> None:
        raise TooLong(f"a step did not end in {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def tuned(name: str, build: Callable[[], nn.Module], out: Path, seconds: float) -> Setting:
    """The rate and batch size under which a rival's gap on 8gaussians is least after so long."""
    found = {
        Setting(row["rate"], row["batch"]): row["gap"]
        for row in rows_of(out / TUNING)
        if row["method"] == name and row["seconds"] == seconds
    }
    for rate in RATES:
        for batch in BATCHES:
            if (setting := Setting(rate, batch)) in found:
                continue
            looks, note = guarded(
                lambda task, setting=setting: trained(build, setting, task),
                task(TUNED_ON, TUNING_SEED, seconds, 0.0, first=seconds),
            )
            gap = looks[-1].gap if looks and math.isfinite(looks[-1].gap) else 1e9
            found[setting] = gap
            row = {"method": name, "seconds": seconds, **setting._asdict(), "gap": gap}
            append(out / TUNING, row | {"note": note})
            print(f"tuning {name}: rate {rate:g}, batch {batch}: gap {gap:.4f} {note}", flush=True)
    return min(found, key=lambda setting: found[setting])


# --- the run --------------------------------------------------------------------------------------


def methods(out: Path, tune_seconds: float) -> dict[str, Run]:
    found = {"cnf": ours("auto"), "cnf, ML only": ours("ml")}

    def rival(name: str, build: Callable[[], nn.Module]) -> Run:
        return lambda task: trained(build, tuned(name, build, out, tune_seconds), task)

    for name, (package, build) in RIVALS.items():
        if available(package):
            found[name] = rival(name, build)
    return found


def guarded(run: Run, task: Task) -> tuple[list[Look], str]:
    """The looks, and the reason where a method broke down before its end."""
    looks: list[Look] = []
    try:
        looks.extend(run(task))  # keeps those before an error
    except (AssertionError, RuntimeError, ValueError, TooLong) as error:
        return looks, f"{type(error).__name__}: {error}".splitlines()[0]
    return looks, ""


def warm_up(names: Sequence[str]) -> None:
    """The first use of everything, which is nobody's training."""
    law = cnf.data.toy("moons")
    for method in ("fm", "ml"):
        cnf.Flow(2, seed=0).fit(law, method=method, steps=3, seed=0, progress=False)
    for name in names:
        if name in RIVALS:
            model = Standardized(RIVALS[name][1](), law.sample((100,)))
            step(model, torch.optim.Adam(model.parameters()), law.sample((100,)))


def measure(arguments: argparse.Namespace, out: Path) -> None:
    found = methods(out, arguments.tune_seconds)
    chosen = {name: found[name] for name in arguments.methods if name in found}
    for name in set(arguments.methods) - set(chosen):
        print(f"{name} is not installed: left out")
    print(machine(), flush=True)
    warm_up(list(chosen))
    if arguments.tune:
        for name in set(chosen) & set(RIVALS):
            setting = tuned(name, RIVALS[name][1], out, arguments.tune_seconds)
            print(f"{name}: rate {setting.rate:g}, batch {setting.batch}")
        return
    way = -1 if arguments.backwards else 1
    for seed in arguments.seeds:
        for name in arguments.sets[::way]:
            given = task(name, seed, arguments.cap, min(AIMS))
            for method, run in list(chosen.items())[::way]:
                if (name, seed, method) in map(key_of, rows_of(out / RESULTS)):
                    continue
                looks, note = guarded(run, given)
                looks.sort()
                reached = {f"{aim:g}": time_to(looks, aim) for aim in AIMS}
                append(out / RESULTS, {
                    "set": name, "seed": seed, "method": method, "cap": arguments.cap,
                    "reached": reached, "looks": [list(look) for look in looks], "note": note,
                    "machine": machine(),
                })  # fmt: skip
                last = f"gap {looks[-1].gap:.4f} ± {looks[-1].error:.4f}" if looks else note
                times = ", ".join(f"{aim}: {shown(s, arguments.cap)}" for aim, s in reached.items())
                print(f"{name:12s} seed {seed} {method:13s} {times}; {last}", flush=True)


def time_to(looks: Sequence[Look], aim: float) -> float | None:
    """Seconds of the first look within the aim."""
    return next((look.seconds for look in looks if look.gap <= aim), None)


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def rows_of(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def key_of(row: dict[str, Any]) -> tuple[str, int, str]:
    return row["set"], row["seed"], row["method"]


# --- what is shown --------------------------------------------------------------------------------


def shown(seconds: float | None, cap: float) -> str:
    if seconds is None or not math.isfinite(seconds):
        return f"> {cap:.0f}"
    return f"{seconds:.1f}" if seconds < 9.95 else f"{seconds:.0f}"


def table(arguments: argparse.Namespace, out: Path) -> None:
    rows = {key_of(row): row for row in rows_of(out / RESULTS)}
    wanted = [
        (name, seed, method)
        for name in arguments.sets
        for seed in arguments.seeds
        for method in arguments.methods
    ]
    kept = {key: rows[key] for key in wanted if key in rows}
    for label in sorted({row["machine"] for row in kept.values()}):
        print(label)
    aims = " / ".join(f"{aim:g}" for aim in AIMS)
    print(f"\n| seconds to {aims} nats | {' | '.join(arguments.methods)} |")
    print("|---" * (len(arguments.methods) + 1) + "|")
    for name in arguments.sets:
        cells = (cell(kept, name, method, arguments.seeds) for method in arguments.methods)
        print(f"| {name} | {' | '.join(cells)} |")
    print("\nmedians over seeds; –: not in time, and the last gap where none was; ?: not measured")
    missing = [key for key in wanted if key not in kept]
    if missing:
        print(f"missing: {len(missing)} of {len(wanted)}:")
        for name, seed, method in missing:
            print(f"  {name}, seed {seed}, {method}")
    for row in rows_of(out / TUNING):
        print(f"tuning: {json.dumps(row)}")
    if kept:
        save_figure(draw(kept, arguments), arguments.figure)
        print(f"figure: {arguments.figure}")


def cell(
    kept: dict[tuple[str, int, str], dict[str, Any]], name: str, method: str, seeds: Sequence[int]
) -> str:
    """Medians over the seeds that were run, of the seconds to each aim."""
    rows = [kept[key] for seed in seeds if (key := (name, seed, method)) in kept]
    if not rows:
        return "?"
    looks = [[Look(*look) for look in row["looks"]] for row in rows]
    times = []
    for aim in AIMS:
        found = [time_to(each, aim) for each in looks]
        times.append(statistics.median_high([math.inf if s is None else s for s in found]))
    if not math.isfinite(min(times)):
        gap = statistics.median([each[-1].gap if each else math.nan for each in looks])
        return f"– ({gap:.2f})"
    return " / ".join(f"{s:.0f}" if math.isfinite(s) else "–" for s in times)


COLORS = {"cnf": "#1f5fd0", "cnf, ML only": "#6aa5f0", "zuko CNF": "#d0651f", "FFJORD": "#4b9e5f"}


def draw(kept: dict[tuple[str, int, str], dict[str, Any]], arguments: argparse.Namespace) -> Figure:
    """A panel for each set: the gap against the seconds, a line for each method and seed."""
    columns = min(4, len(arguments.sets))
    lines = -(-len(arguments.sets) // columns)
    figure = Figure(figsize=(2.6 * columns + 0.4, 2.3 * lines + 0.7), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, name in zip(panels, arguments.sets, strict=False):
        style(axes, name)
        for (label, _, method), row in kept.items():
            if label == name and row["looks"]:
                seconds, gaps, _ = zip(*row["looks"], strict=True)
                axes.plot(
                    seconds, gaps, color=COLORS.get(method), linewidth=1.3, alpha=0.85,
                    marker="o" if method.startswith("cnf") else None, markersize=2.5,
                )  # fmt: skip
    for axes in panels[len(arguments.sets) :]:
        axes.set_axis_off()
    for axes in panels[-columns:]:
        axes.set_xlabel("seconds of training", fontsize=9, color=QUIET)
    for axes in panels[::columns]:
        axes.set_ylabel("gap, nats", fontsize=9, color=QUIET)
    for method in arguments.methods:
        panels[0].plot([], [], color=COLORS.get(method), label=method)
    figure.legend(loc="outside lower center", ncols=4, **LEGEND)
    return figure


def style(axes: Axes, name: str) -> None:
    axes.set_title(name, fontsize=10, color=INK, loc="left")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(0.003, 2.0)
    for aim in AIMS:
        axes.axhline(aim, color="#d5d8de", linewidth=0.7, zorder=0)
    axes.set_xticks([1, 10, 100], ["1", "10", "100"])
    axes.set_yticks([0.01, *AIMS[::-1], 1.0], ["0.01", *(f"{aim:g}" for aim in AIMS[::-1]), "1"])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=QUIET, labelsize=8)


def main() -> None:
    names = ["cnf", "cnf, ML only", *RIVALS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/time_to_nll", help="folder of the results")
    parser.add_argument("--sets", nargs="+", default=list(TOY_NAMES), choices=TOY_NAMES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    parser.add_argument("--cap", type=float, default=180.0, help="seconds of one training")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--backwards", action="store_true", help="from the last set to the first")
    parser.add_argument("--tune", action="store_true", help="find the rivals' settings, and stop")
    parser.add_argument("--tune-seconds", type=float, default=20.0, help="of one rival's setting")
    parser.add_argument("--table", action="store_true", help="print the table, draw the figure")
    parser.add_argument("--figure", default="docs/time_to_nll.png")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    (table if arguments.table else measure)(arguments, out)


if __name__ == "__main__":
    main()
