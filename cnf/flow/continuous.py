"""One ODE as an invertible map, with the logarithm of its Jacobian's determinant."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from cnf.flow.divergence import Divergence, VectorField
from cnf.ode.control import Adaptive, Control, FixedStep
from cnf.ode.field import is_row_wise
from cnf.ode.gradient.problem import Gradient
from cnf.ode.gradient.reversible import is_reversible
from cnf.ode.integrate import Stats
from cnf.ode.method import Method
from cnf.ode.solution import check_settings, solve
from cnf.ode.tableau import Tableau

DEFAULT_CONTROL = Adaptive(1e-5, 1e-5, quadrature_atol=1e-4)
TIGHTER = 100.0  # by which a tolerance is divided to see what it was worth


@dataclass(frozen=True)
class Solver:
    """How a flow's ODE is solved and differentiated: `solve`'s settings of the same names."""

    method: str | Tableau | Method = "dopri5"
    control: Control = DEFAULT_CONTROL
    gradient: str | Gradient = "checkpoint"
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        check_settings(self.method, self.control, self.gradient)  # now, not at the first solve

    def with_tolerance(self, tolerance: float) -> Solver:
        """The same with looser or tighter adaptive steps; fixed steps stay."""
        if isinstance(self.control, FixedStep):
            return self
        wanted = replace(
            self.control,
            rtol=tolerance,
            atol=tolerance,
            quadrature_atol=None if self.control.quadrature_atol is None else tolerance * 10,
        )
        return replace(self, control=wanted)

    def tighter(self, factor: float = TIGHTER) -> Solver:
        """The same with every tolerance divided by `factor`; of fixed steps, a quarter as long."""
        if isinstance(self.control, FixedStep):
            return self.halved(2)
        atol = self.control.quadrature_atol
        wanted = replace(
            self.control,
            rtol=self.control.rtol / factor,
            atol=self.control.atol / factor,
            quadrature_atol=None if atol is None else atol / factor,
        )
        return replace(self, control=wanted)

    def halved(self, times: int) -> Solver:
        """The same with fixed steps halved so many times; adaptive ones stay."""
        if isinstance(self.control, Adaptive):
            return self
        step = self.control.step_size / 2**times
        return replace(self, control=replace(self.control, step_size=step))

    def for_rows(self, field: VectorField, x: Tensor, rows: tuple[Tensor, ...] = ()) -> Solver:
        """The same with a step size for every row, so that no row's result depends on another.

        rows: what else the field takes of every row.  Fixed steps do not depend on the rows anyway;
        a field that cannot be asked at a time of each row's own, and a gradient that goes back over
        the whole batch, keep the steps that all share.
        """
        shared = isinstance(self.control, FixedStep) or is_reversible(self.gradient)
        if shared or not takes_row_times(field, x, rows):
            return self
        return replace(self, control=replace(self.control, per_sample=True))


@runtime_checkable
class Stack(Protocol):
    """Several ODEs one after the other, with maps between them, in the place of a field."""

    def carry(
        self, x: Tensor, divergence: Divergence | None, times: tuple[float, float], solver: Solver
    ) -> Moved:
        """x, (batch, dim), carried through all of them, backwards where times fall; without a
        divergence the logdet is no number.
        """
        ...


class Moved(NamedTuple):
    """Where points arrive, (batch, dim); logdet of the map that moved them, (batch,); the cost;
    integrals of whatever else the divergence's field gives along the path, (batch,) each.
    """

    x: Tensor
    logdet: Tensor
    stats: Stats
    along: tuple[Tensor, ...] = ()


@torch.no_grad()
def takes_row_times(field: VectorField, x: Tensor, rows: tuple[Tensor, ...] = ()) -> bool:
    """Whether the field gives every row at its own time what it gives that row alone.

    x: (batch, dim), of which the field's width, dtype and device are taken; rows: what else it
    takes of every row, of which the first stands for all.
    """
    if is_row_wise(field):
        return True
    if not len(x):  # no row to stand for the others
        return False
    # as many as no width, so that times are not broadcast along the features by accident
    count = 2 * x.shape[1] + 3
    points = torch.linspace(-1.0, 1.0, count * x.shape[1], dtype=x.dtype, device=x.device)
    points = points.reshape(count, -1)
    times = torch.linspace(0.1, 0.9, count, dtype=x.dtype, device=x.device)
    one = [row[:1] for row in rows]
    many = [row.expand(count, *row.shape[1:]) for row in one]
    try:
        together = field(times, points, *many)
        if together.shape != points.shape:
            return False
        chosen = (0, count // 2, count - 1)
        alone = [field(times[i], points[i : i + 1], *one)[0] for i in chosen]
    except Exception:  # whatever a user's field raises where it was not made for this
        return False
    chosen = torch.stack([together[i] for i in chosen])
    return torch.allclose(chosen, torch.stack(alone), rtol=1e-4, atol=1e-5)


def move(
    field: VectorField,
    x: Tensor,
    times: tuple[float, float],
    solver: Solver,
    rows: tuple[Tensor, ...] = (),
) -> Tensor:
    """x, (batch, dim), carried along the field(t, x, *rows) from times[0] to times[1]."""
    if isinstance(field, Stack):
        return field.carry(x, None, times, solver).x
    return solve(
        field,
        x,
        times,
        method=solver.method,
        control=solver.control,
        gradient=solver.gradient,
        rows=rows,
        max_steps=solver.max_steps,
    ).y[-1]


def move_with_logdet(
    field: VectorField,
    divergence: Divergence,
    x: Tensor,
    times: tuple[float, float],
    solver: Solver,
    rows: tuple[Tensor, ...] = (),
) -> Moved:
    """x carried along the field, and log |det| of that map: the divergence integrated on the way.

    rows: what else the field takes of every row, such as a context.
    Source: the instantaneous change of variables, Chen et al. 2018, theorem 1.
    """
    if isinstance(field, Stack):
        return field.carry(x, divergence, times, solver)
    attached = divergence.attach(field, x, *rows)
    solution = solve(
        attached.field,
        x,
        times,
        method=solver.method,
        control=solver.control,
        gradient=solver.gradient,
        params=attached.params,
        rows=attached.rows,
        quadrature=True,
        max_steps=solver.max_steps,
    )
    found = solution.integral
    logdet, *along = (found,) if isinstance(found, Tensor) else found
    return Moved(solution.y[-1], logdet[-1], solution.stats, tuple(part[-1] for part in along))
