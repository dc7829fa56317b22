"""Rows of numbers from arrays, tensors and data frames, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.error import InputError

HUGE = 1e30  # beyond it the squares and sums of float32 overflow soon
BLOCK = 2**20  # entries looked at together: 8 MB of float64, whatever the table's size
REPEATED_ROWS = 100_000  # rows that `repeated_columns` looks at

_KINDS = dict(O="Python objects", U="text", T="text", S="bytes", M="dates", m="durations")
# float() takes "1" and a date's count, and drops an imaginary part
_NOT_REAL = (str, bytes, complex, np.complexfloating, np.datetime64, np.timedelta64)


# Rows for a flow ----------------------------------------------------------------------------


def as_rows(
    x: Any,
    dim: int | None = None,
    *,
    name: str = "x",
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
) -> Tensor:
    """`x` as a tensor of shape (rows, dim), checked to be finite.

    x: a tensor, array, memory map, data frame or nested list of real numbers of shape (rows, dim);
    shape (rows,) is taken where dim is 1. dim: the width that is expected; None takes any.
    name: what errors call it. dtype: torch's default float. device: x's own, or the CPU.
    A tensor keeps its gradient. Memory is shared with x where nothing has to be converted.

    Raises InputError, one sentence that names row and column, for a wrong shape, NaN or infinite
    values, values too large for dtype (1e30 for float32) and all that is not a real number.

    >>> as_rows([[1, 2], [3, 4], [5, 6]], 2).shape
    torch.Size([3, 2])
    >>> as_rows([[1, 2, 3], [4, 5, 6]], 2)
    Traceback (most recent call last):
    ...
    cnf.error.InputError: x has shape (2, 3), expected (n, 2); transpose it with x.T
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(
            f"dtype is {quoted(dtype)}, but rows are real numbers; "
            "use torch.float32 or torch.float64"
        )
    tensor = _two_dimensional(_tensor(x, name), dim, name)
    largest = torch.finfo(dtype).max
    limit = largest if dtype == torch.float64 else min(largest, HUGE)
    low, high = (float(bound) for bound in tensor.detach().aminmax())
    if not (-limit <= low and high <= limit):  # tell before anything leaves the device
        check_values(tensor.detach().cpu().numpy(), name, limit, _labels(x, tensor.shape[1]))
    try:
        return tensor.to(dtype=dtype, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise InputError(
            f"{name} cannot be moved to device {quoted(device)} ({reason(error)}); use device='cpu'"
        ) from error


def _tensor(x: Any, name: str) -> Tensor:
    """As float32 or float64, in which bounds can be taken; `x` itself if it is such a tensor."""
    if not isinstance(x, Tensor):
        values = as_float(_numbers(x, name))
        return torch.from_numpy(np.require(values, requirements=["C", "W"]))  # a map is copied
    if x.is_complex():
        _check_dtype(np.dtype(complex), name)
    if x.layout == torch.strided and not (x.is_nested or x.is_quantized or x.is_meta):
        if x.dtype in (torch.float32, torch.float64):
            return x
        with suppress(RuntimeError, TypeError):  # float4 and the like have no conversion
            return x.float() if x.element_size() < 4 else x.double()
    raise InputError(
        f"{name} is no plain tensor ({x.dtype}, {x.layout}, device {x.device}); "
        "pass a dense one of torch.float32 or torch.float64, such as x.to_dense()"
    )


def _two_dimensional(tensor: Tensor, dim: int | None, name: str) -> Tensor:
    shape = tuple(tensor.shape)
    if 0 in shape:
        raise InputError(f"{name} is empty, of shape {shape}; pass at least one row and one column")
    if len(shape) == 1 and dim == 1:
        return tensor[:, None]
    if len(shape) == 2 and dim in (None, shape[1]):
        return tensor
    if len(shape) == 1:
        remedy = f"reshape it, {name}.reshape(1, -1) for one row"
        remedy += f" or {name}.reshape(-1, 1) for one column" if dim is None else ""
    elif len(shape) != 2:
        remedy = "reshape it to two dimensions, one row for each sample"
    else:
        remedy = f"transpose it with {name}.T" if shape[0] == dim else f"pass {dim} columns"
    expected = "dim" if dim is None else dim
    raise InputError(f"{name} has shape {shape}, expected (n, {expected}); {remedy}")


def _labels(x: Any, width: int) -> Sequence[str]:
    """The names of a data frame's columns, or their indices."""
    columns = getattr(x, "columns", None)
    labels = [str(label) for label in columns] if isinstance(columns, Iterable) else []
    return labels if len(labels) == width else [str(i) for i in range(width)]


# What has no density ------------------------------------------------------------------------


def repeated_columns(values: Any) -> list[int]:
    """Indices of columns whose values repeat too much to have a density.

    values: (rows, columns); at most the first 100,000 rows are looked at. A column is named if
    - fewer than half of its values are distinct (rounded data), or
    - all of at least 20 values are whole numbers (counts, years, labels), or
    - one value takes more than a tenth of at least 20 rows (zero where nothing was measured).
    A constant column repeats and is named as well, see `constant_columns`.
    Raises InputError if values are not a table of numbers.

    >>> repeated_columns([[0.1, 5], [0.7, 5], [0.4, 6], [0.2, 5], [0.3, 6]])
    [1]
    """
    table = as_table(values)[:REPEATED_ROWS]
    return [i for i in range(table.shape[1]) if _repeats(np.asarray(table[:, i]))]


def _repeats(column: np.ndarray) -> bool:
    counts = np.unique(column, return_counts=True)[1]
    if len(column) < 20:
        return 2 * len(counts) < len(column)
    whole = bool((column == np.floor(column)).all())
    return whole or 2 * len(counts) < len(column) or 10 * int(counts.max()) > len(column)


def constant_columns(values: Any) -> list[int]:
    """Indices of columns in which every row has the same value, exactly.

    values: (rows, columns), all rows are looked at. Tell after the conversion to the dtype that
    is computed in: timestamps that differ in float64 may be one number in float32.
    Raises InputError if values are not a table of numbers.

    >>> constant_columns([[1.0, 2.0], [1.0, 3.0]])
    [0]
    """
    table = as_table(values)
    if len(table) == 0:
        return []
    return np.flatnonzero(table.min(axis=0) == table.max(axis=0)).tolist()


# Numbers ------------------------------------------------------------------------------------


def as_table(values: Any, name: str = "values") -> np.ndarray:
    """`values` as an array of shape (rows, columns) with a dtype of its own, (rows,) as a column.

    A memory map stays one.  Raises InputError if values are not a table of numbers.
    """
    table = _numbers(values, name)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2:
        raise InputError(
            f"{name} has shape {table.shape}, expected (rows, columns); "
            "reshape it to two dimensions"
        )
    return table


def _numbers(x: Any, name: str) -> np.ndarray:
    """`x` as an array of booleans, integers or floats of its own shape and dtype."""
    try:
        values = _array(x)
    except Exception as error:  # whatever a stranger's __array__ or to_numpy raises
        ragged = "inhomogeneous" in str(error)
        cause = "rows of unequal length" if ragged else f"a {type(x).__name__} of no known kind"
        raise InputError(
            f"{name} is {cause}; pass an array, a data frame or a tensor of shape (rows, columns)"
        ) from error
    if values.dtype.kind not in "biufc" and values.ndim == 2 and hasattr(x, "columns"):
        return _frame_numbers(values, _labels(x, values.shape[1]), name)
    _check_dtype(values.dtype, name)
    return values


def _array(x: Any) -> np.ndarray:
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        return (x.float() if x.is_floating_point() and x.element_size() < 4 else x).numpy()
    if isinstance(x, np.ma.MaskedArray) and x.dtype.kind in "biuf":
        return np.ma.filled(x.astype(np.result_type(x.dtype, np.float32)), np.nan)
    to_numpy = getattr(x, "to_numpy", None)
    return np.asanyarray(x if to_numpy is None else to_numpy())


def _frame_numbers(values: np.ndarray, labels: Sequence[str], name: str) -> np.ndarray:
    """A data frame of mixed dtypes as floats; `values` holds Python objects."""
    numbers = np.empty(values.shape)
    for (row, column), value in np.ndenumerate(values):
        try:
            if isinstance(value, _NOT_REAL):
                raise TypeError
            numbers[row, column] = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"column {quoted(labels[column])} of {name} has {quoted(value)} in row {row}, "
                "which is no number; convert or drop the column, or the rows without a value"
            ) from error
    return numbers


def as_float(values: np.ndarray) -> np.ndarray:
    """As float32 where that holds every value of the dtype, else float64; unchanged if it is."""
    target = np.result_type(values.dtype, np.float32)
    target = target if target.itemsize <= 8 else np.dtype(np.float64)
    if values.dtype == target:
        return values
    with np.errstate(over="ignore"):  # longer floats become infinite, which is refused later
        return np.asarray(values).astype(target)


def _check_dtype(dtype: np.dtype, name: str) -> None:
    if dtype.kind == "c":
        raise InputError(f"{name} is complex; pass the real and the imaginary part as two columns")
    if dtype.names:
        raise InputError(
            f"{name} holds records with the fields {listed(dtype.names)}; convert it "
            "with numpy.lib.recfunctions.structured_to_unstructured"
        )
    if dtype.kind not in "biuf":
        kind = _KINDS.get(dtype.kind, f"values of type {dtype}")
        raise InputError(f"{name} holds {kind}, not numbers; convert it with .astype(float)")


def check_values(
    values: np.ndarray,
    name: str,
    limit: float,
    labels: Sequence[str],
    lines: np.ndarray | None = None,
) -> None:
    """Raises InputError, with the place, if `values` (rows, columns) are not within ±limit.

    labels: the columns' names; lines: where each row stands in a text file.
    """
    bounds = ((float(block.min()), float(block.max())) for block in blocks(values))
    if all(-limit <= low and high <= limit for low, high in bounds):  # false for NaN as well
        return
    rows, columns = _where(values, lambda block: ~np.isfinite(block))
    kind, remedy = "missing, NaN or infinite values", "fill in or remove the rows"
    if not len(rows):
        rows, columns = _where(values, lambda block: np.abs(block).astype(float) > limit)
        kind = f"values beyond ±{limit:.3g}, too large to compute with"
        remedy = "rescale the column, for example divide it by its largest value"
    first, more = rows[:3], ", …" if len(rows) > 3 else ""
    if lines is None:
        place = f"row{plural(first)} {', '.join(map(str, first))}, counted from 0{more}"
    else:
        place = f"line{plural(first)} {', '.join(str(lines[row]) for row in first)}{more}"
    raise InputError(
        f"{name} has {kind} in {len(rows)} row{plural(rows)} ({place}), "
        f"column{plural(columns)} {listed([labels[i] for i in columns])}; {remedy}"
    )


def _where(
    values: np.ndarray, is_bad: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the rows and of the columns that have a bad entry."""
    marks = [(bad.any(axis=1), bad.any(axis=0)) for bad in map(is_bad, blocks(values))]
    rows, columns = zip(*marks, strict=True)
    return np.flatnonzero(np.concatenate(rows)), np.flatnonzero(np.any(columns, axis=0))


def blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    """Views of consecutive rows, small enough to look at whatever the table's size."""
    step = max(1, BLOCK // max(1, values.shape[1]))
    return (values[start : start + step] for start in range(0, len(values), step))


# Words --------------------------------------------------------------------------------------


def plural(items: Sized) -> str:
    """The letter that a noun before `items` ends with."""
    return "" if len(items) == 1 else "s"


def _clipped(value: object, width: int = 80) -> str:
    text = str(value)
    return text if len(text) <= width else text[: width - 1] + "…"


def quoted(value: object) -> str:
    """`value` in quotes, on one line and never long."""
    return _clipped(repr(_clipped(value, 40)))


def listed(names: Sequence[object], most: int = 10) -> str:
    text = ", ".join(quoted(name) for name in names[:most])
    return text + (f", … ({len(names)} in all)" if len(names) > most else "")


def reason(error: Exception) -> str:
    """The cause in the system's words, on one line."""
    return _clipped(" ".join((getattr(error, "strerror", None) or str(error)).split()))
