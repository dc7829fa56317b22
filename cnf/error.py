"""What goes wrong, said in a sentence: the value, the place and the remedy."""

from __future__ import annotations

from math import nan
from typing import Any


class InputError(ValueError):
    """Input that cannot be used; its message is one sentence with a remedy.

    The command line prints the sentence and leaves with exit code 2.
    """


class IntegrationError(RuntimeError):
    """The solution could not be continued.

    t: where; step: the last step size tried; nfe: evaluations of the field so far;
    partial: the states at the output times that were reached, or None.
    The defaults serve pickling alone, which restores the values afterwards.
    """

    def __init__(
        self,
        message: str,
        *,
        t: float = nan,
        step: float = nan,
        nfe: int = 0,
        partial: Any = None,
    ) -> None:
        super().__init__(message)
        self.t = t
        self.step = step
        self.nfe = nfe
        self.partial = partial
