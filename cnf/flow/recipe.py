"""How a flow is fitted: a split, trials of the field where it is open, flow matching as a warm
start, then maximum likelihood.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from tqdm import tqdm

from cnf.data.rows import HUGE, as_rows, as_table, check_values, quoted, reason
from cnf.error import InputError, whole_number
from cnf.flow.batch import Kind, shaped_context
from cnf.flow.coupling import Coupling
from cnf.flow.fitting import VALIDATION_ROWS, Fitting, Origin, Validation, digest, in_parts
from cnf.flow.objective import FlowMatching, MaximumLikelihood, Trainable
from cnf.flow.pilot import pilot_plan
from cnf.flow.regularizer import Regularizer
from cnf.flow.transform import Support
from cnf.training.batches import Shuffled, resampled
from cnf.training.loop import Batches, Plan, Progress
from cnf.training.ranks import current
from cnf.training.seed import seeded
from cnf.training.snapshot import Snapshots, opened

SECONDS = 50.0  # the default budget
MATCHING_SHARE = 0.6  # of the seconds that flow matching takes before maximum likelihood
MATCHING_STEPS = 0.95  # of the steps: one of flow matching costs far less
LEARNING_RATE = {"fm": 6e-3, "ml": 2e-3}
BATCH = 2048
TOLERANCE = 1e-4  # of adaptive steps in training; gradients are exact for the computed solution
WHITENING_ROWS = 200_000
LAZY_BYTES = 2**28  # memory maps above this size stay on disk
LEAST_ROWS = 5


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


def fit_flow(
    flow: Any,
    x: Any,
    context: Any = None,
    *,
    method: str,
    seconds: float | None,
    steps: int | None,
    seed: int | None,
    lr: float | None,
    batch_size: int | None,
    validation: float | Any,
    sample_weight: Any,
    regularizer: Regularizer | None,
    coupling: str | Coupling,
    callback: Callable[[Progress], None] | None,
    device: str | torch.device | None,
    progress: bool,
    snapshot: str | os.PathLike[str] | Snapshots | None,
) -> None:
    """Fit `flow` in place; the arguments are those of `Flow.fit`."""
    if device is not None:
        move_flow(flow, device)
    batch_size = BATCH if batch_size is None else whole_number("batch_size", batch_size, 1)
    settings = {"method": method, "seconds": seconds, "steps": steps, "seed": seed, "lr": lr,
                "batch_size": batch_size, "coupling": _named(coupling),
                "regularizer": str(regularizer or Regularizer())}  # fmt: skip
    snapshots = opened(snapshot)
    with seeded(current().seed(seed), flow.device):
        origin = Origin(flow, settings, snapshots)
        plans = _plans(flow, method, seconds, steps, lr)
        objectives: dict[str, nn.Module] = {
            "fm": FlowMatching(flow, coupling=coupling),
            "ml": MaximumLikelihood(flow, tolerance=TOLERANCE, regularizer=regularizer),
        }
        _refuse_unused(objectives, plans, method)
        if not any(p.requires_grad for p in flow.parameters()):
            raise InputError("the flow has no parameters to fit; make its field a torch.nn.Module")
        split = split_rows(x, flow, validation, context, sample_weight)
        if flow.whitens and not flow.whitening.is_fitted and origin.is_new:
            flow.whiten(*in_parts(split.sample(flow), flow))
        current().give(flow)
        score = Validation(flow, split.validation)
        weights = None if split.weights is None else digest(split.weights)
        origin.add({"rows": split.rows, "data": score.digest, "weights": weights})
        fitting = Fitting(flow, plans, objectives, split.batches(batch_size, flow), score, origin)
        records = iter(fitting) if snapshots is None else snapshots.follow(fitting, flow.device)
        try:
            follow(records, plans, callback, progress)
        finally:
            flow.zero_grad()  # of the field that is now in place


def _named(coupling: str | Coupling) -> str:
    """A coupling by which it is known again."""
    return coupling if isinstance(coupling, str) else type(coupling).__name__


def move_flow(flow: Any, device: str | torch.device) -> None:
    """Move the flow; raises InputError for a device that is not there."""
    try:
        flow.to(device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(
            f"the flow cannot be moved to device {quoted(device)} ({reason(error)}); "
            "use device='cpu'"
        ) from error


def _plans(
    flow: Any, method: str, seconds: float | None, steps: int | None, lr: float | None
) -> list[Plan]:
    if method not in ("auto", "fm", "ml"):
        raise InputError(f"unknown method {method!r}; known are auto, fm, ml")
    seconds, steps = checked_budget(seconds, steps, lr)
    whole = Plan("fm", steps=steps, seconds=seconds, lr=lr or LEARNING_RATE["fm"])
    phases = _phases(flow, method)[:steps]
    pilot = pilot_plan(flow, whole) if "fm" in phases else None
    if pilot is not None:
        left = None if steps is None else steps - (pilot.steps or 0)
        whole = replace(whole, steps=left, seconds=(seconds or 0.0) - (pilot.seconds or 0.0))
    plans = [
        replace(part, phase=phase, lr=lr or LEARNING_RATE[phase], patience=8, validations=12)
        for part, phase in zip(_shares(whole, len(phases)), phases, strict=True)
    ]
    return plans if pilot is None else [pilot, *plans]


def checked_budget(
    seconds: float | None, steps: int | None, lr: float | None
) -> tuple[float | None, int | None]:
    """(seconds, steps), of which one is None; raises InputError where they are no budget."""
    if seconds is not None and steps is not None:
        raise InputError("seconds= and steps= are both budgets: give one of them")
    for name, value in (("seconds", seconds), ("lr", lr)):
        if value is not None and not (isinstance(value, Real) and 0 < value < float("inf")):
            raise InputError(f"{name} must be a number > 0, got {value!r}")
    if steps is not None:
        return None, whole_number("steps", steps, 1)
    return seconds or SECONDS, None


def _refuse_unused(objectives: dict[str, nn.Module], plans: list[Plan], method: str) -> None:
    """Raises InputError for a setting of an objective that no phase trains by."""
    phases = {plan.phase for plan in plans}
    matching, likelihood = objectives["fm"], objectives["ml"]
    if "fm" not in phases and matching.coupling is not None:
        raise InputError(
            f"coupling= is for flow matching, and method={method!r} has none; leave it out"
        )
    if "ml" not in phases and likelihood.regularizer != Regularizer():
        raise InputError(
            f"regularizer= is for maximum likelihood, and method={method!r} has none; leave it out"
        )


def _shares(whole: Plan, phases: int) -> list[Plan]:
    """The parts of the plan that one or two phases take."""
    if phases == 1:
        return [whole]
    if whole.steps is None:
        seconds = MATCHING_SHARE * (whole.seconds or 0.0)
        rest = (whole.seconds or 0.0) - seconds
        return [replace(whole, seconds=seconds), replace(whole, seconds=rest)]
    steps = max(1, min(round(whole.steps * MATCHING_STEPS), whole.steps - 1))
    return [replace(whole, steps=steps), replace(whole, steps=whole.steps - steps)]


def _phases(flow: Any, method: str) -> list[str]:
    if method == "ml" or (method == "auto" and flow.has_own_base):
        return ["ml"]
    if flow.has_own_base:
        raise InputError("method='fm' needs the standard normal base; use method='ml'")
    if _takes_batched_times(flow):
        return ["fm"] if method == "fm" else ["fm", "ml"]
    if method == "fm":
        raise InputError(
            "method='fm' needs a field that takes t of shape (batch,), a time for each row; "
            "use method='ml'"
        )
    warnings.warn(
        "the field does not take t of shape (batch,), which flow matching needs, so method="
        "'auto' trains by maximum likelihood alone; give method='ml' to say so",
        stacklevel=5,
    )
    return ["ml"]


def _takes_batched_times(flow: Any) -> bool:
    """Whether the field can be evaluated at a time of its own for every row."""
    if not flow.has_own_field:
        return True
    # rows unlike any width, so that t is not broadcast along the features by accident
    x = torch.zeros(2 * flow.dim + 3, flow.dim, dtype=flow.dtype, device=flow.device)
    t = torch.linspace(0.1, 0.9, len(x), dtype=flow.dtype, device=flow.device)
    try:
        with torch.no_grad():
            given = x.new_zeros(len(x), flow.context) if flow.context else None
            field, rows, _ = flow.conditioned(given, training=True)
            return field(t, x, *rows).shape == x.shape
    except Exception:
        return False


def split_rows(
    x: Any, flow: Fittable, validation: float | Any, context: Any = None, sample_weight: Any = None
) -> Split:
    """Training and validation rows, on the CPU, drawn with torch's generator.

    context: one for each row, where the flow takes any; validation is then a share, or a pair of
    rows and contexts; sample_weight: one for each row, in the training and in a share of them that
    validates.
    """
    if isinstance(x, Distribution):
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
    own = as_rows(validation, width, name="validation", dtype=flow.dtype)
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
    flow.support.refuse_outside(rows)
    own = rows if _is_share(validation) else _own_validation(validation, flow.dim, flow)
    return Split(law, own)


def _drawn_rows(law: Distribution, count: int, flow: Fittable) -> Tensor:
    """Fresh rows of a law, (count, dim), on the CPU and of the flow's precision."""
    with torch.no_grad():
        return as_rows(law.sample(torch.Size([count])), flow.dim, dtype=flow.dtype, device="cpu")


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


def follow(
    records: Generator[Progress],
    plans: list[Plan],
    callback: Callable[[Progress], None] | None,
    progress: bool,
) -> None:
    """Train to the end: hand every record to the callback, with a bar on stderr if wanted."""
    shown = _with_bar(records, plans) if progress else records
    # closed here: an error's traceback would keep them, and the best weights, waiting
    with closing(records), closing(shown):
        for record in shown:
            if callback is not None:
                callback(record)


def _with_bar(records: Iterable[Progress], plans: list[Plan]) -> Generator[Progress]:
    """The records, with a bar on stderr where that is a terminal."""
    with tqdm(
        total=1000, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False,
        bar_format="{percentage:3.0f}% |{bar}| {desc}",
    ) as bar:  # fmt: skip
        names = {
            "pilot": "choosing the field",
            "fm": "flow matching",
            "ml": "maximum likelihood",
            "kl": "reverse KL",
        }
        validation = None
        for record in records:
            validation = record.validation if record.validation is not None else validation
            share = record.step / max(record.steps, 1)
            done = [plan.phase for plan in plans].index(record.phase)
            bar.n = int(1000 * (done + share) / len(plans))
            parts = [names[record.phase], f"loss {record.loss:.3f}"]
            parts += [] if validation is None else [f"validation {validation:.3f} nats"]
            parts += [] if record.nfe is None else [f"NFE {record.nfe}"]
            parts += [f"{record.skipped} batches skipped"] if record.skipped else []
            parts += [f"{record.remaining:.0f} s left"]
            bar.set_description_str(" · ".join(parts), refresh=False)
            bar.update(0)
            yield record
