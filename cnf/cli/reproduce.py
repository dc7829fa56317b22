"""`cnf reproduce`: figures of Chen et al. 2018, drawn by what is trained on the spot."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cnf.cli import fig4, fig5
from cnf.cli.folder import json_text
from cnf.replace import replacing


def run(arguments: Namespace) -> None:
    """Make the figure that was named; what was measured goes to stdout as well."""
    out = Path(arguments.out or Path("runs", arguments.what))
    out.mkdir(parents=True, exist_ok=True)
    figures = MAKERS[arguments.what](out, arguments)
    with replacing(out / f"{arguments.what}.json") as file:
        file.write(f"{json_text(figures, indent=2)}\n".encode())
    if arguments.json:
        print(json_text(figures))


# a function that trains, draws into the folder, and returns what was measured
MAKERS: dict[str, Callable[[Path, Namespace], dict[str, Any]]] = {
    "fig4": fig4.planar_flows,
    "fig5": fig5.courses,
}
