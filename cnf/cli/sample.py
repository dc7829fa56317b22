"""`cnf sample`: draws from the flow of a run, as a table."""

from __future__ import annotations

from argparse import Namespace

from cnf.cli.device import usable_device
from cnf.cli.folder import json_text, read_run
from cnf.cli.output import checked_output
from cnf.cli.trained import context_of
from cnf.data.table import write_table


def run(arguments: Namespace) -> None:
    """Draw n samples and write them, with the columns of the training data."""
    output = checked_output(arguments.output, arguments.overwrite)
    trained = read_run(arguments.run_folder, usable_device(arguments.device))
    context = context_of(arguments.context, trained)
    samples = trained.flow.sample(arguments.n, context, seed=arguments.seed, nfe=arguments.nfe)
    write_table(output, samples, trained.columns if output.suffix.lower() == ".csv" else None)
    if arguments.json:
        print(json_text({"file": str(output), "rows": arguments.n, "columns": trained.columns}))
    else:
        print(f"{arguments.n:,} samples of {trained.flow.dim} columns in {output}")
