"""From a problem to its trajectory: all rows in step, or every row on its own clock."""

from __future__ import annotations

from dataclasses import replace

from cnf.ode.field import Evaluation
from cnf.ode.march import march
from cnf.ode.method import begun
from cnf.ode.oracle import Oracle
from cnf.ode.row_march import march_rows
from cnf.ode.state import Leaves
from cnf.ode.trajectory import Accepted, Problem, Stats, Trajectory

__all__ = ["Accepted", "Problem", "Stats", "Trajectory", "integrate"]


def integrate(
    problem: Problem,
    y: Leaves,
    stats: Stats,
    *,
    first: Evaluation | None = None,
    keep: bool | list[Accepted] = False,
) -> Trajectory:
    """Solve from y at times[0] through all times; the graph follows where gradients are enabled
    and all rows share their steps.

    first: the field at the start, where the caller has it; keep: whether to keep the record, or
    what to keep it in.
    Raises IntegrationError where the state turns non-finite, the step vanishes or steps run out.
    """
    if isinstance(problem.method, Oracle):
        first = first or problem.field(problem.times[0], y)
        return problem.method.march(problem, y, stats, first, keep)
    method = begun(problem.method)
    if method is not problem.method:
        problem = replace(problem, method=method)
    if problem.per_sample:
        return march_rows(problem, y, stats, first=first, keep=keep)
    return march(problem, y, stats, first=first, keep=keep)
