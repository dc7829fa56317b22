"""`cnf reproduce`: the table and the figures of Chen et al. 2018, measured here."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cnf.cli.folder import json_text
from cnf.cli.reproduce import adjoint, fig2, fig3, fig4, fig5, table1
from cnf.replace import replacing

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
    out = Path(arguments.out or Path("runs", arguments.what))
    out.mkdir(parents=True, exist_ok=True)
    figures = MAKERS[arguments.what](out, arguments)
    with replacing(out / f"{arguments.what}.json") as file:
        file.write(f"{json_text(figures, indent=2)}\n".encode())
    if arguments.json:
        print(json_text(figures))
