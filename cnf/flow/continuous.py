"""One ODE as an invertible map, with the logarithm of its Jacobian's determinant."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from cnf.flow.divergence import Divergence, VectorField
from cnf.ode.control import Adaptive, Control, FixedStep
from cnf.ode.gradient.problem import Gradient
from cnf.ode.integrate import Stats
from cnf.ode.method import Method
from cnf.ode.solution import check_settings, solve
from cnf.ode.tableau import Tableau

DEFAULT_CONTROL = Adaptive(1e-5, 1e-5, quadrature_atol=1e-4)


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


class Moved(NamedTuple):
    """Where points arrive, (batch, dim); logdet of the map that moved them, (batch,); the cost."""

    x: Tensor
    logdet: Tensor
    stats: Stats


def move(field: VectorField, x: Tensor, times: tuple[float, float], solver: Solver) -> Tensor:
    """x, (batch, dim), carried along the field from times[0] to times[1]."""
    return solve(
        field,
        x,
        times,
        method=solver.method,
        control=solver.control,
        gradient=solver.gradient,
        max_steps=solver.max_steps,
    ).y[-1]


def move_with_logdet(
    field: VectorField,
    divergence: Divergence,
    x: Tensor,
    times: tuple[float, float],
    solver: Solver,
) -> Moved:
    """x carried along the field, and log |det| of that map: the divergence integrated on the way.

    Source: the instantaneous change of variables, Chen et al. 2018, theorem 1.
    """
    attached = divergence.attach(field, x)
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
    return Moved(solution.y[-1], solution.integral[-1], solution.stats)
