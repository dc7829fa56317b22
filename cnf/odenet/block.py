"""An ODE as a layer: its input is the state at the start, its output the state at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from cnf.error import InputError, whole_number
from cnf.ode.choice import choose_method
from cnf.ode.control import Adaptive, Control, FixedStep
from cnf.ode.field import UserField, is_row_wise
from cnf.ode.gradient.problem import Gradient
from cnf.ode.gradient.reversible import is_reversible
from cnf.ode.integrate import Stats
from cnf.ode.method import ExplicitRungeKutta, Method
from cnf.ode.solution import Solution, check_settings, solve
from cnf.ode.state import Structure
from cnf.ode.tableau import TABLEAUS, Tableau

TOLERANCE = 1e-3  # rtol and atol of a block that was told nothing: Chen et al. 2018, section 3


class ODEBlock(nn.Module):
    """The state at t[1] of dy/dt = field(t, y) that is the input at t[0]; of the input's shape.

    field: f(t, y), trained where it is a module; t: start and end, in either direction; method,
    gradient, control, max_steps: as in `solve`.
    How long steps are is said in one of four ways: rtol (1e-3), the absolute tolerance too unless
    atol is another; step_size; control; or nfe, a budget: as many fixed steps of the method as at
    most `nfe` evaluations pay for (backprop makes one more, to look at the field).
    Every setting is an attribute.  Assigning one takes effect at the next call, and of the four
    ways the last one assigned holds: `block.rtol = 1e-5`, `block.step_size = 0.25`,
    `block.nfe = 8`.
    stats: of the last call, whose nfe_backward grows when `backward()` runs; None before it.
    Raises InputError for settings out of range, at once, and at the call for those that do not go
    together.
    Source: Chen et al. 2018, section 3.

    >>> import torch
    >>> block = ODEBlock(lambda t, y: -y, method="rk4", nfe=8)
    >>> block(torch.ones(2, 3)).shape, block.stats.nfe
    (torch.Size([2, 3]), 8)
    """

    def __init__(
        self,
        field: UserField,
        t: Tensor | Sequence[float] = (0.0, 1.0),
        *,
        method: str | Tableau | Method = "dopri5",
        rtol: float | None = None,
        atol: float | None = None,
        step_size: float | None = None,
        nfe: int | None = None,
        control: Control | None = None,
        gradient: str | Gradient = "checkpoint",
        max_steps: int = 10_000,
    ) -> None:
        super().__init__()
        if len(t) != 2:
            raise InputError(f"t must be a start and an end, got {len(t)} times; solve takes more")
        tolerances = {"rtol": rtol, "atol": atol}
        ways = {"step_size": step_size, "nfe": nfe, "control": control}
        given = [name for name, value in (tolerances | ways).items() if value is not None]
        if len(given) > 1 and given != ["rtol", "atol"]:
            raise InputError(
                f"{given[0]}= and {given[-1]}= both say how long steps are; give one of them"
            )
        self.field = field
        self.t = t
        self.max_steps = whole_number("max_steps", max_steps, 1)
        self.stats: Stats | None = None
        self._pace = _Pace(Adaptive(TOLERANCE, TOLERANCE))
        self.method, self.gradient = method, gradient
        for name in given:
            setattr(self, name, (tolerances | ways)[name])

    # --- settings ---------------------------------------------------------------------------------

    @property
    def method(self) -> str | Tableau | Method:
        """The method of a step."""
        return self._method

    @method.setter
    def method(self, value: str | Tableau | Method) -> None:
        choose_method(value)
        self._method = value

    @property
    def gradient(self) -> str | Gradient:
        """How the solution is differentiated."""
        return self._gradient

    @gradient.setter
    def gradient(self, value: str | Gradient) -> None:
        check_settings("euler", FixedStep(1.0), value)
        self._gradient = value

    @property
    def control(self) -> Control:
        """How long steps are; raises InputError for a budget that pays for none."""
        return self._pace.control or FixedStep(self._span / self._affordable_steps())

    @control.setter
    def control(self, value: Control) -> None:
        if not isinstance(value, FixedStep | Adaptive):
            raise InputError(f"control must be FixedStep or Adaptive, got {value!r}")
        self._pace = _Pace(value)

    @property
    def rtol(self) -> float | None:
        """The relative tolerance, or None where steps are fixed; assigned, the absolute one too."""
        control = self._pace.control
        return control.rtol if isinstance(control, Adaptive) else None

    @rtol.setter
    def rtol(self, value: float) -> None:
        self.control = replace(self._adaptive(), rtol=value, atol=value)

    @property
    def atol(self) -> float | None:
        """The absolute tolerance, or None where steps are fixed."""
        control = self._pace.control
        return control.atol if isinstance(control, Adaptive) else None

    @atol.setter
    def atol(self, value: float) -> None:
        self.control = replace(self._adaptive(), atol=value)

    @property
    def step_size(self) -> float | None:
        """The length of fixed steps, also of those that a budget pays for; None where there are
        none.
        """
        control = self.control
        return control.step_size if isinstance(control, FixedStep) else None

    @step_size.setter
    def step_size(self, value: float) -> None:
        self.control = FixedStep(value)

    @property
    def nfe(self) -> int | None:
        """The budget of evaluations, or None; what was spent is in `stats`."""
        return self._pace.budget

    @nfe.setter
    def nfe(self, value: int) -> None:
        self._pace = _Pace(None, whole_number("nfe", value, 1))

    @contextmanager
    def using(self, **settings: Any) -> Iterator[ODEBlock]:
        """The block with other settings for as long as the context lasts: method=, nfe=, …"""
        kept = {name: getattr(self, name) for name in ("method", "gradient", "max_steps", "_pace")}
        try:
            for name, value in settings.items():
                if name not in _SETTINGS:
                    raise InputError(f"{name!r} is no setting; known are {', '.join(_SETTINGS)}")
                setattr(self, name, value)
            yield self
        finally:
            for name, value in kept.items():
                setattr(self, name, value)

    # --- calls ------------------------------------------------------------------------------------

    def forward(self, y0: Any) -> Any:
        return _last(self.solve(y0).y)

    def solve(self, y0: Any, **settings: Any) -> Solution:
        """The whole Solution, of which calling the block gives the end.

        settings: more of `solve`'s, such as dense=True.
        """
        return self._solved(self.field, y0, **settings)

    def with_energy(self, y0: Tensor) -> tuple[Tensor, Tensor]:
        """The state at the end, and each row's kinetic energy ∫ ½ mean |f|² |dt|, (batch,).

        Added to the loss, the energy keeps the field easy to solve.  It is integrated beside the
        state and takes no part in the choice of steps.
        Source: Finlay et al. 2020, section 3.1.
        """
        if not isinstance(y0, Tensor) or y0.ndim < 2:
            raise InputError("the kinetic energy is that of rows: y0 must be a tensor (batch, …)")
        solution = self._solved(Kinetic(self.field), y0, quadrature=True)
        energy = solution.integral[-1].to(y0.dtype)
        return solution.y[-1], energy if float(self.t[1]) > float(self.t[0]) else -energy

    def _solved(self, field: UserField, y0: Any, **settings: Any) -> Solution:
        own: dict[str, Any] = {
            "t": self.t,
            "method": self.method,
            "control": self.control,
            "gradient": self.gradient,
            "max_steps": self.max_steps,
        }
        solution = solve(field, y0, **(own | settings))
        self.stats = solution.stats
        return solution

    def extra_repr(self) -> str:
        pace = self._pace
        steps = pace.control if pace.budget is None else f"nfe={pace.budget}"
        ends = ", ".join(f"{float(moment):g}" for moment in self.t)
        return f"t=({ends}), method={self.method!r}, {steps}, gradient={self.gradient!r}"

    # --- inside -----------------------------------------------------------------------------------

    @property
    def _span(self) -> float:
        return abs(float(self.t[1]) - float(self.t[0]))

    def _adaptive(self) -> Adaptive:
        control = self._pace.control
        return control if isinstance(control, Adaptive) else Adaptive(TOLERANCE, TOLERANCE)

    def _affordable_steps(self) -> int:
        """How many steps the budget pays for."""
        budget, method = self._pace.budget, choose_method(self.method)
        assert budget is not None
        each = evaluations_of_a_step(method, self.gradient)
        if each > budget:
            raise InputError(
                f"a step of {method.name} takes {each} evaluations, and nfe={budget} pays for "
                f"none; raise it, or take method={_cheaper(budget, self.gradient)!r}"
            )
        return budget // each


class _Pace(NamedTuple):
    """How long steps are: by a control, or by a budget of evaluations."""

    control: Control | None
    budget: int | None = None


_SETTINGS = (
    "method", "gradient", "control", "rtol", "atol", "step_size", "nfe", "max_steps"
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Kinetic:
    """A field with its kinetic energy as the rate: f, and ½ mean f² of each row, (batch,)."""

    field: UserField

    @property
    def row_wise(self) -> bool:
        return is_row_wise(self.field)

    def __call__(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        value = self.field(t, y)
        return value, 0.5 * value.square().flatten(1).mean(1)


def evaluations_of_a_step(method: Method, gradient: str | Gradient = "checkpoint") -> int:
    """How many evaluations of the field a fixed step takes.

    Raises InputError for methods that iterate or choose, whose steps have no fixed price.
    """
    if not isinstance(method, ExplicitRungeKutta):
        raise InputError(
            f"a step of {method.name} has no fixed number of evaluations, so it takes no budget "
            "nfe=; give step_size= or rtol=, or take an explicit Runge–Kutta method"
        )
    return method.tableau.used_stages * (2 if is_reversible(gradient) else 1)


def _cheaper(budget: int, gradient: str | Gradient) -> str:
    """The name of the method of the highest order that the budget pays for, euler if none."""
    explicit = (tableau for tableau in TABLEAUS.values() if not tableau.implicit)
    paid = [
        tableau
        for tableau in explicit
        if evaluations_of_a_step(ExplicitRungeKutta(tableau), gradient) <= budget
    ]
    best = max(paid, key=lambda tableau: (tableau.order, -tableau.used_stages), default=None)
    return "euler" if best is None else best.name


def _last(y: Any) -> Any:
    """The last of a solution's states, in their structure."""
    structure = Structure(y, "the solution")
    return structure.build([leaf[-1] for leaf in structure.leaves(y)])


def blocks_of(module: nn.Module) -> list[ODEBlock]:
    """The ODE blocks in a module, itself included."""
    return [part for part in module.modules() if isinstance(part, ODEBlock)]
