"""Tables of numbers: .csv, .npy and .npz files, read whole and written whole or not at all."""

from __future__ import annotations

import array
import csv
import difflib
import io
import itertools
import os
import re
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TextIO

import numpy as np

from cnf.data.rows import (
    HUGE,
    as_float,
    as_table,
    blocks,
    check_values,
    listed,
    plural,
    quoted,
    reason,
)
from cnf.error import InputError
from cnf.replace import replacing

MISSING = {"", "na", "n/a", "nan", "<na>", "null", "none", "?"}
DELIMITERS = ("\t", ";", ",")  # in this order: a decimal comma may stand beside the other two

_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of a broken byte
_DECIMAL_COMMA = re.compile(r"\s*[-+]?\d*,\d+([eE][-+]?\d+)?\s*")


@dataclass(frozen=True, eq=False)
class Table:
    """A table that was read: `values` of shape (rows, columns) and the columns' names.

    values: float32 or float64, finite; of an .npy file the read-only memory map itself.
    columns: names from the header, or "0", "1", … where the file has none.
    """

    values: np.ndarray
    columns: tuple[str, ...]


Columns = Sequence[str | int] | None
Record = tuple[int, list[str]]  # the line a record ends on, and its values
Draft = tuple[Table, np.ndarray | None]  # values not checked yet; the line of each row, if any


# Reading ------------------------------------------------------------------------------------


def read_table(path: str | os.PathLike[str], columns: Sequence[str | int] | None = None) -> Table:
    """The table in a .csv, .npy or .npz file, checked to be finite numbers below 1e30.

    columns: those to keep, in this order, by name or by zero-based index; None keeps all.

    .csv: UTF-8, separated by commas, semicolons or tabs, read as float64. The first line is a
    header if none of its values is a number, or if it counts 0, 1, 2, … over lines that do not
    (pandas' default names). An empty value, NA, null, None or ? is a missing one.
    .npy: memory-mapped, and only copied to convert it or to keep columns that are not evenly
    spaced; one dimension is one column. .npz: its only array.
    Booleans and integers become floats, float16 becomes float32; nothing is unpickled.

    Raises InputError, one sentence with file, line and column, for all that cannot be used.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "ages.csv")
    ...     _ = path.write_text("age,height,name\\n31,1.78,Ann\\n54,1.62,Bo\\n")
    ...     table = read_table(path, ["height", "age"])
    >>> table.columns, table.values.tolist()
    (('height', 'age'), [[1.78, 31.0], [1.62, 54.0]])
    """
    file = _existing_file(path)
    reader = _READERS[_suffix(file, _READERS, "read")]
    try:
        table, lines = reader(file, columns)
    except OSError as error:
        raise _not_readable(file, error) from error
    check_values(table.values, str(file), HUGE, table.columns, lines)
    return table


def _existing_file(path: str | os.PathLike[str]) -> Path:
    try:
        file = Path(path)
        status = file.stat()
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}; check its name and folder") from error
    except (OSError, ValueError, TypeError) as error:
        raise _not_readable(path, error) from error
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{path} is a folder; name a file in it")
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for and cannot be mapped
        raise InputError(f"{path} is no regular file; write its content to one first")
    if status.st_size == 0:
        raise InputError(f"{path} is empty (0 bytes); write the table again")
    return file


def _not_readable(path: object, error: Exception) -> InputError:
    return InputError(
        f"{path} cannot be read ({reason(error)}); give the path of a file you may read"
    )


def _suffix(path: Path, known: Iterable[str], verb: str) -> str:
    suffix = path.suffix.lower()
    if suffix not in known:
        found = f"the suffix {quoted(path.suffix)}" if suffix else "no suffix"
        raise InputError(
            f"{path} has {found}, but tables are {verb} as {', '.join(known)}; "
            "convert or rename the file"
        )
    return suffix


def _choose(columns: Columns, names: Sequence[str], path: Path) -> list[int]:
    """Indices of the chosen columns, in the order asked for."""
    if columns is None:
        return list(range(len(names)))
    chosen = [_index(choice, names, path) for choice in _several(columns)]
    if not chosen:
        raise InputError("columns is an empty list; name one column or leave it out to keep all")
    for index in chosen:
        if chosen.count(index) > 1:
            raise InputError(
                f"column {quoted(names[index])} of {path} is chosen twice, "
                "and a column beside its copy has no density; name it once"
            )
    return chosen


def _several(columns: Any) -> Iterable[Any]:
    if isinstance(columns, str | bytes) or not isinstance(columns, Iterable):
        given = quoted(columns)
        raise InputError(f"columns is {given}, a single value; give a list such as [{given}]")
    return columns


def _index(choice: str | int, names: Sequence[str], path: Path) -> int:
    text = str(choice).strip()
    if text in names and not isinstance(choice, Integral):
        if names.count(text) > 1:
            raise InputError(
                f"{path} has {names.count(text)} columns named {quoted(text)}; "
                f"choose by index, the first is {names.index(text)}"
            )
        return names.index(text)
    if text in (counted := _counted(names)):
        return counted.index(text)
    close = difflib.get_close_matches(text, names, n=1)
    remedy = f"did you mean {quoted(close[0])}" if close else "choose among them by name or index"
    raise InputError(
        f"{path} has no column {quoted(text)}, its columns are {listed(names)}; {remedy}"
    )


def _counted(items: Sequence[object]) -> list[str]:
    return [str(i) for i in range(len(items))]


# .csv ---------------------------------------------------------------------------------------


def _read_csv(path: Path, columns: Columns) -> Draft:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        records = _records(file, path)
        body = list(itertools.islice(records, 2))
        if not body:
            raise InputError(f"{path} holds nothing but blank lines; write the table again")
        if names := _header(body, path):
            del body[0]
        if not body:
            raise InputError(f"{path} holds a header and no rows below it; add rows of numbers")
        names = names or _counted(body[0][1])
        chosen = _choose(columns, names, path)
        values, lines = _parsed(itertools.chain(body, records), names, chosen, path)
    return Table(values, tuple(names[i] for i in chosen)), lines


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if broken := _NOT_UTF8.search(line):
            byte = ord(broken.group()) - 0xDC00
            raise InputError(
                f"line {number} of {path} is not UTF-8 text (byte 0x{byte:02x}); save it as UTF-8"
            )
        yield line


def _records(file: TextIO, path: Path) -> Iterator[Record]:
    """The lines that are not blank; blank ones may only begin and end the file."""
    lines = _lines(file, path)
    sample = list(itertools.islice(lines, 20))
    reader = csv.reader(
        itertools.chain(sample, lines),
        delimiter=_delimiter(sample),
        skipinitialspace=True,
        strict=True,
    )
    blank, begun = 0, False
    try:
        for record in reader:
            if len(record) < 2 and not any(map(str.strip, record)):
                blank = blank or reader.line_num
            elif blank and begun:
                raise InputError(
                    f"line {blank} of {path} is blank, with values below it; delete or fill it"
                )
            else:
                blank, begun = 0, True
                yield reader.line_num, record
    except csv.Error as error:
        cause = str(error).replace("\t", "tab")
        raise InputError(
            f"line {max(reader.line_num, 1)} of {path} cannot be split into values "
            f"({cause}); look for a quote that is not closed"
        ) from error


def _delimiter(sample: Sequence[str]) -> str:
    """The first mark that splits every line of the sample alike, else the first line at all."""
    widths = {mark: _widths(sample, mark) for mark in DELIMITERS}
    splits = [mark for mark in DELIMITERS if widths[mark] and widths[mark][0] > 1]
    alike = [mark for mark in splits if len(set(widths[mark])) == 1]
    return [*alike, *splits, ","][0]


def _widths(sample: Sequence[str], mark: str) -> list[int]:
    try:
        return [len(record) for record in csv.reader(sample, delimiter=mark) if record]
    except csv.Error:  # the strict reader will name the line
        return []


def _header(start: Sequence[Record], path: Path) -> list[str]:
    """The columns' names if the first of the two records holds them, else an empty list."""
    number, first = start[0]
    below = start[1][1] if len(start) > 1 else []
    kinds = [_kind(value) for value in first]
    if ("text" in kinds and "number" not in kinds) or _counts_columns(first, below):
        names = [name.strip() for name in first]
        names[0] = names[0].lstrip("# ") or names[0]  # numpy.savetxt writes "# a,b"
        return [name or _unnamed(i) for i, name in enumerate(names)]
    for value, kind, under in zip(first, kinds, below, strict=False):
        if kind == "text" and _kind(under) == "number":
            number_beside = first[kinds.index("number")]
            raise InputError(
                f"line {number} of {path} holds both text ({quoted(value)}) and numbers "
                f"({quoted(number_beside)}), so it is neither a header nor data; give every "
                "column a name that is no number, or correct the value"
            )
    return []


def _unnamed(column: int) -> str:
    """What a column is called whose name is left out."""
    return f"unnamed {column}"


def _counts_columns(first: Sequence[str], below: Sequence[str]) -> bool:
    """Whether these are pandas' default names, under which its index has none."""
    names = [name.strip() for name in first]
    if not names[0]:
        return len(names) > 1 and names[1:] == _counted(names[1:])
    decimals = not all(re.fullmatch(r"\s*[-+]?\d*\s*", value) for value in below)
    # two values are too few to tell 0, 1 the header from 0, 1 the data
    return decimals and len(names) > 2 and names == _counted(names)


def _kind(value: str) -> str:
    try:
        return "missing" if np.isnan(_number(value)) else "number"
    except ValueError:
        return "text"


def _number(value: str) -> float:
    """The number a text stands for, NaN for a missing one; ValueError if it is neither."""
    try:
        return float(value.replace("_", "?"))  # float("12_3") is 123, but in a table a name
    except ValueError:
        if value.strip().lower() in MISSING:
            return float("nan")
        raise


def _parsed(
    body: Iterable[Record], names: Sequence[str], chosen: Sequence[int], path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Values (rows, chosen) and the line of each row; 8 bytes a number while it grows."""
    values, lines = array.array("d"), array.array("q")
    for number, record in body:
        if len(record) != len(names):
            raise InputError(
                f"line {number} of {path} has {len(record)} value{plural(record)} where "
                f"{len(names)} {'is' if len(names) == 1 else 'are'} expected; complete the line, "
                "or quote text that contains the separator"
            )
        try:
            values.extend([_number(record[i]) for i in chosen])
        except ValueError:
            _refuse_text(number, record, names, chosen, path)
        lines.append(number)
    return np.frombuffer(values).reshape(-1, len(chosen)), np.frombuffer(lines, dtype=np.int64)


def _refuse_text(
    number: int, record: Sequence[str], names: Sequence[str], chosen: Sequence[int], path: Path
) -> NoReturn:
    bad = next(i for i in chosen if _kind(record[i]) == "text")
    numeric = [names[i] for i in chosen if _kind(record[i]) == "number"]
    if _DECIMAL_COMMA.fullmatch(record[bad]):
        remedy = "write decimals with a point"
    elif len(record) == 1 and len(record[bad].split()) > 1:
        remedy = "separate the values of a line with commas"
    elif numeric:
        remedy = f"choose numeric columns with --columns, on this line {listed(numeric)}"
    else:
        remedy = "replace it by a number, or choose numeric columns with --columns"
    raise InputError(
        f"column {quoted(names[bad])} of {path} is not numeric, line {number} has "
        f"{quoted(record[bad])}; {remedy}"
    )


# .npy and .npz ------------------------------------------------------------------------------


def _read_npy(path: Path, columns: Columns) -> Draft:
    with _opened(path, "numpy.save", b"\x93NUMPY"):
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    return _chosen(values, columns, path)


def _read_npz(path: Path, columns: Columns) -> Draft:
    with (
        _opened(path, "numpy.savez", b"PK\x03\x04", b"PK\x05\x06") as file,
        np.load(file, allow_pickle=False) as archive,
    ):
        names = archive.files
        values = archive[names[0]] if len(names) == 1 else None
    if len(names) > 1:
        raise InputError(
            f"{path} holds {len(names)} arrays, {listed(names)}; save one alone, with numpy.save"
        )
    if not isinstance(values, np.ndarray):  # numpy hands out other members of a zip as bytes
        raise InputError(f"{path} holds no array; write it again with numpy.savez")
    return _chosen(values, columns, path)


@contextmanager
def _opened(path: Path, writer: str, *starts: bytes) -> Iterator[BinaryIO]:
    """The file, if it starts in one of these ways; what broken bytes raise becomes a sentence."""
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old headers only: what cannot be used raises
        start = file.read(6)
        if not start.startswith(starts):
            raise InputError(
                f"{path} is no {path.suffix} file (it starts with {start!r}); "
                f"write it with {writer}, or give it the suffix of what it holds"
            )
        file.seek(0)
        try:
            yield file
        except Exception as error:  # a dozen kinds, from numpy and zipfile
            if "object" in str(error).lower():
                raise InputError(
                    f"{path} holds Python objects, which are not loaded because they can run "
                    f"code; convert the array with .astype(float) and use {writer} again"
                ) from error
            raise InputError(
                f"{path} is cut off or damaged ({quoted(error)}); "
                f"copy it again or write it again with {writer}"
            ) from error


def _chosen(values: np.ndarray, columns: Columns, path: Path) -> Draft:
    values = as_table(values, str(path))
    if values.size == 0:
        raise InputError(
            f"{path} holds an empty array of shape {values.shape}; "
            "write at least one row and one column"
        )
    names = _counted(values[0])
    chosen = _choose(columns, names, path)
    return Table(as_float(_taken(values, chosen)), tuple(names[i] for i in chosen)), None


def _taken(values: np.ndarray, chosen: Sequence[int]) -> np.ndarray:
    """The chosen columns; a view, so still a memory map, where they are evenly spaced."""
    step = chosen[1] - chosen[0] if len(chosen) > 1 else 1
    if step > 0 and list(chosen) == list(range(chosen[0], chosen[-1] + 1, step)):
        return values[:, chosen[0] : chosen[-1] + 1 : step]
    return values[:, chosen]


_READERS = {".csv": _read_csv, ".npy": _read_npy, ".npz": _read_npz}


# Writing ------------------------------------------------------------------------------------


def write_table(
    path: str | os.PathLike[str], values: Any, columns: Sequence[str] | None = None
) -> Path:
    """Writes `values` to a .csv or .npy file, whole or not at all, and returns its path.

    values: (rows, columns), or (rows,) for one column; an array, tensor, data frame or list.
    .csv: digits enough to read back the same numbers; columns become a header, unless all are
    numbers such as "0", "1", …, which would be read as data. .npy: columns are not stored.
    The table goes to a temporary file in the same folder that then takes the name: a reader sees
    the old table or the new one.
    Raises InputError for an unknown suffix, a missing folder, a folder that cannot be written,
    and names that do not fit the values.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = write_table(Path(folder, "a.csv"), [[0.1, 2.0]], ["x", "y"])
    ...     written.read_text()
    'x,y\\n0.1,2.0\\n'
    """
    target = _destination(path)
    writer = _WRITERS[_suffix(target, _WRITERS, "written")]
    table = as_table(values)
    header = None if columns is None else _checked_header(columns, table.shape[1])
    try:
        with replacing(target) as file:
            writer(file, table, header)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"{target} cannot be written ({reason(error)}); choose another folder or name"
        ) from error
    return target


def _destination(path: str | os.PathLike[str]) -> Path:
    try:
        target = Path(path)
        folder, taken = target.parent.is_dir(), target.is_dir()
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path} is no path to write to ({reason(error)}); give one such as 'table.csv'"
        ) from error
    if taken:
        raise InputError(f"{target} is a folder; name a file in it")
    if not folder:
        raise InputError(
            f"there is no folder {target.parent} to write {target.name} to; create it first"
        )
    return target


def _checked_header(columns: Sequence[str], width: int) -> list[str] | None:
    """The names as text, or None where a reader would take them for data."""
    names = [str(name).strip() for name in _several(columns)]
    if len(names) != width:
        raise InputError(
            f"columns has {len(names)} name{plural(names)} for values with {width} "
            f"column{plural(range(width))}; give one name for each column"
        )
    kinds = [_kind(name) for name in names]
    taken = [name for name, kind in zip(names, kinds, strict=True) if kind == "number" or not name]
    if "text" in kinds and not taken:  # others may be NA, such as the sodium of a glass
        return names
    counted = names[0] == _unnamed(0) and names[1:] == _counted(names[1:])  # as pandas counts
    if counted or "text" not in kinds:
        return None
    raise InputError(
        f"columns has the name {quoted(taken[0])}, which a reader takes for a value; give one such "
        f"as {quoted('c' + taken[0])}"
    )


def _write_npy(file: BinaryIO, values: np.ndarray, header: list[str] | None) -> None:
    np.save(file, np.asarray(values), allow_pickle=False)


def _write_csv(file: BinaryIO, values: np.ndarray, header: list[str] | None) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    if header is not None:
        writer.writerow(header)
    for block in blocks(values if values.dtype.kind != "b" else values.astype(np.int8)):
        # float32 in its own digits: 0.1, where a Python float would be 0.10000000149011612
        writer.writerows((block if block.dtype == np.float64 else block.astype(str)).tolist())
    text.flush()
    text.detach()


_WRITERS = {".csv": _write_csv, ".npy": _write_npy}
