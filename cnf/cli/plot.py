"""`cnf plot`: figures of a run, drawn when they are asked for."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from cnf.cli.check import checked_rows
from cnf.cli.device import usable_device
from cnf.cli.folder import TRADEOFF, Run, json_text, read_run
from cnf.error import InputError
from cnf.plot import save_figure, tradeoff_figure

SUFFIXES = (".png", ".pdf", ".svg")


def run(arguments: Namespace) -> None:
    """Draw what `--what` names; the figures behind it go to stdout."""
    if arguments.output and Path(arguments.output).suffix.lower() not in SUFFIXES:
        raise InputError(
            f"-o {arguments.output} is no figure; give it the suffix {', '.join(SUFFIXES)}"
        )
    trained = read_run(arguments.run_folder, usable_device(arguments.device))
    {"tradeoff": _tradeoff}[arguments.what](trained, arguments)


def _tradeoff(trained: Run, arguments: Namespace) -> None:
    """Error and time against evaluations, as a table and a figure."""
    found = trained.flow.tradeoff(*checked_rows(trained, arguments))
    path = Path(arguments.output) if arguments.output else trained.path / TRADEOFF
    *budgets, own = found.settings
    curves = {
        name: [(one.nfe, one.log_prob_error, one.seconds) for one in budgets if one.method == name]
        for name in dict.fromkeys(one.method for one in budgets)
    }
    figure = tradeoff_figure(curves, (own.nfe, own.log_prob_error, own.seconds), trained.path.name)
    save_figure(figure, path)
    if arguments.json:
        print(json_text({"file": str(path), **found.as_dict()}))
    else:
        print(f"{found}\n{path}")
