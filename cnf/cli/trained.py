"""The columns of a file that a run was trained on, and the context that its draws are given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cnf.cli.folder import Run
from cnf.data.rows import listed
from cnf.data.table import Table, read_table
from cnf.error import InputError


def rows_of(
    file: str, columns: Sequence[str] | None, trained: Run
) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows of the columns of the file that the run was trained on, and their contexts if any.

    columns: their names or indices in the file, those of the context at the end.
    """
    if columns is None and trained.named:
        values = _by_name(file, trained).values
    else:
        values = _as_wide(read_table(file, columns), file, trained).values
    if not trained.context:
        return values, None
    return values[:, : trained.flow.dim], values[:, trained.flow.dim :]


def _by_name(file: str, trained: Run) -> Table:
    """By the names in the file's header; in order where it has none."""
    try:
        return read_table(file, [*trained.columns, *trained.context])
    except InputError as error:
        try:
            table = read_table(file)
        except InputError:
            raise error from None  # the file would not do in either way
        if table.columns != tuple(map(str, range(len(table.columns)))):
            raise
        return _as_wide(table, file, trained)


def _as_wide(table: Table, file: str, trained: Run) -> Table:
    names = (*trained.columns, *trained.context)
    found, expected = len(table.columns), len(names)
    if found == expected:
        return table
    raise InputError(
        f"{file} has {found} column{'s'[: found != 1]}, but {trained.path} was trained on "
        f"{expected} ({listed(names, 5)}); choose as many with --columns"
    )


def context_of(values: list[float] | None, trained: Run) -> list[float] | None:
    """The values of one context, as many as the run was trained on; None where it has none."""
    found, names = len(values or ()), trained.context
    if found != len(names):
        wanted = f"gives {listed(names)} in this order" if names else "is not needed here"
        raise InputError(
            f"{trained.path} was trained on {len(names)} columns of context, got {found} values; "
            f"--context {wanted}"
        )
    return values
