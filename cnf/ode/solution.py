"""The front door: validate once, choose the method, its steps and its gradient, solve."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.allocator import keep_freed_memory
from cnf.error import InputError, IntegrationError
from cnf.ode.choice import choose_method
from cnf.ode.compiled import Compiled
from cnf.ode.control import Adaptive, Control, FixedStep
from cnf.ode.event import Event, Watch, as_events
from cnf.ode.field import (
    Evaluation,
    Field,
    UserField,
    find_captured,
    is_row_wise,
    name_tensors,
    precision_of,
)
from cnf.ode.gradient.adjoint import Adjoint
from cnf.ode.gradient.backprop import Backprop
from cnf.ode.gradient.checkpoint import Checkpoint
from cnf.ode.gradient.problem import Gradient, Solved, stacked
from cnf.ode.gradient.reversible import Reversible
from cnf.ode.integrate import Problem, Stats, integrate
from cnf.ode.method import ExplicitRungeKutta, Method, prepared, undifferentiated
from cnf.ode.moment import from_start
from cnf.ode.oracle import Oracle
from cnf.ode.outcome import Crossing, Dense, at_requested_times, events_met, read_at_times
from cnf.ode.state import Leaves, Structure
from cnf.ode.switching import Switching
from cnf.ode.tableau import Tableau
from cnf.ode.tangent import (
    carries_tangent,
    is_exported,
    is_mapped,
    is_transformed,
    is_unreadable,
    numbers_of,
)
from cnf.ode.trajectory import Counted, on_device

keep_freed_memory()

GRADIENTS: dict[str, Gradient] = {
    "backprop": Backprop(),
    "checkpoint": Checkpoint(),
    "adjoint": Adjoint(),
    "reversible": Reversible(),
}


@dataclass(frozen=True)
class Solution:
    """The solution of an ODE at the requested times.

    t: (times,), or (times, batch) where rows have times of their own; y: (times, *y0.shape), in a
    tuple or dict where y0 was one; integral: with quadrature=True the rates' integrals from t[0] to
    each t, (times, *rates.shape) in float64, else None; stats: what it cost.
    event_time, event_index: with event=, when a terminal event ended the solve (NaN for none) and
    which one (−1), 0-d or (batch,); y and integral stay at the event from there on.  crossings: all
    events that happened, in order, where all rows share their steps.
    dense: with dense=True the solution between the times, which calling the solution evaluates.
    """

    t: Tensor
    y: Any
    integral: Any
    stats: Stats
    event_time: Tensor | None = None
    event_index: Tensor | None = None
    crossings: tuple[Crossing, ...] = ()
    dense: Dense | None = None

    def __call__(self, t: Any) -> Any:
        """The state at any time t inside the interval: (*t.shape, *y0.shape), differentiable.

        t: a number or tensor of any shape; where every row has its own steps a number, (times,), or
        (times, batch) for times of each row's own.  Raises InputError outside the interval, or
        without dense=True.
        """
        if self.dense is None:
            raise InputError("the solution is known at t alone; solve with dense=True")
        return self.dense(t)


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
    event: Event | Sequence[Event] | None = None,
    dense: bool = False,
    compile: bool = False,
    max_steps: int = 100_000,
) -> Solution:
    """The solution of dy/dt = field(t, y) with y(t[0]) = y0, at every time of t.

    field: f(t, y, *rows, *params) → dy/dt of y's structure, t a 0-d tensor, or of shape (batch,)
    where every row has its own steps; with quadrature=True it returns (dy/dt, rates), and the
    rates' integrals come back beside the solution.
    y0: tensor, or tuple or dict of tensors, floating or complex; t: two or more strictly monotone
    times, in either direction; (times, batch) where rows have times of their own; the last may be
    infinite where a terminal event is to end the solve.
    method: "euler", "midpoint", "heun2", "heun3", "rk4", "rk4_38" (fixed steps only),
    "adaptive_heun", "fehlberg2", "bosh3", "dopri5", "tsit5", "dopri8" (both) or a Tableau; for
    stiff problems "kvaerno3", "kvaerno5" (both), "implicit_euler", "trapezoid" (fixed), and "auto",
    dopri5 until it meets stiffness and kvaerno5 there; "leapfrog" for separable systems (q, p)
    (fixed); "scipy:LSODA" and the like hand the problem to SciPy.
    rtol (1e-5), atol (1e-6): tolerances of adaptive steps; step_size: fixed steps with any method;
    control: FixedStep or Adaptive, instead of these three; Adaptive(per_sample=True) gives every
    row of the batch a time, step and error of its own.
    gradient: "checkpoint" (exact, one state a step), "backprop" (exact, the whole graph) or
    "adjoint" (the continuous adjoint, memory independent of the number of steps).
    params: tensors that the field takes as its last arguments, or that it captures and that are
    computed (captured leaves are found); rows: tensors aligned with the batch, taken before them.
    event: Event(g), or several: where g(t, y) turns zero; dense: keep what is needed to evaluate
    the solution anywhere; compile: compile the steps of an explicit method by torch.compile, which
    takes a minute once and pays where many solves of the same field and batch size follow;
    max_steps: steps tried in the whole solve, by each row.
    Gradients reach y0, t, rows, params and the field's leaves.  Raises InputError for what cannot
    be solved as asked, IntegrationError where the solution cannot be continued.

    >>> decay = solve(lambda t, y: -y, torch.ones(1), [0.0, 1.0])
    >>> round(decay.y[-1].item(), 4)
    0.3679
    """
    state = Structure(y0)
    y = _checked_state(state.leaves(y0))
    events = as_events(event)
    chosen = choose_method(method)
    steps = _choose_control(chosen, rtol, atol, step_size, control)
    if compile:
        chosen = _compiled(chosen)
    _check_transforms(steps, events)
    _check_precision(y, steps)
    times = _checked_times(t, y, steps, any(event.terminal for event in events))
    how = _choose_gradient(gradient)
    _check_budget(times, steps, max_steps)
    passed, captured = name_tensors(field, rows, params)
    _check_mode(how, (*y, *passed, *captured, *((t,) if isinstance(t, Tensor) else ())))
    real = y[0].real.dtype if y[0].dtype.is_complex else y[0].dtype
    inner = Field(
        field, state, None, real, y[0].device, passed, captured, aligned=len(rows),
        row_wise=is_row_wise(field), precision=precision_of(y[0].device),
    )  # fmt: skip
    stats = Stats()
    unchanged = _versions(y)
    inner, first = _first_look(inner, times, y, quadrature, how, steps.per_sample, stats)
    if _versions(y) != unchanged:
        raise InputError(
            "the field changes y in place, which the solve still needs; return a new tensor, "
            "-y for y.neg_()"
        )
    slopes = (*first.slope, *first.rates)
    unchanged = _versions(slopes)
    watch = Watch(events, state, inner.clock, steps.per_sample) if events else None
    _check_events(events, steps)
    begins = on_device(times[0], y) if steps.per_sample else times[0]
    chosen = prepared(chosen, steps, Counted(inner, stats), begins, y)
    clock = t if isinstance(t, Tensor) and _is_differentiated((t,)) else None
    if clock is None and not _is_followed(how, inner, y):
        chosen = undifferentiated(chosen)
    problem = Problem(inner, times, chosen, steps, max_steps, real, watch, dense)
    start, begun = y, ()
    if clock is not None:
        y, begun = from_start(problem, Counted(inner, stats), clock[0], y)
    try:
        solved = _solve(how, problem, inner, y, first, stats)
    except IntegrationError as error:
        error.partial = _partial(state, error.partial)
        _check_overwritten(slopes, unchanged)
        raise
    _check_overwritten(slopes, unchanged)
    if clock is not None:
        solved = solved.after(begun)
    if isinstance(chosen, Switching):
        stats.methods = chosen.changes()
    return _result(problem, solved, start, t, clock, stats)


def _compiled(method: Method) -> Compiled:
    if not isinstance(method, ExplicitRungeKutta):
        raise InputError(
            f"compile=True compiles explicit Runge–Kutta methods, and {method.name} is none; leave "
            "it out"
        )
    if is_transformed():
        raise InputError("compile=True does not go with the transforms of torch.func; leave it out")
    return Compiled(method)


def check_settings(
    method: str | Tableau | Method, control: Control, gradient: str | Gradient
) -> None:
    """Raises InputError for settings that `solve` would refuse."""
    _choose_control(choose_method(method), None, None, None, control)
    _choose_gradient(gradient)


def _is_followed(how: Gradient, field: Field, y: Leaves) -> bool:
    """Whether the way to gradients decides how to solve, rather than the loop alone."""
    if getattr(how, "changes_solution", False) or _is_differentiated((*y, *field.tensors)):
        return True
    if not isinstance(how, Backprop):
        return False
    return torch.is_grad_enabled() or carries_tangent((*y, *field.tensors))


def _solve(
    how: Gradient, problem: Problem, field: Field, y: Leaves, first: Evaluation, stats: Stats
) -> Solved:
    if _is_followed(how, field, y):
        if isinstance(problem.method, Oracle) and not isinstance(how, Adjoint):
            raise problem.method.refusal()
        return how.solve(problem, field, y, first, stats)
    with torch.no_grad():
        keep = problem.dense and problem.per_sample
        return stacked(integrate(problem, y, stats, first=first, keep=keep), problem)


def _result(
    problem: Problem,
    solved: Solved,
    start: Leaves,
    t: Tensor | Sequence[float],
    clock: Tensor | None,
    stats: Stats,
) -> Solution:
    """What the user gets of what was solved.

    start: y0, not as a function of t[0]; clock: the times, where gradients are to reach them.
    """
    field: Any = problem.field
    requested = at_requested_times(problem, solved)
    met = None
    if problem.watch:
        met = events_met(problem, solved, stats)
        requested = requested.after(met)
    if clock is not None:
        requested = read_at_times(requested, problem, solved.path, start, clock, stats)
    if not isinstance(t, Tensor):
        t = torch.stack([field.clock(float(moment)) for moment in t])  # waits for no device
    return Solution(
        t,
        field.state.build(requested.states),
        field.rates.build(requested.integrals) if field.rates is not None else None,
        stats,
        None if met is None else met.time,
        None if met is None else met.event,
        () if met is None else met.crossings,
        Dense(problem, solved) if problem.dense else None,
    )


def _first_look(
    field: Field,
    times: Any,
    y: Leaves,
    quadrature: bool,
    how: Gradient,
    per_sample: bool,
    stats: Stats,
) -> tuple[Field, Evaluation]:
    """The field with its rates' structure and captured leaves, and its value at the start.

    The value is the solve's first stage; what the field returns is checked here, and trusted after.
    """
    start = tuple(leaf.detach() for leaf in y)
    stats.calls += 1
    searched = torch.is_grad_enabled() and not isinstance(how, Backprop)
    aliases = field.aliases() if searched else field.tensors
    bound = field.bind(aliases)
    time = field.clock(on_device(times[0], y) if per_sample else times[0])
    seen: list[Structure] = []

    def evaluate() -> Evaluation:
        checked, structure = _checked_value(bound, time, start, quadrature)
        seen.extend([] if structure is None else [structure])
        return checked

    before = _random_state(y) if searched else None
    if searched:
        with field.precision:
            first, found = find_captured(field.call, evaluate, (*aliases, *start, time))
    else:
        first, found = evaluate(), ()
    _check_mode(how, (*first.slope, *first.rates))  # it may capture what carries a tangent
    first = Evaluation(*(tuple(leaf.detach() for leaf in part) for part in first))
    if per_sample:
        _check_rates(first.rates, len(start[0]))
    if seen or found:
        field = replace(field, rates=seen[0] if seen else None, captured=field.captured + found)
    if before is not None and _is_differentiated((*y, *field.tensors)):
        _warn_of_draws(before, _random_state(y))
    return field, first


def _random_state(y: Leaves) -> Tensor | None:
    """Where torch's generators stand, of the CPU and of y's device; None where nobody can tell."""
    if is_transformed() or is_unreadable(y):
        return None
    state, device = torch.get_rng_state(), y[0].device
    if device.type != "cuda":
        return state
    return torch.cat([state, torch.cuda.get_rng_state(device)])


def _warn_of_draws(before: Tensor, after: Tensor | None) -> None:
    """Warns of a field that draws random numbers, since backward evaluates it again."""
    if after is not None and not torch.equal(before, after):
        warnings.warn(
            "the field draws random numbers (a Dropout in train(), say), and backward, which "
            "evaluates it again, draws others: the gradient is not that of this solution; use "
            "gradient='backprop', or draw once and hand the noise in by rows= or params=",
            stacklevel=4,  # who called solve
        )


def _versions(leaves: Leaves) -> list[int | None]:
    """How often each was written to; None for an inference tensor, which nobody counts."""
    return [None if leaf.is_inference() else leaf._version for leaf in leaves]


def _check_overwritten(slopes: Leaves, unchanged: list[int | None]) -> None:
    """Raises InputError where the field wrote to what it had returned."""
    if _versions(slopes) != unchanged:
        raise InputError(
            "the field writes to the tensor that it returned before, which the solve still needs; "
            "return a new one at every call"
        )


def _check_precision(y: Leaves, control: Control) -> None:
    """Raises InputError where half precision rounds coarser than the tolerance."""
    for leaf in y:
        rounds = torch.finfo(leaf.dtype).eps
        if isinstance(control, Adaptive) and rounds > 1e-4 and control.rtol < rounds:
            raise InputError(
                f"y0 is {leaf.dtype}, which rounds to {rounds:.0e} of a number: rtol="
                f"{control.rtol:g} cannot be met; solve in float32 and cast inside the field, or "
                "give step_size="
            )


def _check_mode(how: Gradient, tensors: Sequence[Tensor]) -> None:
    """Raises InputError where the solve is differentiated in a way that the gradient is not for."""
    if not isinstance(how, Backprop) and (is_transformed() or carries_tangent(tensors)):
        raise InputError(
            f"gradient={how!r} is for backward alone: forward-mode tangents and the transforms of "
            "torch.func need gradient='backprop'"
        )


def _check_transforms(control: Control, events: tuple[Event, ...]) -> None:
    if is_mapped() and isinstance(control, Adaptive):
        raise InputError(
            "under torch.func.vmap, and so in jacfwd and hessian, no number can be read from a "
            "tensor, and steps cannot follow the solution: give step_size="
        )
    if is_exported() and (isinstance(control, Adaptive) or events):
        raise InputError(
            "torch.export traces one path for all inputs, and adaptive steps and events follow the "
            "solution: give step_size=, or an ODEBlock a budget, block.nfe = 8"
        )
    if is_transformed() and (control.per_sample or events):
        raise InputError(
            "the transforms of torch.func go with steps that all rows share and without event=; "
            "leave out per_sample=True, or differentiate by backward()"
        )


def _check_rates(rates: Leaves, batch: int) -> None:
    for rate in rates:
        if rate.ndim < 1 or len(rate) != batch:
            raise InputError(
                f"with per_sample=True every rate needs one entry a row, shape ({batch}, …), got "
                f"{tuple(rate.shape)}"
            )


def _checked_value(
    field: Field, time: Tensor, y: Leaves, quadrature: bool
) -> tuple[Evaluation, Structure | None]:
    value = _first_value(field, time, y)
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
                f"the field returned {part} of shape {tuple(dy.shape)} at {_at(time)}, expected "
                f"y's shape {tuple(leaf.shape)}"
            )
        if dy.dtype != leaf.dtype or dy.device != leaf.device:
            raise InputError(
                f"the field returned {part} as {dy.dtype} on {dy.device} at {_at(time)}, but y is "
                f"{leaf.dtype} on {leaf.device}; convert one of them"
            )
    return Evaluation(slope, rates), structure


def _first_value(field: Field, time: Tensor, y: Leaves) -> Any:
    """The user's value; raises InputError where it fails for times of shape (batch,)."""
    if time.ndim == 0:
        return field.value(time, y)
    try:
        return field.value(time, y)
    except RuntimeError as error:
        raise InputError(
            f"the field fails for times of shape ({len(time)},), one for each row, which "
            f"per_sample=True needs ({error}); reshape t in the field, t.reshape(-1, 1)"
        ) from error


def _at(time: Tensor) -> str:
    return f"t={time:g}" if time.ndim == 0 else f"t of shape {tuple(time.shape)}"


def _checked_state(leaves: Leaves) -> Leaves:
    for leaf in leaves:
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise InputError(f"y0 must be floating or complex, got {leaf.dtype}; try y0.float()")
        if leaf.device != leaves[0].device:
            raise InputError(f"y0's parts are on {leaves[0].device} and {leaf.device}; move one")
    return leaves


def _checked_times(t: Tensor | Sequence[float], y: Leaves, control: Control, endless: bool) -> Any:
    """Host times: a tuple, or (times, batch) in float64 where every row has its own steps."""
    if isinstance(t, Tensor) and t.ndim == 2:
        return _times_of_rows(t, y, control, endless)
    if isinstance(t, Tensor):
        if t.ndim != 1:
            raise InputError(f"t must have one dimension, (times,), got shape {tuple(t.shape)}")
        if t.is_complex():
            raise InputError(f"t must be real, got {t.dtype}")
        times = tuple(_read(t))
    elif isinstance(t, Sequence) and any(isinstance(x, Tensor) and x.requires_grad for x in t):
        raise InputError("t holds tensors that require grad; give one tensor, torch.stack(t)")
    else:
        try:
            times = tuple(float(moment) for moment in t)
        except (TypeError, ValueError):
            raise InputError(f"t must be a tensor or a sequence of times, got {t!r}") from None
    _check_monotone(times, endless)
    if not control.per_sample:
        return times
    _batch_of(y)
    return np.array(times)[:, None] * np.ones((1, len(y[0])))


def _read(t: Tensor) -> Any:
    """The times as Python numbers."""
    try:
        return numbers_of(t.detach().double())
    except RuntimeError as error:  # of a vmap over times
        raise InputError(f"the times must be the same for all that is mapped ({error})") from None


def _times_of_rows(t: Tensor, y: Leaves, control: Control, endless: bool) -> np.ndarray:
    if not control.per_sample:
        raise InputError(
            f"t of shape {tuple(t.shape)} gives every row its own times, which needs steps of its "
            "own: control=Adaptive(..., per_sample=True) or FixedStep(..., per_sample=True)"
        )
    batch = _batch_of(y)
    if t.is_complex() or t.shape[1] != batch:
        raise InputError(f"t must be real and of shape (times, {batch}), got {tuple(t.shape)}")
    times = t.detach().double().cpu().numpy()
    for row in range(batch):
        _check_monotone(tuple(times[:, row].tolist()), endless, f" for row {row}")
    return times


def _batch_of(y: Leaves) -> int:
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in y}
    if len(sizes) != 1 or None in sizes:
        raise InputError(
            "per_sample=True needs y0 with a first dimension of rows, the same in all its parts, "
            f"got shapes {', '.join(str(tuple(leaf.shape)) for leaf in y)}"
        )
    return len(y[0])


def _check_monotone(times: tuple[float, ...], endless: bool, whose: str = "") -> None:
    if len(times) < 2:
        raise InputError(f"t must hold a start and at least one end, got {len(times)} times")
    known = times[:-1] if endless and not math.isnan(times[-1]) else times
    if not all(math.isfinite(moment) for moment in known):
        raise InputError(f"t must be finite{whose}, got {times}")
    rising = [later - earlier for earlier, later in pairwise(times)]
    for i, difference in enumerate(rising):
        if difference == 0 or (difference > 0) != (rising[0] > 0):
            raise InputError(
                f"t must be strictly increasing or strictly decreasing{whose}, but "
                f"t[{i}]={times[i]:g} is followed by t[{i + 1}]={times[i + 1]:g}"
            )


def _check_events(events: tuple[Event, ...], control: Control) -> None:
    if control.per_sample and not all(event.terminal for event in events):
        raise InputError(
            "events with terminal=False need steps that all rows share: leave out per_sample=True"
        )


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
            "give step_size=, or take dopri5, tsit5, bosh3 or dopri8, or kvaerno5 if it is stiff"
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


def _check_budget(times: Any, control: Control, max_steps: int) -> None:
    if max_steps < 1:
        raise InputError(f"max_steps must be at least 1, got {max_steps!r}")
    if not isinstance(control, FixedStep):
        return
    lengths = np.abs(np.diff(np.asarray(times), axis=0))
    finite = np.where(np.isfinite(lengths), lengths, 0.0)  # an event ends what has no end
    needed = np.max(sum(map(control.count, finite)), initial=0)
    if needed > max_steps:
        start, end = np.ravel(times[0])[0], np.ravel(times[-1])[0]
        raise InputError(
            f"step_size={control.step_size:g} needs {int(needed)} steps from t={start:g} to "
            f"t={end:g}, more than max_steps={max_steps}; raise one of them"
        )


def _is_differentiated(tensors: Sequence[Tensor]) -> bool:
    """Whether gradients, or forward-mode tangents, go through one of the tensors."""
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return wanted or carries_tangent(tensors)


def _partial(state: Structure, reached: list[Leaves] | None) -> Any:
    if not reached:
        return None
    return state.build([torch.stack(leaves).detach() for leaves in zip(*reached, strict=True)])
