"""The records of a training as scalars for TensorBoard, beside those in metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cnf.error import InputError

NOT_DRAWN = ("phase", "step", "steps", "remaining")  # names, axes and guesses


class Board:
    """Event files in a folder, written record by record; nothing is made before the first one.

    A curve is named by its phase, as in "ml/loss"; its steps are counted over all phases.
    Raises InputError where tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                "--tensorboard needs the package tensorboard, which is not here; "
                "pip install tensorboard"
            ) from error
        self._folder, self._make = folder, SummaryWriter
        self._writer: Any = None

    def add(self, step: int, record: Mapping[str, Any]) -> None:
        """The numbers of a record, the step-th of its run."""
        if self._writer is None:
            # after a crash curves go on from the snapshot: what came after it is hidden
            self._writer = self._make(str(self._folder), purge_step=step)
        for name, value in record.items():
            if name not in NOT_DRAWN and value is not None and math.isfinite(value):
                self._writer.add_scalar(f"{record['phase']}/{name}", value, step)

    def close(self) -> None:
        """Write what has not been written yet."""
        if self._writer is not None:
            self._writer.close()
