"""How a flow is fitted: a split, trials of the field where it is open, flow matching as a warm
start, then maximum likelihood.
"""

from __future__ import annotations

import math
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
from tqdm import tqdm

from cnf.data.rows import HUGE, as_rows, as_table, check_values, quoted, reason
from cnf.error import InputError, IntegrationError, whole_number
from cnf.flow.batch import Kind, shaped_context
from cnf.flow.coupling import Coupling
from cnf.flow.objective import FlowMatching, MaximumLikelihood, Trainable
from cnf.flow.pilot import choose_field, pilot_plan
from cnf.flow.regularizer import Regularizer
from cnf.flow.transform import Support
from cnf.training.batches import Shuffled
from cnf.training.loop import Batches, Best, Plan, Progress, put, train
from cnf.training.seed import seeded

SECONDS = 50.0  # the default budget
MATCHING_SHARE = 0.6  # of the seconds that flow matching takes before maximum likelihood
MATCHING_STEPS = 0.95  # of the steps: one of flow matching costs far less
LEARNING_RATE = {"fm": 6e-3, "ml": 2e-3}
BATCH = 2048
TOLERANCE = 1e-4  # of adaptive steps in training; gradients are exact for the computed solution
VALIDATION_ROWS = 2048  # looked at while training
WHITENING_ROWS = 200_000
LAZY_BYTES = 2**28  # memory maps above this size stay on disk
LEAST_ROWS = 10
LEAST_STEPS = 1000  # of the solver that a validation may take


class Fittable(Trainable, Protocol):
    """What fitting needs of a flow, which is an nn.Module besides."""

    dim: int
    context: int
    support: Support
    whitens: bool
    has_own_field: bool

    @property
    def has_own_base(self) -> bool: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True)
class Split:
    """Rows to train on, (rows, dim), in memory or mapped; and rows to validate on.

    Of a conditional flow each row goes on with its context, (rows, dim + context).
    """

    training: Tensor | np.ndarray
    validation: Tensor

    def batches(self, size: int, flow: Fittable) -> Batches:
        """A function that gives the next batch at each call."""
        size = min(size, len(self.training))
        if isinstance(self.training, Tensor):
            return Shuffled(in_parts(self.training, flow), size, device=flow.device)
        return _Drawn(self.training, size, flow)


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
    regularizer: Regularizer | None,
    coupling: str | Coupling,
    callback: Callable[[Progress], None] | None,
    device: str | torch.device | None,
    progress: bool,
) -> None:
    """Fit `flow` in place; the arguments are those of `Flow.fit`."""
    if device is not None:
        move_flow(flow, device)
    plans = _plans(flow, method, seconds, steps, lr)
    objectives: dict[str, nn.Module] = {
        "fm": FlowMatching(flow, coupling=coupling),
        "ml": MaximumLikelihood(flow, tolerance=TOLERANCE, regularizer=regularizer),
    }
    _refuse_unused(objectives, plans, method)
    batch_size = BATCH if batch_size is None else whole_number("batch_size", batch_size, 1)
    if not any(p.requires_grad for p in flow.parameters()):
        raise InputError("the flow has no parameters to fit; make its field a torch.nn.Module")
    with seeded(seed, flow.device):
        split = split_rows(x, flow, validation, context)
        if flow.whitens and not flow.whitening.is_fitted:
            flow.whiten(*in_parts(_sample_of(split.training, flow), flow))
        batches = split.batches(batch_size, flow)
        records = _run(flow, plans, objectives, batches, split.validation)
        try:
            follow(records, len(plans), callback, progress)
        finally:
            flow.zero_grad()  # of the field that is now in place


def move_flow(flow: Any, device: str | torch.device) -> None:
    """Move the flow; raises InputError for a device that is not there."""
    try:
        flow.to(device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(
            f"the flow cannot be moved to device {quoted(device)} ({reason(error)}); "
            "use device='cpu'"
        ) from error


def _run(
    flow: Any,
    plans: list[Plan],
    objectives: dict[str, nn.Module],
    batches: Batches,
    validation: Tensor,
) -> Generator[Progress]:
    """The records of all phases; whatever ends them, the flow is left with its best weights."""
    elapsed = 0.0
    score = _Score(flow, validation)
    if plans[0].phase == "pilot":
        trials, *plans = plans
        later = sum(plan.seconds or 0.0 for plan in plans)
        for record in choose_field(flow, batches, score, trials):
            yield replace(record, remaining=(trials.seconds or 0.0) - record.seconds + later)
            elapsed = record.seconds
    parameters = [p for p in flow.parameters() if p.requires_grad]
    best = Best()
    best.offer(score(), [p.detach() for p in parameters])  # a fit never ends worse than it began
    try:
        for i, plan in enumerate(plans):
            later = sum(after.seconds or 0.0 for after in plans[i + 1 :])
            objective = objectives[plan.phase]
            if best.weights:
                put(parameters, best.weights)
            score.objective = objective
            best.age = 0
            record = None
            for record in train(objective, batches, plan, validate=score, best=best):
                yield replace(
                    record,
                    seconds=elapsed + record.seconds,
                    remaining=record.remaining + later,
                )
            elapsed += record.seconds if record is not None else 0.0
    finally:
        if best.weights:
            put(parameters, best.weights)


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
        for part, phase in zip(shares(whole, len(phases)), phases, strict=True)
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


def shares(whole: Plan, phases: int) -> list[Plan]:
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


def split_rows(x: Any, flow: Fittable, validation: float | Any, context: Any = None) -> Split:
    """Training and validation rows, on the CPU, drawn with torch's generator.

    context: one for each row, where the flow takes any; validation is then a share, or a pair of
    rows and contexts.
    """
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
    if isinstance(rows, Tensor):
        flow.support.refuse_outside(rows[:, : flow.dim])
    if len(rows) < LEAST_ROWS:
        raise InputError(f"x has {len(rows)} rows; a density needs at least {LEAST_ROWS}")
    if not (isinstance(validation, Real) or validation is None):
        own = as_rows(validation, width, name="validation", dtype=flow.dtype)
        flow.support.refuse_outside(own[:, : flow.dim], "validation")
        return Split(rows, own)
    share = math.nan if validation is None else float(validation)
    if not 0 < share < 1:
        raise InputError(f"validation must be a share between 0 and 1 or rows, got {validation!r}")
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
    return Split(rows[order[count:]], rows[order[:count]])


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


def in_parts(rows: Tensor, flow: Fittable) -> tuple[Tensor, ...]:
    """(x,), or (x, contexts) of a conditional flow, of rows that go on with their contexts."""
    return (rows,) if not flow.context else (rows[:, : flow.dim], rows[:, flow.dim :])


class _Drawn:
    """Batches of rows of a memory map, drawn at random: an order of all would not fit in memory."""

    def __init__(self, rows: np.ndarray, size: int, flow: Fittable) -> None:
        self._rows, self._size, self._flow = rows, size, flow

    def __call__(self) -> Tensor:
        chosen = torch.randint(len(self._rows), (self._size,)).sort().values
        flow = self._flow
        block = self._rows[chosen.numpy()]
        return as_rows(block, flow.dim, dtype=flow.dtype, device=flow.device)


def _sample_of(rows: Tensor | np.ndarray, flow: Fittable) -> Tensor:
    count = min(WHITENING_ROWS, len(rows))
    # at random: rows that came with validation rows of their own may be sorted
    chosen = np.sort(np.random.default_rng(0).choice(len(rows), count, replace=False))
    return as_rows(rows[chosen], flow.dim + flow.context, dtype=flow.dtype)


class _Score:
    """Mean negative log-likelihood of the validation rows, in nats; infinite where it fails."""

    def __init__(self, flow: Any, rows: Tensor) -> None:
        # from end to end: they may be sorted
        count = min(len(rows), VALIDATION_ROWS)
        chosen = torch.linspace(0, len(rows) - 1, count, dtype=torch.float64).round().long()
        self._flow, self._rows = flow, rows[chosen.to(rows.device)]
        self._most = flow.solver.max_steps
        self.log_prob = torch.full((count,), -math.inf)  # of the rows, when they were last scored
        self.objective: nn.Module | None = None

    @torch.no_grad()
    def __call__(self) -> float:
        flow = self._flow
        rows, *context = in_parts(self._rows.to(flow.device, flow.dtype), flow)
        solver = replace(flow.solver, max_steps=self._most)
        try:
            conditioned = flow.conditioned(*context)
            divergence = flow.chosen_divergence()
            log_prob, stats = flow.log_prob_of_rows(rows, divergence, solver, conditioned)
        except IntegrationError:
            self.log_prob = torch.full((len(rows),), -math.inf)
            return math.inf
        self.log_prob = log_prob.double().cpu()
        # weights that need so many more steps than the first ones are lost, and not worth the time
        wanted = max(LEAST_STEPS, 20 * stats.attempts)
        self._most = min(flow.solver.max_steps, wanted)
        if isinstance(self.objective, FlowMatching):
            self.objective.nfe = stats.calls
        return -self.log_prob.mean().item()


def follow(
    records: Generator[Progress],
    phases: int,
    callback: Callable[[Progress], None] | None,
    progress: bool,
    unit: str = "nats",
) -> None:
    """Train to the end: hand every record to the callback, with a bar on stderr if wanted.

    phases: that count their steps each for itself; unit: of the score on validation rows.
    """
    shown = _with_bar(records, phases, unit) if progress else records
    # closed here: an error's traceback would keep them, and the best weights, waiting
    with closing(records), closing(shown):
        for record in shown:
            if callback is not None:
                callback(record)


def _with_bar(records: Iterable[Progress], phases: int, unit: str) -> Generator[Progress]:
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
        validation, seen = None, []
        for record in records:
            seen += [record.phase] if record.phase not in seen else []
            validation = record.validation if record.validation is not None else validation
            share = record.step / max(record.steps, 1)
            bar.n = int(1000 * (min(len(seen), phases) - 1 + share) / phases)
            parts = [names[record.phase], f"loss {record.loss:.3f}"]
            parts += [] if validation is None else [f"validation {validation:.3f} {unit}"]
            parts += [] if record.nfe is None else [f"NFE {record.nfe}"]
            parts += [f"{record.skipped} batches skipped"] if record.skipped else []
            parts += [f"{record.remaining:.0f} s left"]
            bar.set_description_str(" · ".join(parts), refresh=False)
            bar.update(0)
            yield record
