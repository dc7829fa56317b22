"""What the log-density of each row is worth, and settings under which it is worth enough."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cnf.error import InputError
from cnf.flow.conditioned import Conditioned
from cnf.flow.continuous import TIGHTER, Solver
from cnf.flow.divergence import (
    ClosedForm,
    Divergence,
    Hutchinson,
    Tangents,
    choose_divergence,
)
from cnf.flow.keyed import KeyedHutchinson
from cnf.ode.control import Adaptive
from cnf.ode.integrate import Stats

REPLICATES = 8  # draws of all probes, by which the spread of a trace estimate is told
LOOSEST = 1e-3  # tolerance that is tried first where an error is to be kept
TIGHTEST = {torch.float32: 1e-6, torch.float64: 1e-12}  # what rounding leaves room for
LAST = {torch.float32: 1e-6, torch.float64: 1e-10}  # tolerance that is tried
MORE_PROBES = 4  # times as many halve the standard error
HALVINGS = 12  # of fixed steps
INTEGRATION_SHARE = 0.5  # of an error that is asked for, which the solver may make
TRACE_SHARE = 0.25  # and a standard error of the trace: two of them, told by few replicates, fit in


class Evaluable(Protocol):
    """What is asked of a flow, which is an nn.Module besides."""

    has_own_field: bool
    field: Any

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def conditioned(
        self, context: Tensor | None = None, guidance: float | None = None
    ) -> Conditioned: ...
    def log_prob_of_rows(
        self,
        x: Tensor,
        divergence: Divergence,
        solver: Solver,
        conditioned: Conditioned | None = None,
    ) -> tuple[Tensor, Stats]: ...


@dataclass(frozen=True)
class Info:
    """How log-densities came about, and what each is worth; tensors have the log-densities' shape.

    nfe: evaluations of the field, the most of any chunk of rows; divergence: the one in use, or
    those, where some rows were evaluated by another to keep to an error;
    nfe_per_sample: what each row needed; integration_error: nats, the distance to the value under
    tolerances a hundred times tighter (a quarter of the step), in float64 where the flow can be
    taken there, so that rounding is part of it; trace_error: nats, the standard error of the
    estimated trace over draws of its noise, 0 where the trace is exact, NaN for a divergence of
    one's own.
    """

    nfe: int
    divergence: str
    nfe_per_sample: Tensor
    integration_error: Tensor
    trace_error: Tensor


class Request(NamedTuple):
    """How log-densities are wanted; error: the most nats that each may be off, or None; budget: the
    number of evaluations that the solver was made of, or None.
    """

    divergence: Divergence
    solver: Solver
    guidance: float | None = None
    error: float | None = None
    budget: int | None = None

    def within(self, error: Any) -> Request:
        """The same to an error in nats, if there is one; raises InputError for no number of nats,
        and beside a budget.
        """
        error = checked_error(error)
        if error is not None and self.budget is not None:
            raise InputError("nfe= is a budget and error= an aim: give one of them")
        return self._replace(error=error)


class Valued(NamedTuple):
    """Log-densities of rows (batch,), and what they cost and are worth, each (batch,) too.

    calls: evaluations of the field for all rows together; divergences: names of those that were
    taken.
    """

    log_prob: Tensor
    calls: int
    nfe: Tensor
    integration_error: Tensor
    trace_error: Tensor
    divergences: frozenset[str]


def in_double(flow: Evaluable) -> Any:
    """The flow in float64, sharing nothing that could change; itself where it cannot be taken
    there: a field of one's own may hold numbers of a precision of its own.
    """
    if flow.dtype == torch.float64 or flow.has_own_field or flow.device.type == "mps":
        return flow
    twin = copy.copy(flow)
    modules = twin.__dict__["_modules"]
    twin.__dict__["_modules"] = {
        name: None if part is None else copy.deepcopy(part).double()
        for name, part in modules.items()
    }
    return twin


def evaluated(
    flow: Evaluable, x: Tensor, context: Tensor | None, request: Request
) -> tuple[Tensor, Stats]:
    """Log-densities of rows x (batch, dim) given contexts (batch, k), and the cost."""
    conditioned = flow.conditioned(context, request.guidance)
    solver = request.solver.for_rows(conditioned.field, x, conditioned.rows)
    return flow.log_prob_of_rows(x, request.divergence, solver, conditioned)


def valued(
    flow: Evaluable, twin: Any, x: Tensor, context: Tensor | None, request: Request
) -> Valued:
    """Log-densities of rows under the request, differentiable, and what they are worth.

    twin: what `in_double` made of the flow; the request's error is left out of account.
    """
    log_prob, stats = evaluated(flow, x, context, request)
    nfe = torch.as_tensor(stats.nfe).expand(len(x))
    with torch.no_grad():
        off, noise = _errors(flow, twin, x, context, request, log_prob)
    return Valued(log_prob, stats.calls, nfe, off, noise, frozenset({_name(request.divergence)}))


def _name(divergence: Divergence) -> str:
    """Its kind, as the user named it."""
    return "Hutchinson" if isinstance(divergence, Hutchinson) else type(divergence).__name__


def _errors(
    flow: Evaluable,
    twin: Any,
    x: Tensor,
    context: Tensor | None,
    request: Request,
    log_prob: Tensor,
) -> tuple[Tensor, Tensor]:
    """(integration error, trace error) of log-densities, in float64."""
    tighter = request._replace(solver=_reference(request.solver, twin.dtype))
    rows = x.to(twin.dtype)
    given = None if context is None else context.to(twin.dtype)
    divergence = request.divergence
    if isinstance(divergence, Hutchinson):
        spread = [
            evaluated(twin, rows, given, tighter._replace(divergence=draw))[0]
            for draw in _draws(divergence)
        ]
        noise = torch.stack(spread).double().std(0)
        if divergence.seed is None:  # another noise than the log-densities had
            return _apart(*_same_noise(twin, rows, given, request, tighter)), noise
    else:
        exact = isinstance(divergence, ClosedForm | Tangents)
        noise = torch.full_like(log_prob, 0.0 if exact else math.nan).double()
    return _apart(evaluated(twin, rows, given, tighter)[0], log_prob), noise


def _reference(solver: Solver, dtype: torch.dtype) -> Solver:
    """The solver to compare with: tighter, or looser where rounding allows no tighter."""
    control = solver.control
    if not isinstance(control, Adaptive):
        return solver.tighter()
    tolerance = max(control.rtol, control.atol)
    room = 1.01 * tolerance / TIGHTEST.get(dtype, tolerance / TIGHTER)
    return solver.tighter(min(TIGHTER, room) if room >= 10 else 1 / 10)


def _draws(divergence: Hutchinson) -> list[Hutchinson]:
    """The same estimate with other noises: seeds of their own, far from those a user counts up."""
    first = (0 if divergence.seed is None else divergence.seed) + 1_000_003
    return [replace(divergence, seed=first + i) for i in range(REPLICATES)]


def _same_noise(
    twin: Any, x: Tensor, context: Tensor | None, request: Request, tighter: Request
) -> tuple[Tensor, Tensor]:
    """The log-densities of both requests with one noise for both."""
    (draw, *_) = _draws(replace(request.divergence, seed=None))  # type: ignore[type-var]
    one = evaluated(twin, x, context, request._replace(divergence=draw))[0]
    return one, evaluated(twin, x, context, tighter._replace(divergence=draw))[0]


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """|one − other| in float64; 0 where both are the same, infinite or not."""
    one, other = one.double(), other.double()
    return torch.where(one == other, 0.0, (one - other).abs())


def checked_error(error: Any) -> float | None:
    """`error` as a number of nats, or None; raises InputError for any other."""
    if error is None:
        return None
    if isinstance(error, bool) or not (isinstance(error, Real) and 0 < float(error) < math.inf):
        raise InputError(f"error must be a number of nats > 0, such as 0.01, got {error!r}")
    return float(error)


def within_error(
    flow: Evaluable, twin: Any, x: Tensor, context: Tensor | None, request: Request
) -> Valued:
    """Log-densities whose integration error and trace error are at most the request's error, nats.

    Every row gets the loosest tolerance, from a tenth of the error (at most 1e-3) on in tens (of
    fixed steps the longest of 1, 1/2, … of the flow's), and the fewest probes, four times as many
    at a time, that do; what it gets depends on no other row.  The solver may use up half of the
    error, and the trace has a standard error of a quarter; where to find that out would take as
    many probes as there are dimensions, the trace is taken exactly.  The rounding of the value
    itself is left out of account.
    Raises InputError where rounding allows no such error.
    """
    error, dim = request.error or math.inf, x.shape[1]
    found: list[tuple[Tensor, Valued]] = []
    first = _affordable(request.divergence, flow.field, dim)
    waiting = [(torch.arange(len(x), device=x.device), 0, first)]
    while waiting:
        rows, level, divergence = waiting.pop()
        chosen = divergence.of_rows(rows) if isinstance(divergence, KeyedHutchinson) else divergence
        part = request._replace(divergence=chosen, solver=_level(flow, request, level))
        given = None if context is None else context[rows]
        value = valued(flow, twin, x[rows], given, part)
        rounding = 4 * torch.finfo(x.dtype).eps * value.log_prob.detach().double().abs()
        # of a number no row could do better than its rounding
        coarse = value.integration_error > INTEGRATION_SHARE * error + rounding
        noisy = value.trace_error > TRACE_SHARE * error
        for finer, quieter in ((False, False), (True, False), (False, True), (True, True)):
            kind = (coarse == finer) & (noisy == quieter)
            if not kind.any():
                continue
            if not (finer or quieter):
                found.append((rows[kind], _taken(value, kind)))
                continue
            more = _more_probes(divergence, flow.field, dim) if quieter else divergence
            waiting.append((rows[kind], level + finer, more))
    return _in_order(found, x)


def _level(flow: Evaluable, request: Request, level: int) -> Solver:
    """The solver of a level; each is finer than the one before it."""
    solver = request.solver
    if isinstance(solver.control, Adaptive):
        last = LAST.get(flow.dtype, LOOSEST)
        first = max(last, min(LOOSEST, (request.error or LOOSEST) / 10))
        tolerance = first / 10**level
        if tolerance >= 0.99 * last:
            return solver.with_tolerance(tolerance)
    elif level <= HALVINGS:
        return solver.halved(level)
    remedy = "or flow.double()" if flow.dtype == torch.float32 else "or another method="
    raise InputError(
        f"error={request.error:g} nats cannot be kept in {flow.dtype} with method "
        f"{solver.method!r}; give a larger error, {remedy}"
    )


def _more_probes(divergence: Divergence, field: Any, dim: int) -> Divergence:
    assert isinstance(divergence, Hutchinson)  # no other has a standard error
    return _affordable(replace(divergence, probes=divergence.probes * MORE_PROBES), field, dim)


def _affordable(divergence: Divergence, field: Any, dim: int) -> Divergence:
    """The divergence; the exact one where to tell what an estimate is worth would cost as much."""
    if not isinstance(divergence, Hutchinson) or (1 + REPLICATES) * divergence.probes < dim:
        return divergence
    return choose_divergence("auto", field)


def joined(parts: list[Valued], shape: torch.Size, divergence: Divergence) -> tuple[Tensor, Info]:
    """The log-densities of consecutive blocks of rows in their shape, and what is known of them."""
    log_prob, nfe, off, noise = (
        torch.cat([getattr(part, name) for part in parts]).reshape(shape)
        for name in ("log_prob", "nfe", "integration_error", "trace_error")
    )
    calls = max(part.calls for part in parts)
    taken = frozenset[str]().union(*(part.divergences for part in parts))
    names = ", ".join(sorted(taken)) or _name(divergence)
    return log_prob, Info(calls, names, nfe, off, noise)


def _taken(value: Valued, rows: Tensor) -> Valued:
    """The values of some rows."""
    parts = (value.log_prob, value.nfe.to(rows.device), value.integration_error, value.trace_error)
    log_prob, nfe, off, noise = (part[rows] for part in parts)
    return Valued(log_prob, value.calls, nfe, off, noise, value.divergences)


def _in_order(found: list[tuple[Tensor, Valued]], x: Tensor) -> Valued:
    """The values of all rows, in the order of their places."""
    if not found:
        none = x.new_empty(0)
        return Valued(none, 0, none.long(), none.double(), none.double(), frozenset())
    order = torch.cat([rows for rows, _ in found]).argsort()
    values = [value for _, value in found]
    log_prob, nfe, off, noise = (
        torch.cat([getattr(value, name) for value in values])[order]
        for name in ("log_prob", "nfe", "integration_error", "trace_error")
    )
    taken = frozenset[str]().union(*(value.divergences for value in values))
    return Valued(log_prob, max(value.calls for value in values), nfe, off, noise, taken)
