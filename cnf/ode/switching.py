"""A method that is explicit where it can and implicit where it must."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cnf.error import InputError
from cnf.ode.control import Adaptive, Control
from cnf.ode.field import Evaluation
from cnf.ode.implicit import DiagonallyImplicit
from cnf.ode.method import Evaluate, ExplicitRungeKutta, Step
from cnf.ode.state import Leaves

# Hairer & Wanner's dopri5: so many steps beyond the stability limit make it stiff, unless so many
# others come between
_LIMIT, _STIFF, _CALM = 3.25, 15, 6
_EASY, _EASY_STEPS = 2.0, 5  # h·ρ with which, and for how long, the implicit method is not needed


@dataclass(frozen=True)
class Switching:
    """Steps of an explicit method until it meets stiffness, then of an implicit one until that is
    over.

    explicit: one whose last two stages are at the step's end; implicit: of the same order.
    log: which of them took the step from each time, by name, kept for the solve, since a step is
    repeated in backward; run: of the steps under way.
    Source: Hairer & Wanner, Solving Ordinary Differential Equations II, section IV.2: |h λ| is
    about h‖k_s − k_s−1‖ / ‖Y_s − Y_s−1‖ of the last two stages.
    """

    explicit: ExplicitRungeKutta
    implicit: DiagonallyImplicit
    log: dict[float, str] = field(default_factory=dict, compare=False, repr=False)
    run: _Run | None = field(default=None, compare=False, repr=False)

    name = "auto"
    adaptive = True

    @property
    def order(self) -> int:
        return self.explicit.order

    def prepare(self, control: Control, evaluate: Evaluate, t: Any, y: Leaves) -> Switching:
        """The method for one solve; raises InputError for fixed steps and steps of each row."""
        if not isinstance(control, Adaptive) or control.per_sample:
            raise InputError(
                "method 'auto' tells stiffness from adaptive steps that all rows share: leave out "
                "step_size= and per_sample=True, or name a method, such as 'dopri5' or 'kvaerno5'"
            )
        return replace(self, implicit=self.implicit.prepare(control, evaluate, t, y), log={})

    def begin(self) -> Switching:
        """The method for a run of steps."""
        return replace(self, run=_Run(self.explicit, self.implicit.begin()))

    def twice(self) -> Switching:
        """The method with second derivatives."""
        return replace(self, implicit=self.implicit.twice())

    def undifferentiated(self) -> Switching:
        """The method where nobody differentiates."""
        return replace(self, explicit=self.explicit.undifferentiated())

    def back(self, interpolate: bool, rated: bool) -> Switching:
        """The method for the adjoint equation, which is another solve."""
        return replace(self, implicit=self.implicit.back(interpolate, rated), log={})

    def at(self, t: float) -> ExplicitRungeKutta | DiagonallyImplicit:
        """The method that took the step from t."""
        return self.implicit if self.log.get(t) == self.implicit.name else self.explicit

    def changes(self) -> list[tuple[float, str]]:
        """(t, name) of the first step and of each that another method took than the one before."""
        found: list[tuple[float, str]] = []
        for t, name in self.log.items():
            if not found or found[-1][1] != name:
                found.append((t, name))
        return found

    def step(
        self, field: Evaluate, t: float, h: float, y: Leaves, first: Evaluation, estimate: bool
    ) -> Step:
        """See Method; a step without an estimate is a part or a repetition of one with it."""
        if self.run is None or not estimate:
            return self.at(t).step(field, t, h, y, first, estimate)
        step, self.log[t] = self.run.step(field, t, h, y, first)
        return step


class _Run:
    """A run of steps: which method is at work, and what speaks for the other."""

    def __init__(self, explicit: ExplicitRungeKutta, implicit: DiagonallyImplicit) -> None:
        self.explicit, self.implicit = explicit, implicit
        self.stiff = False
        self.tried: float | None = None  # where the last attempt began
        self.evidence: Tensor | float = 0.0  # its |h λ|
        self.against = self.for_it = 0  # steps that speak against the method, and for it since
        self.known: tuple[Tensor | None, float] = (None, 0.0)  # a Jacobian and its norm

    def step(
        self, field: Evaluate, t: float, h: float, y: Leaves, first: Evaluation
    ) -> tuple[Step, str]:
        """An attempt, and the name of the method that made it."""
        if self.tried is not None and t != self.tried:  # the last one was accepted
            self._weigh(float(self.evidence))
        self.tried = t
        if self.stiff:
            step = self.implicit.step(field, t, h, y, first, True)
            self.evidence = abs(h) * self._norm()
            return step, self.implicit.name
        noted = _Noted(field)
        step = self.explicit.step(noted, t, h, y, first, True)
        self.evidence = abs(h) * noted.ratio()
        return step, self.explicit.name

    def _weigh(self, product: float) -> None:
        """Count the last step's |h λ| for one method or the other, and change when it is time."""
        doubtful = product < _EASY if self.stiff else product > _LIMIT
        needed, patience = (_EASY_STEPS, 1) if self.stiff else (_STIFF, _CALM)
        self.against += doubtful
        self.for_it = 0 if doubtful else self.for_it + 1
        if self.for_it >= patience:
            self.against = 0
        if self.against >= needed:
            self.stiff, self.against, self.for_it = not self.stiff, 0, 0

    def _norm(self) -> float:
        """A bound on the eigenvalues of the Jacobian in use."""
        assert self.implicit.memory is not None
        jacobian = self.implicit.memory.jacobian
        if jacobian is not None and jacobian is not self.known[0]:
            sizes = torch.stack([jacobian.abs().sum(axis).amax(-1) for axis in (1, 2)])
            self.known = jacobian, sizes.amin(0).amax().item() if jacobian.numel() else 0.0
        return self.known[1]


class _Noted:
    """A field that remembers its last two evaluations."""

    def __init__(self, field: Evaluate) -> None:
        self._field = field
        self._last: list[tuple[Leaves, Leaves]] = []

    def __call__(self, t: Any, y: Leaves) -> Evaluation:
        value = self._field(t, y)
        self._last = [*self._last[-1:], (y, value.slope)]
        return value

    @torch.no_grad()
    def ratio(self) -> Tensor:
        """‖Δ dy/dt‖ / ‖Δy‖ between them, 0-d; NaN where they are at one place."""
        before, after = self._last
        rise, run = (_distance(a, b) for a, b in zip(after[::-1], before[::-1], strict=True))
        return rise / run


def _distance(a: Leaves, b: Leaves) -> Tensor:
    norms = [torch.linalg.vector_norm(x - y) for x, y in zip(a, b, strict=True)]
    return torch.linalg.vector_norm(torch.stack([norm.double() for norm in norms]))
