"""What a flow is made with, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cnf.error import InputError, whole_number
from cnf.flow.pilot import BANDWIDTHS, Bandwidth
from cnf.flow.transform import Support


def checked_widths(hidden: Sequence[int], name: str = "hidden") -> tuple[int, ...]:
    """Widths of hidden layers; raises InputError where there are none."""
    try:
        widths = tuple(whole_number(f"each width in {name}", width, 1) for width in hidden)
    except TypeError:
        widths = ()
    if not widths:
        raise InputError(f"{name} must hold one width or more, such as (128, 128), got {hidden!r}")
    return widths


def checked_bandwidth(bandwidth: Any) -> Bandwidth:
    """(low, high), or None for no sines; of "auto" the one that a fit tries first."""
    if bandwidth is None:
        return None
    if bandwidth == "auto":
        return BANDWIDTHS[0]
    try:
        low, high = (float(value) for value in bandwidth)
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 < low <= high < math.inf:
        raise InputError(
            "bandwidth must be two angular frequencies 0 < low ≤ high such as (0.5, 6.0), None or "
            f"'auto', got {bandwidth!r}"
        )
    return low, high


def checked_guidance(guidance: Any, context: int, dropout: float) -> float | None:
    """How far a field follows its context, a finite number, or None.

    Raises InputError where there is no context, or none was ever withheld.
    """
    if guidance is None:
        return None
    try:
        weight = math.nan if isinstance(guidance, bool) else float(guidance)
    except (TypeError, ValueError):
        weight = math.nan
    if not math.isfinite(weight):
        raise InputError(f"guidance must be a number such as 2.0, got {guidance!r}")
    if not context:
        raise InputError("guidance is by a context and the flow takes none; use Flow(context=k)")
    if not dropout and weight != 1:
        raise InputError(
            "guidance needs a field that has also learned to do without its context; make the "
            "flow with context_dropout=0.1 and fit it"
        )
    return weight


def support_of(support: Any, dim: int) -> Support:
    """The map of a support: None, "positive", or (low, high) of numbers or one for each column."""
    if support is None:
        return Support(dim)
    if isinstance(support, str):
        if support != "positive":
            raise InputError(f"support must be 'positive', (low, high) or None, got {support!r}")
        return Support(dim, 0.0)
    try:
        low, high = support
    except (TypeError, ValueError):
        raise InputError(
            f"support must be 'positive', (low, high) or None, got {support!r}"
        ) from None
    return Support(dim, low, high)
