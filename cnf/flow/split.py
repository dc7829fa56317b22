"""What a fit trains on and what it is judged by: rows in memory, a memory map, or a law."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from cnf.data.rows import HUGE, as_float, as_rows, as_table, blocks, check_values
from cnf.error import InputError
from cnf.flow.batch import Kind, shaped_context
from cnf.flow.fitting import VALIDATION_ROWS, digest, in_parts
from cnf.flow.objective import Trainable
from cnf.flow.transform import Support
from cnf.training.batches import Shuffled, resampled
from cnf.training.loop import Batches
from cnf.training.ranks import current

WHITENING_ROWS = 200_000
LAZY_BYTES = 2**28  # memory maps above this size stay on disk
LEAST_ROWS = 5
DIGESTED = 2**22  # numbers by which data are known again


class Fittable(Trainable, Protocol):
    """What fitting needs of a flow, which is an nn.Module besides."""

    dim: int
    support: Support
    whitens: bool
    has_own_field: bool

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True)
class Split:
    """Rows to train on, (rows, dim), in memory or mapped, or a law that they are drawn from; and
    rows to validate on.

    Of a conditional flow each row goes on with its context, (rows, dim + context).  weights: of the
    rows to train on, None where all count alike.
    """

    training: Tensor | np.ndarray | Distribution
    validation: Tensor
    weights: Tensor | None = None

    @property
    def rows(self) -> int | None:
        """How many rows there are to train on, None for a law."""
        return None if isinstance(self.training, Distribution) else len(self.training)

    @property
    def digest(self) -> str | None:
        """Of the rows to train on, of many some from end to end; None for a law."""
        if self.rows is None or isinstance(self.training, Distribution):
            return None
        count = min(self.rows, max(1, DIGESTED // self.training.shape[1]))
        chosen = np.linspace(0, self.rows - 1, count).round().astype(int)
        rows = self.training[chosen]
        return digest(rows if isinstance(rows, Tensor) else torch.from_numpy(as_float(rows)))

    def batches(self, size: int, flow: Fittable) -> Batches:
        """A function that gives the next batch at each call."""
        if isinstance(self.training, Distribution):
            return _Fresh(self.training, size, flow)
        size = min(size, len(self.training))
        if isinstance(self.training, Tensor):
            parts = in_parts(self.training, flow)
            return Shuffled(parts, size, device=flow.device, weights=self.weights)
        return _Drawn(self.training, size, flow)

    def sample(self, flow: Fittable) -> Tensor:
        """Rows to train on, so many as maps of the data are made from."""
        if isinstance(self.training, Distribution):
            return _drawn_rows(self.training, WHITENING_ROWS, flow)
        rows, count = self.training, min(WHITENING_ROWS, len(self.training))
        if self.weights is None:
            # at random: rows that came with validation rows of their own may be sorted
            chosen = np.sort(np.random.default_rng(0).choice(len(rows), count, replace=False))
        else:
            chosen = resampled(self.weights, count).numpy()
        return as_rows(rows[chosen], flow.dim + flow.context, dtype=flow.dtype)


def split_rows(
    x: Any, flow: Fittable, validation: float | Any, context: Any = None, sample_weight: Any = None
) -> Split:
    """Training and validation rows, on the CPU, drawn with torch's generator.

    context: one for each row, where the flow takes any; validation is then a share, or a pair of
    rows and contexts; sample_weight: one for each row, in the training and in a share of them that
    validates.
    """
    if isinstance(x, Distribution):
        if sample_weight is not None:
            raise InputError("sample_weight is for rows, and x is a distribution; leave it out")
        return _split_law(x, flow, validation, context)
    if flow.context or context is not None:
        x, validation = _with_contexts(x, context, validation, flow)
        width = flow.dim + flow.context
    else:
        width = flow.dim
    lazy = isinstance(x, np.memmap) and x.ndim == 2 and x.nbytes > LAZY_BYTES
    if lazy and x.shape[1] != flow.dim:
        raise InputError(f"x must have {flow.dim} columns, got {x.shape[1]}")
    if lazy:  # one look at every row now, rather than a failure in the middle
        check_values(as_table(x, "x"), "x", HUGE, [str(i) for i in range(flow.dim)])
        _refuse_outside(x, flow.support)
    rows = x if lazy else as_rows(x, width, dtype=flow.dtype).detach().cpu()
    weights = _checked_weights(sample_weight, len(rows), lazy)
    if weights is not None:
        rows, weights = rows[weights > 0], weights[weights > 0]
        weights = None if bool((weights == weights[0]).all()) else weights
    if isinstance(rows, Tensor):
        flow.support.refuse_outside(rows[:, : flow.dim])
    if len(rows) < LEAST_ROWS:
        raise InputError(f"x has {len(rows)} rows; a density needs at least {LEAST_ROWS}")
    if not _is_share(validation):
        return Split(rows, _own_validation(validation, width, flow), weights)
    share = float(validation)
    count = max(2, round(share * len(rows)))
    if len(rows) - count < LEAST_ROWS // 2:
        raise InputError(
            f"validation={share:g} leaves {len(rows) - count} of {len(rows)} rows to train "
            "on; give a smaller share"
        )
    if lazy:  # not copied: its few validation rows stay among the training rows
        chosen = torch.randint(len(rows), (min(count, VALIDATION_ROWS),))
        return Split(rows, as_rows(rows[chosen.sort().values.numpy()], flow.dim, dtype=flow.dtype))
    order = torch.randperm(len(rows))
    if weights is None:
        return Split(rows[order[count:]], rows[order[:count]])
    weights = weights[order]
    judges = order[:count][resampled(weights[:count], count)]
    return Split(rows[order[count:]], rows[judges], weights[count:])


def _refuse_outside(x: np.ndarray, support: Support) -> None:
    """Raises InputError for the first row of a large array that is not inside the support."""
    first = 0
    for block in blocks(x) if not support.is_everything else ():
        support.refuse_outside(torch.tensor(as_float(block)), first=first)
        first += len(block)


def _checked_weights(given: Any, rows: int, lazy: bool) -> Tensor | None:
    """Weights of rows, float64; raises InputError for what cannot be any."""
    if given is None:
        return None
    if lazy:
        raise InputError(
            "sample_weight needs rows in memory, and x is a large memory map; load it with "
            "numpy.asarray(x), or draw rows by their weight"
        )
    weights = as_rows(given, 1, name="sample_weight", dtype=torch.float64).detach().cpu().squeeze(1)
    if len(weights) != rows:
        raise InputError(f"sample_weight has {len(weights)} entries, but x has {rows} rows")
    least = weights.min().item() if rows else 1.0
    if least < 0:
        raise InputError(
            f"sample_weight[{int(weights.argmin())}] is {least:g}; a weight must be 0 or more"
        )
    if not weights.any() and rows:
        raise InputError("every sample_weight is zero; give some rows a weight above zero")
    return weights


def _is_share(validation: Any) -> bool:
    """Whether it is a share of the rows, not rows; raises InputError for a share of none or all."""
    if not (isinstance(validation, Real) or validation is None):
        return False
    if validation is None or not 0 < float(validation) < 1:
        raise InputError(f"validation must be a share between 0 and 1 or rows, got {validation!r}")
    return True


def _own_validation(validation: Any, width: int, flow: Fittable) -> Tensor:
    own = as_rows(validation, width, name="validation", dtype=flow.dtype).detach()
    flow.support.refuse_outside(own[:, : flow.dim], "validation")
    return own


def _split_law(law: Distribution, flow: Fittable, validation: Any, context: Any) -> Split:
    """The law to draw every batch from, and rows of it to validate on."""
    if flow.context or context is not None:
        raise InputError(
            "a conditional flow is fitted to rows and their contexts, not to a distribution; draw "
            "both and give fit(x, context)"
        )
    rows = _drawn_rows(law, VALIDATION_ROWS, flow)
    own = rows if _is_share(validation) else _own_validation(validation, flow.dim, flow)
    return Split(law, own)


def _drawn_rows(law: Distribution, count: int, flow: Fittable) -> Tensor:
    """Fresh rows of a law, (count, dim), on the CPU and of the flow's precision.

    One on an end of the support, as a uniform law draws it once in millions, is drawn again.
    Raises InputError for one beyond it.
    """
    with torch.no_grad():
        rows = as_rows(law.sample(torch.Size([count])), flow.dim, dtype=flow.dtype, device="cpu")
    at_end = flow.support.has_at_end(rows)
    if at_end.any():
        rows = rows.clone()
        rows[at_end] = _drawn_rows(law, int(at_end.sum()), flow)
    flow.support.refuse_outside(rows)
    return rows


def _with_contexts(x: Any, context: Any, validation: Any, flow: Fittable) -> tuple[Tensor, Any]:
    """Rows that go on with their contexts, and the validation rows likewise if there are any."""
    if not (isinstance(validation, Real) or validation is None):
        try:
            rows, given = validation
        except (TypeError, ValueError):
            raise InputError(
                "validation of a conditional flow must be a share or a pair (rows, contexts)"
            ) from None
        validation = _joined(rows, given, flow, "validation")
    return _joined(x, context, flow, "x"), validation


def _joined(x: Any, context: Any, flow: Fittable, name: str) -> Tensor:
    rows = as_rows(x, flow.dim, name=name, dtype=flow.dtype).detach().cpu()
    kind = Kind(flow.dim, flow.dtype, torch.device("cpu"))
    given = shaped_context(context, kind, flow.context)
    if given is None or given.shape[:-1] != rows.shape[:1]:
        found = None if given is None else tuple(given.shape)
        raise InputError(
            f"context has shape {found}, but {name} has {len(rows)} rows; give one for each"
        )
    return torch.cat([rows, given.detach()], 1)


class _Drawn:
    """Batches of rows of a memory map, drawn at random: an order of all would not fit in memory."""

    def __init__(self, rows: np.ndarray, size: int, flow: Fittable) -> None:
        self._rows, self._flow, self._ranks = rows, flow, current()
        self._size = self._ranks.batch_size(size)

    def __call__(self) -> Tensor:
        chosen = torch.randint(len(self._rows), (self._size,)).sort().values
        chosen = chosen[self._ranks.share(self._size)]
        flow = self._flow
        block = self._rows[chosen.numpy()]
        return as_rows(block, flow.dim, dtype=flow.dtype, device=flow.device)


class _Fresh:
    """Batches that a law draws anew, so that no row is ever seen twice."""

    def __init__(self, law: Distribution, size: int, flow: Fittable) -> None:
        self._law, self._flow, self._ranks = law, flow, current()
        self._size = self._ranks.batch_size(size)

    def __call__(self) -> Tensor:
        rows = _drawn_rows(self._law, self._size, self._flow)
        return rows[self._ranks.share(self._size)].to(self._flow.device)
