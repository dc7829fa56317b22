"""The table a verb will write, checked before the work is done."""

from __future__ import annotations

from pathlib import Path

from cnf.error import InputError

SUFFIXES = (".csv", ".npy")


def checked_output(path: str, overwrite: bool) -> Path:
    """The path as one that `write_table` can write.

    Raises InputError for another suffix, a folder that is missing, and a file that is there
    already unless it may be overwritten.
    """
    output = Path(path)
    if output.suffix.lower() not in SUFFIXES:
        raise InputError(f"-o {path} is no table; give it the suffix {' or '.join(SUFFIXES)}")
    if not output.parent.is_dir():
        raise InputError(f"there is no folder {output.parent} to write {output.name} to; make it")
    if output.exists() and not overwrite:
        raise InputError(f"{output} exists; give another name, or --overwrite to replace it")
    return output
