"""The front door: validate once, choose the method, its steps and its gradient, solve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cnf.error import InputError, IntegrationError
from cnf.ode.control import Adaptive, Control, FixedStep
from cnf.ode.field import (
    Evaluation,
    Field,
    UserField,
    find_captured,
    name_tensors,
    precision_of,
)
from cnf.ode.gradient.adjoint import Adjoint
from cnf.ode.gradient.backprop import Backprop
from cnf.ode.gradient.checkpoint import Checkpoint
from cnf.ode.gradient.problem import Gradient, Solved, stacked
from cnf.ode.integrate import Problem, Stats, integrate
from cnf.ode.method import Method, choose_method
from cnf.ode.state import Leaves, Structure
from cnf.ode.tableau import Tableau

GRADIENTS: dict[str, Gradient] = {
    "backprop": Backprop(),
    "checkpoint": Checkpoint(),
    "adjoint": Adjoint(),
}


@dataclass(frozen=True)
class Solution:
    """The solution of an ODE at the requested times.

    t: (times,); y: (times, *y0.shape), in a tuple or dict where y0 was one; integral: with
    quadrature=True the rates' integrals from t[0] to each t, (times, *rates.shape) in float64,
    else None; stats: what it cost.
    """

    t: Tensor
    y: Any
    integral: Any
    stats: Stats


def solve(
    field: UserField,
    y0: Any,
    t: Tensor | Sequence[float],
    *,
    method: str | Tableau | Method = "dopri5",
    rtol: float | None = None,
    atol: float | None = None,
    step_size: float | None = None,
    control: Control | None = None,
    gradient: str | Gradient = "checkpoint",
    params: Sequence[Tensor] | None = None,
    rows: Sequence[Tensor] = (),
    quadrature: bool = False,
    max_steps: int = 100_000,
) -> Solution:
    """The solution of dy/dt = field(t, y) with y(t[0]) = y0, at every time of t.

    field: f(t, y, *rows, *params) → dy/dt of y's structure, t a 0-d tensor; with quadrature=True it
    returns (dy/dt, rates), and the rates' integrals come back beside the solution.
    y0: tensor, or tuple or dict of tensors, floating or complex; t: two or more strictly monotone
    times, in either direction.
    method: "euler", "midpoint", "heun2", "heun3", "rk4", "rk4_38" (fixed steps only),
    "adaptive_heun", "fehlberg2", "bosh3", "dopri5", "tsit5", "dopri8" (both) or a Tableau.
    rtol (1e-5), atol (1e-6): tolerances of adaptive steps; step_size: fixed steps with any method;
    control: FixedStep or Adaptive, instead of these three.
    gradient: "checkpoint" (exact, one state a step), "backprop" (exact, the whole graph) or
    "adjoint" (the continuous adjoint, memory independent of the number of steps).
    params: tensors that the field takes as its last arguments, or that it captures and that are
    computed (captured leaves are found); rows: tensors aligned with the batch, taken before them.
    max_steps: steps tried in the whole solve.
    Gradients reach y0, t, rows, params and the field's leaves.  Raises InputError for what cannot
    be solved as asked, IntegrationError where the solution cannot be continued.

    >>> decay = solve(lambda t, y: -y, torch.ones(1), [0.0, 1.0])
    >>> round(decay.y[-1].item(), 4)
    0.3679
    """
    state = Structure(y0)
    y = _checked_state(state.leaves(y0))
    times = _checked_times(t)
    chosen = choose_method(method)
    steps = _choose_control(chosen, rtol, atol, step_size, control)
    how = _choose_gradient(gradient)
    _check_budget(times, steps, max_steps)
    passed, captured = name_tensors(field, rows, params)
    real = y[0].real.dtype if y[0].dtype.is_complex else y[0].dtype
    device = y[0].device
    inner = Field(
        field, state, None, real, device, passed, captured, precision=precision_of(device)
    )
    stats = Stats()
    inner, first = _first_look(inner, times[0], y, quadrature, how, stats)
    problem = Problem(inner, times, chosen, steps, max_steps)
    clock = t if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled() else None
    if clock is not None:
        y = _depend_on_start(y, first.slope, clock)
    try:
        solved = _solve(how, problem, inner, y, first, stats)
    except IntegrationError as error:
        error.partial = _partial(state, error.partial)
        raise
    if clock is not None:
        solved = _depend_on_times(solved, problem, first, clock, stats)
    t = t if isinstance(t, Tensor) else torch.tensor(times, dtype=real, device=device)
    integral = inner.rates.build(solved.integrals) if inner.rates is not None else None
    return Solution(t, state.build(solved.states), integral, stats)


def check_settings(
    method: str | Tableau | Method, control: Control, gradient: str | Gradient
) -> None:
    """Raises InputError for settings that `solve` would refuse."""
    _choose_control(choose_method(method), None, None, None, control)
    _choose_gradient(gradient)


def _solve(
    how: Gradient, problem: Problem, field: Field, y: Leaves, first: Evaluation, stats: Stats
) -> Solved:
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (*y, *field.tensors))
    if wanted or (isinstance(how, Backprop) and torch.is_grad_enabled()):
        return how.solve(problem, field, y, first, stats)
    with torch.no_grad():
        return stacked(integrate(problem, y, stats, first=first))


def _first_look(
    field: Field, t: float, y: Leaves, quadrature: bool, how: Gradient, stats: Stats
) -> tuple[Field, Evaluation]:
    """The field with its rates' structure and captured leaves, and its value at the start.

    The value is the solve's first stage; what the field returns is checked here, and trusted after.
    """
    start = tuple(leaf.detach() for leaf in y)
    stats.nfe += 1
    searched = torch.is_grad_enabled() and not isinstance(how, Backprop)
    aliases = field.aliases() if searched else field.tensors
    bound, time = field.bind(aliases), field.clock(t)
    seen: list[Structure] = []

    def evaluate() -> Evaluation:
        checked, structure = _checked_value(bound, time, start, quadrature)
        seen.extend([] if structure is None else [structure])
        return checked

    if searched:
        with field.precision:
            first, found = find_captured(field.call, evaluate, (*aliases, *start, time))
    else:
        first, found = evaluate(), ()
    first = Evaluation(*(tuple(leaf.detach() for leaf in part) for part in first))
    rates = seen[0] if seen else None
    return replace(field, rates=rates, captured=field.captured + found), first


def _checked_value(
    field: Field, time: Tensor, y: Leaves, quadrature: bool
) -> tuple[Evaluation, Structure | None]:
    value = field.value(time, y)
    rates: Leaves = ()
    structure = None
    if quadrature:
        if not isinstance(value, tuple) or len(value) != 2:
            raise InputError(
                "with quadrature=True the field must return (dy/dt, rates), got "
                f"{type(value).__name__}"
            )
        value, given = value
        structure = Structure(given, "the rates")
        rates = structure.leaves(given)
    slope = field.state.leaves(value, "the field's value")
    for i, (dy, leaf) in enumerate(zip(slope, y, strict=True)):
        part = f"part {i} of dy/dt" if len(y) > 1 else "dy/dt"
        if dy.shape != leaf.shape:
            raise InputError(
                f"the field returned {part} of shape {tuple(dy.shape)} at t={time:g}, expected "
                f"y's shape {tuple(leaf.shape)}"
            )
        if dy.dtype != leaf.dtype or dy.device != leaf.device:
            raise InputError(
                f"the field returned {part} as {dy.dtype} on {dy.device} at t={time:g}, but y is "
                f"{leaf.dtype} on {leaf.device}; convert one of them"
            )
    return Evaluation(slope, rates), structure


def _checked_state(leaves: Leaves) -> Leaves:
    for leaf in leaves:
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise InputError(f"y0 must be floating or complex, got {leaf.dtype}; try y0.float()")
        if leaf.device != leaves[0].device:
            raise InputError(f"y0's parts are on {leaves[0].device} and {leaf.device}; move one")
    return leaves


def _checked_times(t: Tensor | Sequence[float]) -> tuple[float, ...]:
    if isinstance(t, Tensor):
        if t.ndim != 1:
            raise InputError(f"t must have one dimension, (times,), got shape {tuple(t.shape)}")
        if t.is_complex():
            raise InputError(f"t must be real, got {t.dtype}")
        times = tuple(t.detach().double().tolist())
    elif isinstance(t, Sequence) and any(isinstance(x, Tensor) and x.requires_grad for x in t):
        raise InputError("t holds tensors that require grad; give one tensor, torch.stack(t)")
    else:
        try:
            times = tuple(float(moment) for moment in t)
        except (TypeError, ValueError):
            raise InputError(f"t must be a tensor or a sequence of times, got {t!r}") from None
    if len(times) < 2:
        raise InputError(f"t must hold a start and at least one end, got {len(times)} times")
    if not all(math.isfinite(moment) for moment in times):
        raise InputError(f"t must be finite, got {times}")
    rising = [later - earlier for earlier, later in pairwise(times)]
    for i, difference in enumerate(rising):
        if difference == 0 or (difference > 0) != (rising[0] > 0):
            raise InputError(
                f"t must be strictly increasing or strictly decreasing, but t[{i}]={times[i]:g} is "
                f"followed by t[{i + 1}]={times[i + 1]:g}"
            )
    return times


def _choose_control(
    method: Method,
    rtol: float | None,
    atol: float | None,
    step_size: float | None,
    control: Control | None,
) -> Control:
    given = [
        name
        for name, value in (("rtol", rtol), ("atol", atol), ("step_size", step_size))
        if value is not None
    ]
    if control is not None:
        if given:
            raise InputError(f"control= already sets the steps: give it or {given[0]}=, not both")
        if not isinstance(control, FixedStep | Adaptive):
            raise InputError(f"control must be FixedStep or Adaptive, got {control!r}")
    elif step_size is not None:
        if len(given) > 1:
            raise InputError(
                f"fixed steps have no tolerance: give step_size= or {given[0]}=, not both"
            )
        control = FixedStep(step_size)
    else:
        control = Adaptive(1e-5 if rtol is None else rtol, 1e-6 if atol is None else atol)
    if isinstance(control, Adaptive) and not method.adaptive:
        raise InputError(
            f"method {method.name!r} does not estimate its error, so it cannot choose its steps: "
            "give step_size=, or take dopri5, tsit5, bosh3 or dopri8"
        )
    return control


def _choose_gradient(gradient: str | Gradient) -> Gradient:
    if isinstance(gradient, str):
        if gradient not in GRADIENTS:
            raise InputError(f"unknown gradient {gradient!r}; known are {', '.join(GRADIENTS)}")
        return GRADIENTS[gradient]
    if not callable(getattr(gradient, "solve", None)):
        raise InputError(f"gradient must be a name or a gradient method, got {gradient!r}")
    return gradient


def _check_budget(times: tuple[float, ...], control: Control, max_steps: int) -> None:
    if max_steps < 1:
        raise InputError(f"max_steps must be at least 1, got {max_steps!r}")
    if isinstance(control, FixedStep):
        needed = sum(control.count(abs(later - earlier)) for earlier, later in pairwise(times))
        if needed > max_steps:
            raise InputError(
                f"step_size={control.step_size:g} needs {needed} steps from t={times[0]:g} to "
                f"t={times[-1]:g}, more than max_steps={max_steps}; raise one of them"
            )


def _depend_on_start(y: Leaves, slope: Leaves, t: Tensor) -> Leaves:
    """y with its dependence on the start: dL/dt0 = −⟨λ0, f(t0, y0)⟩."""
    shift = t[0] - t[0].detach()
    return tuple(
        leaf - k * shift.to(leaf.device, leaf.dtype) for leaf, k in zip(y, slope, strict=True)
    )


def _depend_on_times(
    solved: Solved, problem: Problem, first: Evaluation, t: Tensor, stats: Stats
) -> Solved:
    """The solution with its dependence on the output times: dL/dt_i = ⟨λ_i, f(t_i, y_i)⟩."""
    slopes, rates = [first.slope], [first.rates]
    with torch.no_grad():
        for i, moment in enumerate(problem.times[1:], start=1):
            stats.nfe += 1
            value = problem.field(moment, tuple(leaf[i].detach() for leaf in solved.states))
            slopes.append(value.slope)
            rates.append(value.rates)
    shift = t - t.detach()
    return Solved(
        tuple(
            _along(leaf, ks, shift)
            for leaf, ks in zip(solved.states, zip(*slopes, strict=True), strict=True)
        ),
        tuple(
            _along(leaf, ks, shift)
            - _along(torch.zeros_like(leaf), [ks[0]] * len(ks), shift[:1].expand_as(shift))
            for leaf, ks in zip(solved.integrals, zip(*rates, strict=True), strict=True)
        ),
    )


def _along(leaf: Tensor, slopes: Sequence[Tensor], shift: Tensor) -> Tensor:
    """leaf + slope_i · shift_i along the first axis."""
    shaped = shift.to(leaf.device, leaf.dtype).reshape(-1, *[1] * (leaf.ndim - 1))
    return leaf + torch.stack(list(slopes)).to(leaf.dtype) * shaped


def _partial(state: Structure, reached: list[Leaves] | None) -> Any:
    if not reached:
        return None
    return state.build([torch.stack(leaves).detach() for leaves in zip(*reached, strict=True)])
