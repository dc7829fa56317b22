"""`cnf reproduce`: the table and the figures of Chen et al. 2018, measured here."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnf.cli import classify, fig4, fig5
from cnf.cli.classifier import read_classifier, settings_of
from cnf.cli.folder import CONFIG, FIGURES, MODEL, SNAPSHOT, STEPS, json_text, read_json
from cnf.error import InputError
from cnf.ode.solution import solve
from cnf.odenet.network import ODENet
from cnf.odenet.recipe import images_of, split
from cnf.odenet.settings import chosen
from cnf.plot import cost_figure, polygon_figure, save_figure
from cnf.replace import replacing
from cnf.training.snapshot import Snapshots

# the rows of the table, as arguments of `cnf mnist classify`
ROWS: dict[str, tuple[str, ...]] = {
    "mlp": ("--net", "mlp"),
    "resnet": ("--net", "resnet"),
    "one-block": ("--net", "one-block"),
    "no-block": ("--net", "no-block"),
    "rk-net": ("--net", "rk-net"),
    "odenet-checkpoint": ("--gradient", "checkpoint"),
    "odenet-adjoint": ("--gradient", "adjoint"),
    "odenet-reversible": ("--gradient", "reversible"),
}
TABLE = ("--width", "64", "--stem", "residual", "--epochs", "10")
TABLE_ODE = ("--method", "dopri5", "--rtol", "1e-3")
QUICK = (
    "--dataset", "digits", "--width", "8", "--stem", "fine", "--epochs", "8", "--batch-size", "64",
)  # fmt: skip
METHODS = {"euler": 1, "midpoint": 2, "rk4": 4}  # evaluations of a step
TOLERANCES = [10.0 ** (-k / 2) for k in range(2, 11)]


def run(arguments: Namespace) -> None:
    """Make the figure or the table that was named; what was measured goes to stdout as well."""
    out = Path(arguments.out or Path("runs", arguments.what))
    out.mkdir(parents=True, exist_ok=True)
    figures = MAKERS[arguments.what](out, arguments)
    with replacing(out / f"{arguments.what}.json") as file:
        file.write(f"{json_text(figures, indent=2)}\n".encode())
    if arguments.json:
        print(json_text(figures))


# --- figure 2: Euler's polygon --------------------------------------------------------------------


def polygons(out: Path, arguments: Namespace) -> dict[str, Any]:
    """Euler's polygon and better methods beside the exact solution of y' = y cos t, y(0) = 1."""
    end, steps = 6.0, 8
    fine = torch.linspace(0, end, 400, dtype=torch.float64)
    drawn = {name: _polygon(name, end, steps) for name in METHODS}
    budgets = [2**k for k in range(3, 12)]
    errors = {
        name: [(n, _end_error(name, end, n // each)) for n in budgets if n >= each]
        for name, each in METHODS.items()
    }
    figure = polygon_figure(
        fine.numpy(), torch.exp(torch.sin(fine)).numpy(),
        {name: (t.numpy(), y.numpy()) for name, (t, y) in drawn.items()}, errors,
    )  # fmt: skip
    path = save_figure(figure, out / "fig2.png")
    _tell(arguments, f"drawn in {path}")
    return {"figure": str(path), "errors": errors}


def _swing(t: Tensor, y: Tensor) -> Tensor:
    return y * torch.cos(t)


def _polygon(method: str, end: float, steps: int) -> tuple[Tensor, Tensor]:
    """Times and values at the ends of the steps."""
    t = torch.linspace(0, end, steps + 1, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    return t, solve(_swing, one, t, method=method, step_size=end / steps).y[:, 0]


def _end_error(method: str, end: float, steps: int) -> float:
    last = _polygon(method, end, steps)[1][-1].item()
    return abs(last - math.exp(math.sin(end)))


# --- figure 3: what accuracy costs ----------------------------------------------------------------


def costs(out: Path, arguments: Namespace) -> dict[str, Any]:
    """Error, time and backward evaluations against forward evaluations, and the last over training.

    A net is trained first, with dopri5 at 1e-3 and the adjoint, unless the folder holds one.
    """
    run_folder = out / "odenet"
    given = (*_base(arguments), *TABLE_ODE, "--gradient", "adjoint")
    _finished(run_folder, given, arguments)
    net, settings, _ = read_classifier(run_folder)
    assert isinstance(net, ODENet)
    data = images_of(settings.dataset, arguments.data, not arguments.data)
    images = split(data, settings.validation, settings.seed).validation_images[:128]
    device = torch.device(arguments.device)
    features = net.to(device).features(images.to(device)).detach()
    measured = [_cost(net, features, rtol) for rtol in TOLERANCES[:: 2 if arguments.quick else 1]]
    steps = [record for record in _records(run_folder / STEPS) if record["nfe"] is not None]
    trained = [(record["step"], record["nfe"]) for record in steps]
    path = save_figure(cost_figure(measured, trained), out / "fig3.png")
    _tell(arguments, f"drawn in {path}")
    thinned = trained[:: max(1, len(trained) // 200)]
    return {"figure": str(path), "costs": measured, "training": thinned}


def _cost(net: ODENet, features: Tensor, rtol: float) -> dict[str, float]:
    """What one solve of the block costs at a tolerance, and how far it is off."""
    block = net.block
    with block.using(method="dopri5", rtol=1e-7), torch.no_grad():
        exact = block(features)
    with block.using(method="dopri5", rtol=rtol, gradient="adjoint"):
        start = time.perf_counter()
        end = block(features)
        seconds = time.perf_counter() - start
        assert block.stats is not None
        (end / end.detach().norm()).square().sum().backward()
        return {
            "rtol": rtol,
            "nfe": block.stats.nfe,
            "nfe_backward": block.stats.nfe_backward,
            "seconds": seconds,
            "error": ((end.detach() - exact).norm() / exact.norm()).item(),
        }


# --- table 1 --------------------------------------------------------------------------------------


def table(out: Path, arguments: Namespace) -> dict[str, Any]:
    """Test error of every row, mean and standard error over seeds, with sizes and times.

    Each training has a run folder of its own: what is finished is read, what was stopped goes on.
    """
    found: dict[str, Any] = {}
    for row in arguments.rows or ROWS:
        runs = [_row(out, row, seed, arguments) for seed in range(arguments.seeds)]
        found[row] = _summary(runs)
        _tell(arguments, _told(row, found[row]))
    if not arguments.json:
        print("\n".join([HEADER, *(_told(row, one) for row, one in found.items())]))
    return {"rows": found}


def _row(out: Path, row: str, seed: int, arguments: Namespace) -> dict[str, Any]:
    if row not in ROWS:
        raise InputError(f"{row!r} is no row of the table; known are {', '.join(ROWS)}")
    ode = TABLE_ODE if row.startswith(("odenet", "rk-net")) else ()
    given = (*_base(arguments), *ode, *ROWS[row], "--seed", str(seed))
    return _finished(out / f"{row}-{seed}", given, arguments)


def _base(arguments: Namespace) -> tuple[str, ...]:
    """The arguments that all nets share."""
    given = QUICK if arguments.quick else TABLE
    for name in ("dataset", "data", "epochs"):
        if (value := getattr(arguments, name)) is not None:
            given = (*given, f"--{name}", str(value))
    return (*given, "--device", arguments.device)


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    errors = [one["test_error"] for one in runs]
    count = len(errors)
    spread = statistics.stdev(errors) / math.sqrt(count) if count > 1 else None
    return {
        "test_error": statistics.mean(errors),
        "standard_error": spread,
        "seeds": count,
        "parameters": runs[0]["parameters"],
        "seconds_a_step": statistics.mean(one["training_seconds"] / one["steps"] for one in runs),
        "nfe": runs[-1]["nfe"],
        "nfe_backward": runs[-1]["nfe_backward"],
    }


HEADER = f"{'net':<20}{'test error %':<18}{'parameters':<13}{'ms a step':<11}{'NFE':<8}backward"


def _told(row: str, one: dict[str, Any]) -> str:
    error = f"{100 * one['test_error']:.2f}"
    if one["standard_error"] is not None:
        error += f" ± {100 * one['standard_error']:.2f} ({one['seeds']})"
    spent = ("–", "–") if one["nfe"] is None else (f"{one['nfe']:g}", f"{one['nfe_backward']}")
    milliseconds = f"{1e3 * one['seconds_a_step']:.0f}"
    sizes = f"{one['parameters']:<13,}{milliseconds:<11}{spent[0]:<8}{spent[1]}"
    return f"{row:<20}{error:<18}{sizes}"


# --- runs -----------------------------------------------------------------------------------------


def _finished(folder: Path, given: tuple[str, ...], arguments: Namespace) -> dict[str, Any]:
    """The figures of a run in that folder, trained now unless it is finished already."""
    from cnf.cli.parser import parse

    wanted = parse(["mnist", "classify", *given, "--out", str(folder), "--quiet"], "")
    if (folder / FIGURES).is_file() and (folder / MODEL).is_file():
        settings = chosen(wanted.preset, classify.given_settings(wanted))
        if settings_of(read_json(folder / CONFIG)["settings"]) != settings:
            raise InputError(f"{folder} holds a run of other settings; choose another --out")
        return read_json(folder / FIGURES)
    wanted.resume = (folder / CONFIG).is_file() and Snapshots(folder / SNAPSHOT).exist
    _tell(arguments, f"{'going on with' if wanted.resume else 'training'} {folder}")
    return classify.classified(wanted)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a run's steps."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _tell(arguments: Namespace, message: str) -> None:
    if not arguments.quiet:
        print(message, file=sys.stderr)


MAKERS: dict[str, Callable[[Path, Namespace], dict[str, Any]]] = {
    "fig2": polygons,
    "fig3": costs,
    "fig4": fig4.planar_flows,
    "fig5": fig5.courses,
    "table1": table,
}
