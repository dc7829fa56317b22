"""Backpropagation through the solver: the graph of every step is kept."""

from __future__ import annotations

from dataclasses import dataclass

from cnf.ode.field import Evaluation, Field
from cnf.ode.gradient.problem import Solved, stacked
from cnf.ode.integrate import Problem, Stats, integrate
from cnf.ode.state import Leaves


@dataclass(frozen=True)
class Backprop:
    """Gradients of the computed solution by autograd; memory grows with steps times stages.

    Exact for the computed solution, step sizes taken as constants.  The field may capture anything.
    """

    def solve(
        self, problem: Problem, field: Field, y: Leaves, first: Evaluation, stats: Stats
    ) -> Solved:
        # without `first`: the field at the start is needed once more, with its graph
        return stacked(integrate(problem, y, stats))
