"""`cnf check`: whether the log-densities of a run can be trusted."""

from __future__ import annotations

from argparse import Namespace

import torch

from cnf.cli.device import usable_device
from cnf.cli.folder import Run, json_text, read_run
from cnf.cli.trained import context_of, rows_of
from cnf.error import InputError
from cnf.flow.check import ROWS


def run(arguments: Namespace) -> None:
    """Measure what must agree on the rows of a file, or on draws of the flow, and say what came."""
    trained = read_run(arguments.run_folder, usable_device(arguments.device))
    x, context = checked_rows(trained, arguments)
    found = trained.flow.check(x, context)
    if arguments.json:
        print(json_text({"run": str(trained.path), **found.as_dict()}))
    else:
        print(found)


def checked_rows(trained: Run, arguments: Namespace) -> tuple[object, object]:
    """Rows and contexts of the file, or draws of the flow, given the context that was named."""
    if arguments.file is not None:
        if arguments.context is not None:
            raise InputError(
                f"--context is for draws, and the rows of {arguments.file} have their own; give "
                "one of them"
            )
        return rows_of(arguments.file, arguments.columns, trained)
    if arguments.columns is not None:
        raise InputError("--columns are those of a FILE, and none is named; name it, or leave them")
    if trained.context and arguments.context is None:
        raise InputError(
            f"{trained.path} is conditional, and draws need a context; give --context, or name a "
            "FILE with the columns of data and context"
        )
    context = context_of(arguments.context, trained)
    with torch.no_grad():
        return trained.flow.sample(ROWS, context, seed=0), context
