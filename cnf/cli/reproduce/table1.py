"""Table 1 of Chen et al. 2018: test errors, sizes, memory and time of the nets, measured here."""

from __future__ import annotations

import math
import re
import statistics
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cnf.cli.finished import SOLVER, figures_of, finished, given, settings_for
from cnf.cli.folder import CONFIG, json_text, read_json
from cnf.cli.reproduce.footprint import Footprint, footprint
from cnf.cli.training import tell
from cnf.error import InputError
from cnf.odenet.network import parameter_count
from cnf.odenet.recipe import build
from cnf.odenet.settings import Settings
from cnf.replace import replacing

# the rows, as arguments of `cnf mnist classify`
ROWS: dict[str, tuple[str, ...]] = {
    "mlp": ("--net", "mlp"),
    "resnet": ("--net", "resnet"),
    "one-block": ("--net", "one-block"),
    "no-block": ("--net", "no-block"),
    "rk-net": ("--net", "rk-net", *SOLVER),
    "odenet-checkpoint": ("--gradient", "checkpoint", *SOLVER),
    "odenet-adjoint": ("--gradient", "adjoint", *SOLVER),
    "odenet-reversible": ("--gradient", "reversible", *SOLVER),
}
REFERENCE = "resnet"  # what the others are paired with
GROWTH = "growth.json"
SHAPES = {"digits": (1, 8, 8)}
MIB = 2**20


def table(out: Path, arguments: Namespace) -> dict[str, Any]:
    """Every row of the table: those that were asked for are trained first, unless they are.

    Each training has a run folder of its own, ROW-SEED: what was stopped goes on.  A row of which
    no training is finished says by which command it is made.
    """
    asked = arguments.rows or list(ROWS)
    for row in asked:
        if row not in ROWS:
            raise InputError(f"{row!r} is no row of the table; known are {', '.join(ROWS)}")
    if not arguments.no_training:
        for row in asked:
            for seed in range(arguments.seed, arguments.seed + arguments.seeds):
                figures = finished(out / f"{row}-{seed}", _given(row, seed, arguments), arguments)
                tell(arguments, f"{row}, seed {seed}: {100 * figures['test_error']:.2f} % wrong")
    runs = {row: _runs(out, row, arguments) for row in ROWS}
    measured = [] if arguments.train_only else asked
    rows = {row: _row(row, runs, out, arguments, row in measured) for row in ROWS}
    if not arguments.json:
        print("\n".join(lines(rows)))
    return {"rows": rows}


def _given(row: str, seed: int, arguments: Namespace) -> tuple[str, ...]:
    return given(arguments, *ROWS[row], "--seed", str(seed))


def _runs(out: Path, row: str, arguments: Namespace) -> dict[int, dict[str, Any]]:
    """The figures of the row's finished trainings, by seed."""
    names = (re.fullmatch(rf"{row}-(\d+)", path.name) for path in out.iterdir())
    found = {}
    for seed in sorted(int(name[1]) for name in names if name):
        folder = out / f"{row}-{seed}"
        figures = figures_of(folder, _given(row, seed, arguments))
        if figures is not None:
            config = read_json(folder / CONFIG)
            versions = config.get("versions", {})
            where = config.get("hardware") or versions.get("system")  # older runs have no hardware
            found[seed] = figures | {"hardware": where, "torch": versions.get("torch")}
    return found


# --- what a row says ------------------------------------------------------------------------------


def _row(
    row: str, runs: dict[str, dict[int, dict[str, Any]]], out: Path, arguments: Namespace,
    is_asked: bool,
) -> dict[str, Any]:  # fmt: skip
    """Everything that is known of a row."""
    settings = settings_for(_given(row, 0, arguments))
    shape = SHAPES.get(settings.dataset, (1, 28, 28))
    size = _footprint(row, settings, shape, out, arguments, is_asked)
    own, reference = runs[row], runs[REFERENCE]
    found: dict[str, Any] = {
        "parameters": parameter_count(build(settings, shape, 10)),
        "footprint": None if size is None else asdict(size),
        "memory_growth": None if size is None else size.growth(size.bytes),
        "time_growth": None if size is None else size.growth(size.seconds),
    }
    if not own:
        return found | {"command": _command(row, out, arguments)}
    return found | {
        "error": mean_error(own),
        "difference": None if row == REFERENCE else paired_difference(own, reference),
        "seeds": list(own),
        "epochs": settings.epochs,
        "hours": statistics.mean(one["training_seconds"] for one in own.values()) / 3600,
        "steps": [one["steps"] for one in own.values()],
        "nfe": _mean(one["nfe"] for one in own.values()),
        "nfe_backward": _mean(one["nfe_backward"] for one in own.values()),
        "hardware": sorted({f"{one['hardware']}, torch {one['torch']}" for one in own.values()}),
    }


def mean_error(runs: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Mean test error and its standard error: over seeds, over images where there is one seed."""
    errors = [one["test_error"] for one in runs.values()]
    if len(errors) > 1:
        spread, over = statistics.stdev(errors) / math.sqrt(len(errors)), "seeds"
    else:
        (one,) = runs.values()
        spread, over = one["test_standard_error"], "images"
    return {"mean": statistics.mean(errors), "standard_error": spread, "over": over}


def paired_difference(
    runs: Mapping[int, dict[str, Any]], reference: Mapping[int, dict[str, Any]]
) -> dict[str, Any] | None:
    """The mean difference of the test errors of trainings with the same seed, which share split and
    test images, and its standard error; over images where there is one seed, None where none.
    """
    shared = [seed for seed in runs if seed in reference]
    if not shared:
        return None
    differences = [runs[seed]["test_error"] - reference[seed]["test_error"] for seed in shared]
    if len(shared) > 1:
        spread = statistics.stdev(differences) / math.sqrt(len(shared))
        return {"mean": statistics.mean(differences), "standard_error": spread, "over": "seeds"}
    ours, theirs = (_wrong(one[shared[0]]) for one in (runs, reference))
    spread = float((ours - theirs).std(ddof=1)) / math.sqrt(len(ours))
    return {"mean": differences[0], "standard_error": spread, "over": "images"}


def _wrong(figures: dict[str, Any]) -> np.ndarray:
    """1 for every test image that was classified wrongly, else 0."""
    found = np.zeros(figures["rows"]["test"])
    found[figures["wrong"]] = 1.0
    return found


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _command(row: str, out: Path, arguments: Namespace) -> str:
    parts = [f"cnf reproduce table1 --rows {row} --out {out}"]
    parts += ["--quick"] if arguments.quick else []
    for name in ("dataset", "epochs", "device"):
        value = getattr(arguments, name)
        parts += [f"--{name} {value}"] if value not in (None, "cpu") else []
    return " ".join(parts)


# --- memory and time ------------------------------------------------------------------------------


def _footprint(
    row: str,
    settings: Settings,
    shape: Sequence[int],
    out: Path,
    arguments: Namespace,
    wanted: bool,
) -> Footprint | None:
    """As it was measured before, else measured now if it is wanted, else None."""
    path = out / GROWTH
    known = read_json(path) if path.is_file() else {}
    key = f"{row}, {arguments.device}, {arguments.threads or 'all'} threads"
    asked = asdict(settings) | {"seed": 0, "epochs": 0, "steps": None}
    try:
        if key in known and known[key]["settings"] == _plain(asked):
            return Footprint.from_json(known[key]["footprint"])
    except (LookupError, TypeError) as error:
        raise InputError(f"{path} is damaged; remove it, and it is measured again") from error
    if not wanted:
        return None
    tell(arguments, f"measuring an iteration of {row} at several depths")
    found = footprint(settings, shape, 10, arguments.device, arguments.threads)
    known[key] = {"settings": _plain(asked), "footprint": asdict(found)}
    with replacing(path) as file:
        file.write(f"{json_text(known, indent=2)}\n".encode())
    return found


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


# --- telling --------------------------------------------------------------------------------------

HEADER = (
    "net", "test error %", "less resnet's", "parameters", "MiB", "growth", "ms", "growth", "NFE",
    "backward", "trained",
)  # fmt: skip


def lines(rows: Mapping[str, dict[str, Any]]) -> list[str]:
    """The table as text, and below it what it does not say itself."""
    cells = [HEADER, *(_cells(row, one) for row, one in rows.items())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    machines = {one["footprint"]["machine"] for one in rows.values() if one["footprint"]}
    if machines:
        text.append(
            "MiB and ms: one iteration on a batch, forward and backward, of the shallowest depth "
            f"measured ({depths_of(rows)}), on {' and '.join(sorted(machines))}"
        )
    systems = sorted({name for one in rows.values() for name in one.get("hardware", ())})
    text += [f"trained on {name}" for name in systems]
    text += [
        f"{row} was not run: {one['command']}" for row, one in rows.items() if "command" in one
    ]
    return text


def _cells(row: str, one: dict[str, Any]) -> tuple[str, ...]:
    size = one["footprint"]
    told: list[str] = [f"{one['parameters']:,}"]
    for name, growth, scale, digits in (
        ("bytes", "memory_growth", 1 / MIB, 2), ("seconds", "time_growth", 1e3, 1)
    ):  # fmt: skip
        value = None if size is None else size[name][0]
        told.append("–" if value is None else f"{value * scale:.0f}")
        told.append(_growth(one[growth], size, scale, digits))
    if "error" not in one:
        return (row, "not run", "–", *told, "–", "–", "–")
    spent = ("–" if one[name] is None else f"{one[name]:.0f}" for name in ("nfe", "nfe_backward"))
    trained = f"{one['epochs']} epochs, {one['hours']:.1f} h"
    return (row, _percent(one["error"], one["seeds"]), _percent(one["difference"]), *told, *spent,
            trained)  # fmt: skip


def _percent(value: dict[str, Any] | None, seeds: Sequence[int] = ()) -> str:
    if value is None:
        return "–"
    sign = "" if seeds else "+"
    text = f"{100 * value['mean']:{sign}.2f} ± {100 * value['standard_error']:.2f}"
    over = f"{len(seeds)} seeds" if len(seeds) > 1 else value["over"]
    return f"{text} ({over})"


def _growth(value: float | None, size: dict[str, Any] | None, scale: float, digits: int) -> str:
    if value is None or size is None:
        return "–"
    name = "an evaluation" if size["unit"] == "evaluation" else "a block"
    return f"+{value * scale:.{digits}f} {name}" if value else "none"


def depths_of(rows: Mapping[str, dict[str, Any]]) -> str:
    """The depths at which the nets were measured, such as "6 to 24 blocks"."""
    found: dict[str, set[int]] = {}
    for one in rows.values():
        if one["footprint"] and one["footprint"]["unit"]:
            found.setdefault(one["footprint"]["unit"], set()).update(one["footprint"]["depths"])
    return ", ".join(f"{min(all_)} to {max(all_)} {unit}s" for unit, all_ in found.items())
