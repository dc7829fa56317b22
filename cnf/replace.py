"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends without an error.

    It is written beside `path`, flushed to the disk, then renamed; a link is written through.
    Raises OSError or ValueError as `open` does.
    """
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # on disk before the name points to it
        os.replace(part, target)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
