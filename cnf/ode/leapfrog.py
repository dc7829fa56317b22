"""One step of the leapfrog (Störmer–Verlet) method, for separable systems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnf.error import InputError
from cnf.ode.control import Control
from cnf.ode.field import Evaluation
from cnf.ode.method import Evaluate, Step
from cnf.ode.state import Leaves
from cnf.ode.tangent import is_unreadable


@dataclass(frozen=True)
class Leapfrog:
    """p½ = p + h/2 g(t, q),  q1 = q + h v(t + h/2, p½),  p1 = p½ + h/2 g(t + h, q1).

    For dq/dt = v(t, p), dp/dt = g(t, q).  Symplectic and its own inverse, so that the energy errs
    by O(h²) for ever; fixed steps alone, since a step chosen by an error would undo that.
    The field is evaluated whole wherever a half of it is wanted: twice a step, and once at its end.
    Source: Hairer, Lubich & Wanner, Geometric Numerical Integration, section I.1.4.
    """

    name: str = "leapfrog"
    order: int = 2
    adaptive: bool = False

    def prepare(self, control: Control, evaluate: Evaluate, t: Any, y: Leaves) -> Leapfrog:
        """Itself; raises InputError for a state that is no pair (q, p) or a field that is no pair
        of such functions, as far as three evaluations tell.
        """
        if len(y) != 2 or y[0].shape != y[1].shape:
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in y)
            raise InputError(
                "method 'leapfrog' needs a state of two parts of one shape, (q, p), got shapes "
                f"{shapes}"
            )
        if is_unreadable(y):
            return self
        with torch.no_grad():
            q, p = (leaf.detach() for leaf in y)
            here, *moved = (evaluate(t, at).slope for at in ((q, p), (_off(q), p), (q, _off(p))))
        for i, (name, cause) in enumerate((("dq/dt", "q"), ("dp/dt", "p"))):
            if _largest(moved[i][i] - here[i]) > 1e-5 * _largest(here[i]):
                raise InputError(
                    f"method 'leapfrog' needs dq/dt that depends on p alone and dp/dt on q alone, "
                    f"but {name} changes with {cause}; take another method"
                )
        return self

    def back(self, interpolate: bool, rated: bool) -> Leapfrog:
        """The method for the adjoint equation, which rates keep from being separable."""
        if rated:
            raise InputError(
                "with quadrature=True the adjoint of a separable system is not separable: with "
                "method 'leapfrog' take gradient='checkpoint'"
            )
        return self

    def step(
        self, field: Evaluate, t: float, h: float, y: Leaves, first: Evaluation, estimate: bool
    ) -> Step:
        """See Method.  Of the adjoint's state too, (q, p, a_q, a_p), which is separable as well: q
        and a_p change with the others alone.
        """
        drifts = (0,) if len(y) == 2 else (0, 3)
        kicked = _moved(y, first, h / 2, drifts, False)
        drifted = _moved(kicked, field(t + h / 2, kicked), h, drifts, True)
        end = _moved(drifted, field(t + h, drifted), h / 2, drifts, False)
        if not first.rates:
            return Step(end, ())
        last = field(t + h, end)
        rates = zip(first.rates, last.rates, strict=True)
        return Step(end, tuple((a + b) * (h / 2) for a, b in rates), last)


def _moved(
    y: Leaves, value: Evaluation, h: float, drifts: tuple[int, ...], drifting: bool
) -> Leaves:
    """The state with the leaves that drift, or the others, moved along the field."""
    return tuple(
        torch.add(leaf, k, alpha=h) if (i in drifts) == drifting else leaf
        for i, (leaf, k) in enumerate(zip(y, value.slope, strict=True))
    )


def _largest(leaf: Tensor) -> float:
    return leaf.abs().max().item() if leaf.numel() else 0.0


def _off(leaf: Tensor) -> Tensor:
    """Somewhere else, not far."""
    return leaf * 1.01 + 0.01
