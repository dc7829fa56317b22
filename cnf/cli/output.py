"""The file a verb will write, checked before the work is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cnf.error import InputError

SUFFIXES = (".csv", ".npy")


def checked_output(
    path: str, overwrite: bool, suffixes: Sequence[str] = SUFFIXES, kind: str = "table"
) -> Path:
    """The path of a file of that kind, by default one that `write_table` can write.

    Raises InputError for another suffix, a folder that is missing, and a file that is there
    already unless it may be overwritten.
    """
    output = Path(path)
    if output.suffix.lower() not in suffixes:
        raise InputError(f"-o {path} is no {kind}; give it the suffix {' or '.join(suffixes)}")
    if not output.parent.is_dir():
        raise InputError(f"there is no folder {output.parent} to write {output.name} to; make it")
    if output.exists() and not overwrite:
        raise InputError(f"{output} exists; give another name, or --overwrite to replace it")
    return output
