"""What goes wrong, said in a sentence: the value, the place and the remedy."""

from __future__ import annotations

import operator
from math import nan
from typing import Any


class InputError(ValueError):
    """Input that cannot be used; its message is one sentence with a remedy.

    The command line prints the sentence and leaves with exit code 2.
    """


def whole_number(name: str, value: Any, least: int) -> int:
    """`value`, such as NumPy's integers too, as an int; raises InputError for any other number."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise InputError(f"{name} must be a whole number, at least {least}, got {value!r}")
    return number


def checked_share(name: str, value: Any) -> float:
    """`value` as a float; raises InputError unless 0 ≤ value < 1."""
    try:
        share = nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        share = nan
    if not 0 <= share < 1:
        raise InputError(f"{name} must be a share from 0 to below 1, got {value!r}")
    return share


class InstallationError(RuntimeError):
    """What is installed on this machine does not work as it should."""


class TrainingError(RuntimeError):
    """Training could not go on; the weights are the best found so far."""


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
