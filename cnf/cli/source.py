"""Data by name or file, split into rows to train on, to choose weights by, and to judge by."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.data.density import TOY_NAMES, Toy, toy
from cnf.data.digits import LEVELS, SHAPE, dequantize, load_digits
from cnf.data.rows import constant_columns, listed, repeated_columns
from cnf.data.table import Table, read_table
from cnf.error import InputError
from cnf.flow.split import LAZY_BYTES
from cnf.training.seed import seeded

NAMES = (*TOY_NAMES, "digits")
TOY_ROWS, TOY_VALIDATION, TOY_HELD_OUT = 500_000, 2000, 10_000
TRAIN_DRAWS, VALIDATION_DRAWS, HELD_OUT_DRAWS = 20, 3, 5  # noises for each image
LEAST_ROWS = 10  # to train on
SHARE = 0.15  # of a table's rows for validation, and as many held out
MOST_ROWS = 10_000  # of each, in a large table
FINEST = 1e-6  # of a column's range: values closer than that lie on no grid


@dataclass(frozen=True, eq=False)
class Source:
    """Rows of float32 and what is known of them.

    context: names of what the density is to be conditional on, whose columns follow those of the
    data in all rows; train: (rows, dim), a memory map where the file is large; validation: (rows,
    dim); held_out:
    (draws, rows, dim), more than one draw where every row has several noises; law: the density
    that toy points come from; levels, shape: of the pixels of images; details: JSON values for
    config.json; warnings: sentences for the user.
    """

    name: str
    train: Tensor | np.ndarray
    validation: Tensor
    held_out: Tensor
    columns: tuple[str, ...]
    named: bool = False
    law: Toy | None = None
    levels: int | None = None
    shape: tuple[int, int] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    context: tuple[str, ...] = ()

    @property
    def dim(self) -> int:
        return self.held_out.shape[-1] - len(self.context)

    def parts(self, rows: Any) -> tuple[Any, Any]:
        """The data of some rows, and their contexts, or None where there are none."""
        if not self.context:
            return rows, None
        return rows[..., : self.dim], rows[..., self.dim :]

    @property
    def description(self) -> dict[str, Any]:
        """The data as JSON values, for config.json."""
        rows = {
            "train": len(self.train),
            "validation": len(self.validation),
            "held_out": self.held_out.shape[1],
        }
        return {
            "name": self.name,
            **self.details,
            "columns": list(self.columns),
            "context": list(self.context),
            "named": self.named,
            "rows": rows,
            "levels": self.levels,
        }


def read_source(
    data: str,
    *,
    seed: int,
    rows: int | None = None,
    columns: Sequence[str] | None = None,
    context: Sequence[str] = (),
    dequantized: bool = False,
) -> Source:
    """The data that `data`, a name or a path, stands for.

    seed: of toy points, noise and the split of a file; rows: toy points to train on; columns,
    context, dequantized: for files, see `table_source`.
    Raises InputError for data that cannot be used.
    """
    is_file = data not in NAMES
    if rows is not None and data not in TOY_NAMES:
        raise InputError(f"--rows is for toy sets, and {data!r} is none; leave it out")
    if not is_file and (columns is not None or context or dequantized):
        raise InputError(
            f"--columns, --context and --dequantize are for files, not {data!r}; leave them out"
        )
    if data in TOY_NAMES:
        return toy_source(data, seed, TOY_ROWS if rows is None else rows)
    if data == "digits":
        return digits_source(seed)
    if not (Path(data).suffix or os.sep in data or Path(data).exists()):
        _refuse_name(data)
    return table_source(data, seed, columns, dequantized, context)


def _refuse_name(data: str) -> None:
    close = difflib.get_close_matches(data, NAMES, n=1)
    hint = f", did you mean {close[0]!r}" if close else ""
    raise InputError(
        f"{data!r} is no data set{hint}; known are {', '.join(NAMES)}, and a file is named with "
        "its suffix .csv, .npy or .npz"
    )


def toy_source(name: str, seed: int, rows: int) -> Source:
    """Points of a toy set: `rows` to train on, and fresh ones for the rest."""
    if rows < LEAST_ROWS:
        raise InputError(f"--rows is {rows}, too few for a density; give at least {LEAST_ROWS}")
    law = toy(name)
    return Source(
        name,
        _drawn(law, rows, seed),
        _drawn(law, TOY_VALIDATION, _derived(seed, 1)),
        _drawn(law, TOY_HELD_OUT, _derived(seed, 2))[None],
        ("x1", "x2"),
        law=law,
        details={"kind": "toy"},
    )


def _drawn(law: Toy, rows: int, seed: int) -> Tensor:
    with seeded(seed, torch.device("cpu")):
        return law.sample((rows,))


def _derived(seed: int, stream: int) -> int:
    """A seed that shares nothing with its neighbours': seed + 1 is what the user tries next."""
    return int(np.random.SeedSequence([seed, stream]).generate_state(1)[0])


def digits_source(seed: int) -> Source:
    """The 8 × 8 digits as (pixel + u) / 17, every image with several noises u."""
    digits = load_digits()
    noise = torch.Generator().manual_seed(seed)

    def noisy(pixels: np.ndarray, draws: int) -> Tensor:
        """(draws, rows, dim)"""
        return dequantize(np.tile(pixels, (draws, 1, 1)), noise)

    return Source(
        "digits",
        noisy(digits.train, TRAIN_DRAWS).flatten(0, 1),
        noisy(digits.validation, VALIDATION_DRAWS).flatten(0, 1),
        noisy(digits.test, HELD_OUT_DRAWS),
        tuple(f"pixel{i}" for i in range(digits.train.shape[1])),
        levels=LEVELS,
        shape=SHAPE,
        details={"kind": "digits", "draws": [TRAIN_DRAWS, VALIDATION_DRAWS, HELD_OUT_DRAWS]},
    )


# --- files ----------------------------------------------------------------------------------------


def table_source(
    path: str,
    seed: int,
    columns: Sequence[str] | None = None,
    dequantized: bool = False,
    context: Sequence[str] = (),
) -> Source:
    """The rows of a .csv, .npy or .npz file, split by the seed.

    columns: those to keep, by name or index, by default all that are no context; context: those
    that the density is to be conditional on; dequantized: add uniform noise, as wide as the
    smallest distance of two values, to columns whose values repeat.
    Raises InputError for a file that cannot be read, constant columns and too few rows.
    """
    table, given = _tables(path, columns, context)
    values, names = table.values, table.columns
    lazy = isinstance(values, np.memmap) and values.nbytes > LAZY_BYTES
    held = min(round(SHARE * len(values)), MOST_ROWS)
    if len(values) - 2 * held < LEAST_ROWS:
        raise InputError(
            f"{path} has {len(values)} row{'s'[: len(values) != 1]}, too few for a density; "
            f"{LEAST_ROWS} to train on, and some to judge by, are needed"
        )
    if lazy and dequantized:
        raise InputError(f"{path} is too large to --dequantize here; add the noise to the file")
    _refuse_constant(values if lazy else values.astype(np.float32), names, path)

    repeated = repeated_columns(values)
    warnings, spacing = _repetition(values, repeated, names, dequantized)
    if spacing:
        values = _noisy(values, spacing, _derived(seed, 3))
    if given is not None:
        values, lazy = np.concatenate([values, given.values], 1), False
    parts = _last_rows(values, held) if lazy else _random_rows(values, held, seed)
    if lazy:
        warnings.append(f"{path} is not loaded: its last {held} rows are held out, unshuffled")
    train, validation, held_out = parts
    return Source(
        Path(path).stem,
        train,
        _tensor(validation),
        _tensor(held_out)[None],
        names,
        named=names != tuple(map(str, range(len(names)))),
        details={
            "kind": "table",
            "file": os.path.abspath(path),
            "bytes": Path(path).stat().st_size,
            "dequantized": {names[i]: width for i, width in spacing.items()},
        },
        warnings=tuple(warnings),
        context=() if given is None else given.columns,
    )


def _tables(
    path: str, columns: Sequence[str] | None, context: Sequence[str]
) -> tuple[Table, Table | None]:
    """The columns of the data, and those of the context if there are any."""
    if not context:
        return read_table(path, columns), None
    given = read_table(path, context)
    if columns is None:
        columns = [name for name in read_table(path).columns if name not in given.columns]
        if not columns:
            raise InputError(f"{path} has no column besides --context; name fewer of them")
    table = read_table(path, columns)
    both = [name for name in table.columns if name in given.columns]
    if both:
        raise InputError(
            f"column {listed(both)} of {path} is data and context at once; name it in --columns or "
            "in --context"
        )
    return table, given


def _refuse_constant(values: np.ndarray, names: Sequence[str], path: str) -> None:
    constant = constant_columns(values)
    if constant:
        others = [name for i, name in enumerate(names) if i not in constant]
        remedy = f"choose others with --columns {','.join(others[:10])}" if others else "drop it"
        raise InputError(
            f"{path} has the same value in every row of column "
            f"{listed([names[i] for i in constant])}, which has no density; {remedy}"
        )


def _repetition(
    values: np.ndarray, repeated: Sequence[int], names: Sequence[str], dequantized: bool
) -> tuple[list[str], dict[int, float]]:
    """Warnings of columns that repeat, and the width of the noise for those that get some."""
    if not dequantized:
        return _warned(names, repeated, "has a density only with noise; try --dequantize"), {}
    spacing = {i: _spacing(np.asarray(values[:, i])) for i in repeated}
    coarse = {i: width for i, width in spacing.items() if width > 0}
    fine = [i for i in repeated if i not in coarse]
    warnings = _warned(names, fine, "lies on no grid, so noise does not help; leave it out")
    if not repeated:
        warnings.append("no column repeats its values, so --dequantize changes nothing")
    return warnings, coarse


def _warned(names: Sequence[str], columns: Sequence[int], consequence: str) -> list[str]:
    if not columns:
        return []
    return [
        f"repeated or whole numbers in column {listed([names[i] for i in columns])}: "
        f"what repeats {consequence}"
    ]


def _spacing(column: np.ndarray) -> float:
    """The smallest distance of two values, or 0 where that is no grid's."""
    values = np.unique(column.astype(np.float64))
    smallest = float(np.diff(values).min())
    return smallest if smallest > FINEST * (values[-1] - values[0]) else 0.0


def _noisy(values: np.ndarray, spacing: dict[int, float], seed: int) -> np.ndarray:
    values = values.astype(np.float64)
    noise = np.random.default_rng(seed)
    for column, width in spacing.items():
        values[:, column] += width * noise.random(len(values))
    return values


def _random_rows(values: np.ndarray, held: int, seed: int) -> list[np.ndarray]:
    """Rows to train on, to validate and held out, in an order of the seed."""
    order = np.random.default_rng(seed).permutation(len(values))
    held_out, validation, train = np.split(order, [held, 2 * held])
    return [values[part].astype(np.float32) for part in (train, validation, held_out)]


def _last_rows(values: np.ndarray, held: int) -> list[np.ndarray]:
    """The same from the end of the table, in its own order: the rows to train on stay mapped."""
    count = len(values)
    return [values[: count - 2 * held], values[count - 2 * held : -held], values[-held:]]


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32))
