"""`cnf logprob`: the log-density of a table's rows under the flow of a run."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

import torch

from cnf.cli.device import usable_device
from cnf.cli.folder import Run, json_text, read_run
from cnf.cli.output import checked_output
from cnf.data.rows import listed
from cnf.data.table import Table, read_table, write_table
from cnf.error import InputError
from cnf.flow.report import mean_and_error, measured


@torch.no_grad()
def run(arguments: Namespace) -> None:
    """Write log p(x) of every row in nats, and print their mean with its standard error."""
    output = checked_output(arguments.output, arguments.overwrite)
    trained = read_run(arguments.run_folder, usable_device(arguments.device))
    table = _rows(arguments.file, arguments.columns, trained)
    if trained.dequantized:
        noisy = f"uniform noise in column {listed(trained.dequantized)}"
        message = f"cnf: {trained.path} was trained with {noisy}; rows are taken as they are"
        print(message, file=sys.stderr)
    log_prob, info = trained.flow.log_prob(table.values, return_info=True)
    write_table(output, log_prob, ["log_prob"])
    mean, error = mean_and_error(log_prob.cpu().double())
    figures = {"file": str(output), "rows": len(log_prob), "mean": mean, "mean_error": error}
    if arguments.json:
        print(json_text({**figures, "nfe": info.nfe, "divergence": info.divergence}))
    else:
        print(f"mean log p(x) {measured(mean, error)} nats, {len(log_prob):,} rows in {output}")


def _rows(file: str, columns: Sequence[str] | None, trained: Run) -> Table:
    """The columns of the file that the run was trained on."""
    if columns is None and trained.named:
        return _by_name(file, trained)
    return _as_wide(read_table(file, columns), file, trained)


def _by_name(file: str, trained: Run) -> Table:
    """By the names in the file's header; in order where it has none."""
    try:
        return read_table(file, trained.columns)
    except InputError as error:
        try:
            table = read_table(file)
        except InputError:
            raise error from None  # the file would not do in either way
        if table.columns != tuple(map(str, range(len(table.columns)))):
            raise
        return _as_wide(table, file, trained)


def _as_wide(table: Table, file: str, trained: Run) -> Table:
    found, expected = len(table.columns), len(trained.columns)
    if found == expected:
        return table
    raise InputError(
        f"{file} has {found} column{'s'[: found != 1]}, but {trained.path} was trained on "
        f"{expected} ({listed(trained.columns, 5)}); choose as many with --columns"
    )
