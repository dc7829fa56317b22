"""SciPy's solvers behind the same front door: an oracle, not a method of this core.

They step on the CPU in double precision, and the field is called as it always is.  SciPy is loaded
when a solve asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from cnf.error import InputError, IntegrationError
from cnf.ode.control import Adaptive, Control
from cnf.ode.field import Evaluation
from cnf.ode.implicit import DiagonallyImplicit
from cnf.ode.jacobian import Layout
from cnf.ode.method import Evaluate, ExplicitRungeKutta, Method, Step
from cnf.ode.state import Leaves, precise_dtype
from cnf.ode.tableau import TABLEAUS
from cnf.ode.trajectory import Accepted, Counted, Problem, Stats, Trajectory, failure

EXPLICIT = {"RK23": "bosh3", "RK45": "dopri5", "DOP853": "dopri8"}
STIFF = ("Radau", "BDF", "LSODA")
PREFIX = "scipy:"
_FREE = 1e200  # the absolute tolerance of what does not choose the steps


@dataclass(frozen=True)
class Oracle:
    """One of scipy.integrate's solvers, by its name there; SciPy alone chooses the steps.

    ours: the method for the adjoint equation, and for what lies between SciPy's steps.
    """

    solver: str
    ours: Any = field(default=None, repr=False)

    adaptive = True

    @property
    def name(self) -> str:
        return PREFIX + self.solver

    @property
    def order(self) -> int:
        return self.ours.order

    def prepare(self, control: Control, evaluate: Evaluate, t: Any, y: Leaves) -> Oracle:
        """The solver for these tolerances; raises InputError for what SciPy does not do."""
        plain = isinstance(control, Adaptive) and not control.per_sample
        if not plain or control.land_on or control.jumps:
            raise InputError(
                f"{self.name} takes rtol and atol, max_step and first_step alone; leave out "
                "step_size=, per_sample=True, land_on= and jumps="
            )
        if self.solver in EXPLICIT:
            return replace(self, ours=ExplicitRungeKutta(TABLEAUS[EXPLICIT[self.solver]]))
        ours = DiagonallyImplicit(TABLEAUS["kvaerno5"])
        return replace(self, ours=ours.prepare(control, evaluate, t, y))

    def at(self, t: float) -> Method:
        """What goes on between SciPy's steps."""
        return self.ours

    def back(self, interpolate: bool, rated: bool) -> Method:
        """The method for the adjoint equation."""
        if self.solver in STIFF and not interpolate:
            raise InputError(
                f"a stiff solution cannot be followed backward: with {self.name} take "
                "gradient=Adjoint(interpolate=True), which reads it off the forward solve"
            )
        return self.ours

    def step(
        self, field: Evaluate, t: float, h: float, y: Leaves, first: Evaluation, estimate: bool
    ) -> Step:
        """Refused: SciPy's steps are its own."""
        raise self.refusal()

    def refusal(self) -> InputError:
        """Why there are no gradients of its steps."""
        how = "Adjoint(interpolate=True)" if self.solver in STIFF else "'adjoint'"
        return InputError(
            f"the steps of {self.name} cannot be repeated with a graph: take gradient={how}, or "
            "solve under torch.no_grad()"
        )

    def march(
        self,
        problem: Problem,
        y: Leaves,
        stats: Stats,
        first: Evaluation,
        keep: bool | list[Accepted],
    ) -> Trajectory:
        """The solution at all times, each landed on; see `integrate`."""
        if problem.watch or problem.dense:
            raise InputError(f"{self.name} goes with neither event= nor dense=True")
        out = Trajectory(record=keep if isinstance(keep, list) else [])
        way = _Way(self.solver, problem, y, stats, first)
        way.arrive(out, 0)
        for label, (start, end) in enumerate(pairwise(problem.times), start=1):
            way.go(out, start, end, keep is not False)
            way.arrive(out, label)
        stats.nfe = stats.calls
        return out


class _NotFinite(Exception):
    """The field is not finite where an interval begins."""


_NOT_FINITE = "the field returned a non-finite value"


class _Way:
    """State and integrals as one vector in double precision, and SciPy's way from time to time."""

    def __init__(
        self, solver: str, problem: Problem, y: Leaves, stats: Stats, first: Evaluation
    ) -> None:
        from scipy import integrate  # not before it is asked for: an oracle is no part of the core

        self._solver = getattr(integrate, solver)
        self._name, self._problem, self._stats = solver, problem, stats
        self._field = Counted(problem.field, stats)
        totals = tuple(torch.zeros_like(rate, dtype=precise_dtype(rate)) for rate in first.rates)
        self._layouts = Layout(y, 1), Layout(totals, 1)
        self.now, self._begins = self._vector(y, totals), True

    def arrive(self, out: Trajectory, label: int) -> None:
        """Write down what has been reached."""
        state, integral = self._parts(self.now)
        out.states.append(state)
        out.integrals.append(integral)
        out.times.append(self._problem.times[label])
        out.labels.append(label)
        out.marks.append(self._stats.accepted)

    def go(self, out: Trajectory, start: float, end: float, keep: bool) -> None:
        """From one time to the next; raises IntegrationError where SciPy gives up."""
        stats, limit = self._stats, self._problem.max_steps
        self._begins = True
        try:
            solver = self._solver(self._right, start, self.now, end, **self._settings(end - start))
        except _NotFinite:
            raise self._failure(_NOT_FINITE, start, 0.0, out) from None
        while solver.status == "running":
            if stats.accepted >= limit:
                reason = f"max_steps={limit} steps were not enough"
                raise self._failure(reason, solver.t, solver.step_size, out)
            begun, y = float(solver.t), self._parts(solver.y)[0] if keep else ()
            try:
                message = solver.step()
            except _NotFinite:
                raise self._failure(_NOT_FINITE, begun, 0.0, out) from None
            except ValueError as error:  # of a Jacobian that is not finite
                message, solver.status = str(error), "failed"
            if solver.status == "failed":
                reason = f"SciPy gave up ({message})"
                raise self._failure(reason, solver.t, solver.step_size, out)
            if not np.isfinite(solver.y).all():
                reason = "the state or the field turned non-finite"
                raise self._failure(reason, begun, solver.step_size, out)
            stats.accepted += 1
            if keep:
                out.record.append(Accepted(None, begun, float(solver.t) - begun, y))
        stats.jacobians += int(solver.njev)
        self.now = solver.y

    def _failure(
        self, reason: str, t: float, step: float | None, out: Trajectory
    ) -> IntegrationError:
        return failure(reason, self._problem, t, step or 0.0, self._stats, out.states)

    def _settings(self, span: float) -> dict[str, Any]:
        """Tolerances and bounds; the integrals take no part in the choice of steps."""
        control, size = self._problem.control, [layout.size for layout in self._layouts]
        assert isinstance(control, Adaptive)
        free = control.quadrature_atol or _FREE
        settings: dict[str, Any] = dict(
            rtol=control.rtol, atol=np.repeat([control.atol, free], size), max_step=control.max_step
        )
        if control.first_step is not None:
            settings["first_step"] = min(control.first_step, abs(span))
        return settings

    def _right(self, t: float, now: np.ndarray) -> np.ndarray:
        value = self._field(float(t), self._parts(now)[0])
        found = self._vector(value.slope, value.rates)
        if self._begins and not np.isfinite(found).all():
            raise _NotFinite  # from which SciPy would choose a first step, and not come back
        self._begins = False
        return found

    def _vector(self, y: Leaves, totals: Leaves) -> np.ndarray:
        parts = zip(self._layouts, (y, totals), strict=True)
        found = [layout.vector(leaves)[0].double().cpu() for layout, leaves in parts if layout.like]
        return torch.cat(found).numpy()

    def _parts(self, now: np.ndarray) -> tuple[Leaves, Leaves]:
        state, totals = self._layouts
        vector = torch.from_numpy(now.copy()).to(self._layouts[0].like[0].device)[None]
        found = vector.split([state.size, totals.size], 1)
        return state.leaves(found[0]), totals.leaves(found[1])
