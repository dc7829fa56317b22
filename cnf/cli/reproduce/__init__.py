"""`cnf reproduce`: the table and the figures of Chen et al. 2018, measured here."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cnf.cli.device import usable_device
from cnf.cli.folder import json_text
from cnf.cli.reproduce import adjoint, fig2, fig3, fig4, fig5, table1
from cnf.error import InputError
from cnf.replace import replacing

ON_CPU = ("fig2", "fig4", "fig5", "adjoint")  # small nets, which a GPU would not make faster
MAKERS: dict[str, Callable[[Path, Namespace], dict[str, Any]]] = {
    "table1": table1.table,
    "fig2": fig2.polygons,
    "fig3": fig3.costs,
    "fig4": fig4.planar_flows,
    "fig5": fig5.courses,
    "adjoint": adjoint.adjoints,
}


def run(arguments: Namespace) -> None:
    """Make the figure or the table that was named; what was measured goes to stdout as well."""
    if usable_device(arguments.device).type != "cpu" and arguments.what in ON_CPU:
        raise InputError(
            f"`cnf reproduce {arguments.what}` is made on the CPU; leave --device "
            f"{arguments.device} out"
        )
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    out = _made(Path(arguments.out or Path("runs", arguments.what)))
    try:
        figures = MAKERS[arguments.what](out, arguments)
    except KeyboardInterrupt as interrupt:
        if not interrupt.args:
            raise
        # a net on the way to it was stopped, whose own command does not make the figure
        raise KeyboardInterrupt("the same command goes on from here") from None
    with replacing(out / f"{arguments.what}.json") as file:
        file.write(f"{json_text(figures, indent=2)}\n".encode())
    if arguments.json:
        print(json_text(figures))


def _made(out: Path) -> Path:
    """The folder, which is there now.  Raises InputError where it cannot be made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the folder {out} cannot be made ({error.strerror}); choose another --out"
        ) from error
    return out
