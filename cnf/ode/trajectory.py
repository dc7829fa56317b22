"""What is solved, what it costs and what is left behind: the loop's vocabulary."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cnf.error import IntegrationError
from cnf.ode.control import Adaptive, Control, FixedStep, choose, over
from cnf.ode.event import Watch
from cnf.ode.field import Evaluation
from cnf.ode.interpolate import Polynomial, interpolant
from cnf.ode.jacobian import jacobian_of
from cnf.ode.method import Evaluate, Method, OwnPace, Step, take_step
from cnf.ode.state import Leaves, as_matrix
from cnf.ode.tangent import is_transformed, numbers_of

Count = Any  # an int, or an int64 tensor of shape (batch,) where every row has its own steps
HALF = 0.5  # of a step whose equations were not solved is tried next: its error says nothing
Times = Any  # a tuple of floats, or a float64 array of shape (times, batch)


@dataclass
class Stats:
    """What a solve cost: evaluations of the field forward and backward, steps taken and refused.

    Where every row has its own steps the forward counts are int64 tensors of shape (batch,), on the
    host: what each row would need alone.  calls: how often the field was called forward, whatever
    the number of rows; nfe_backward: the same of backward, which grows when `backward()` runs.
    jacobians: how often the field's Jacobian was taken, for implicit methods, forward and backward:
    each time by one more call, which the other counts leave out.
    methods: (t, name) wherever a method that is several changed to another.
    """

    nfe: Count = 0
    nfe_backward: Count = 0
    accepted: Count = 0
    rejected: Count = 0
    calls: int = 0
    jacobians: int = 0
    methods: list[tuple[float, str]] = field(default_factory=list)

    @property
    def attempts(self) -> int:
        """Steps tried: the most of any row."""
        tried = self.accepted + self.rejected
        if isinstance(tried, Tensor):
            return int(tried.max()) if tried.numel() else 0
        return tried


class Observer(Protocol):
    """Who is told of every step, where all rows share them; t and h are host numbers.

    What it raises ends the solve.
    """

    def attempt(self, t: float, h: float, y: Leaves) -> None:
        """A step from (t, y) by h is about to be tried."""
        ...

    def refuse(self, t: float, h: float, y: Leaves) -> None:
        """The step was not good enough, and another one will be tried."""
        ...

    def accept(self, t: float, h: float, y: Leaves, step: Step) -> Evaluation | None:
        """The step was taken.  Returns the field at its end, where the step or the observer has it:
        the next step begins with it.
        """
        ...


class Measure(Protocol):
    """How large something is against the tolerance, in place of the control's own way."""

    def __call__(self, parts: Leaves, y: Leaves, end: Leaves) -> float:
        """The size of `parts`, of the state's shapes, on a step from y to `end`; on the host."""
        ...


@dataclass(frozen=True)
class Problem:
    """dy/dt = field(t, y) over strictly monotone host `times`, and how to solve it.

    clock: the dtype in which the field gets the time; watch: events; dense: whether the end of
    every step is an arrival; measure: of errors, None for the control's tolerances; observer: who
    is told of the steps; both where all rows share them.
    """

    field: Evaluate
    times: Times
    method: Method
    control: Control
    max_steps: int
    clock: torch.dtype = torch.float64
    watch: Watch | None = None
    dense: bool = False
    measure: Measure | None = None
    observer: Observer | None = None

    @property
    def per_sample(self) -> bool:
        return self.control.per_sample

    @property
    def direction(self) -> Any:
        """1 where time runs forward, −1 where it runs backward; a row's own where rows have."""
        rise = self.times[-1] - self.times[0]
        return np.sign(rise) if self.per_sample else math.copysign(1.0, rise)

    @property
    def span(self) -> Any:
        return abs(self.times[-1] - self.times[0])

    def evaluate(self, field: Evaluate, t: Any, y: Leaves, side: Any) -> Evaluation:
        """The field at t, seen from the side of `side`, a time, where t is a jump."""
        return field(self.beside(t, side), y)

    def step(
        self, field: Evaluate, t: Any, h: Any, y: Leaves, first: Evaluation, estimate: bool
    ) -> Step:
        """The step from (t, y) by h, where the field is `first`; see Method.step."""
        if self.control.jumps:
            field = self._inside(field, t, h)
        return take_step(self.method, field, t, h, y, first, estimate)

    def first_stage(self, field: Evaluate, t: Any, h: Any, y: Leaves) -> Evaluation:
        """The field at the start of the step from (t, y) by h."""
        return (self._inside(field, t, h) if self.control.jumps else field)(t, y)

    def interpolant(
        self,
        field: Evaluate,
        t: Any,
        h: Any,
        y: Leaves,
        first: Evaluation,
        step: Step | None = None,
    ) -> Polynomial:
        """The solution inside the step from (t, y) by h, where the field is `first`.

        step: the step itself, where it was taken already and all rows share it.
        """
        if self.control.jumps:
            field = self._inside(field, t, h)
        if not isinstance(h, Tensor):
            return interpolant(self.method, field, t, h, y, first, step)
        pace = OwnPace(field, t, h)
        return interpolant(self.method, pace, 0.0, 1.0, y, pace.scaled(first))

    def _inside(self, field: Evaluate, t: Any, h: Any) -> Evaluate:
        """The field on a step that may begin or end at a jump: seen from inside the step."""
        return _Inside(field, lambda moment: self.beside(moment, t + h / 2, beyond=True))

    def beside(self, t: Any, side: Any, beyond: bool = False) -> Any:
        """t, but next to a jump on the side of the time `side` where t is one, in the precision in
        which the field sees it.

        beyond: where a jump lies between too, as for a stage after the end of its step.
        """
        for jump in self.control.jumps:
            at = torch.tensor(jump, dtype=self.clock, device="cpu")
            if isinstance(t, Tensor):
                seen, at = t.to(self.clock), at.to(t.device)
                there = (seen - at) * (jump - side) >= 0 if beyond else seen == at
                nudged = torch.nextafter(at, side.to(self.clock))
                t = torch.where(there, nudged.to(t.dtype), t)
                continue
            seen, edge = torch.tensor(t, dtype=self.clock, device="cpu").item(), at.item()
            if (seen - edge) * (jump - side) >= 0 if beyond else seen == edge:
                t = torch.nextafter(at, torch.tensor(side, dtype=self.clock, device="cpu")).item()
        return t


class _Inside:
    """A field that is asked at another time than the one given."""

    def __init__(self, field: Any, moved: Callable[[Any], Any]) -> None:
        self._field, self._moved = field, moved

    def __call__(self, t: Any, y: Leaves) -> Evaluation:
        return self._field(self._moved(t), y)

    def jacobian(self, t: Any, y: Leaves) -> Tensor:
        return jacobian_of(self._field, self._moved(t), y)


class Accepted(NamedTuple):
    """One accepted step: from (t, y) by h; rows: those of the batch that took it, None for all.

    t, h: floats, or float64 tensors of shape (rows,) where every row has its own; slot: there, the
    index of what was reached at the step's end, (rows,), −1 for nothing.
    """

    rows: Tensor | None
    t: Any
    h: Any
    y: Leaves
    slot: Tensor | None = None


@dataclass(frozen=True)
class Path:
    """What is known on the host of a solve's way, besides the states; see Trajectory.

    steps: (rows, t, h, slot) of each accepted step.
    """

    times: list[Any]
    labels: list[int | None]
    marks: list[int]
    stopped: np.ndarray | None
    steps: Sequence[Any]


class Steps(Sequence[Any]):
    """(rows, t, h, slot) of accepted steps that all rows share, in 16 bytes each."""

    def __init__(self, steps: Iterable[Accepted] = ()) -> None:
        self._numbers = array("d")
        for one in steps:
            self.append(one)

    def append(self, one: Accepted) -> None:
        self._numbers.extend((one.t, one.h))

    def __len__(self) -> int:
        return len(self._numbers) // 2

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        place = 2 * range(len(self))[i]
        return None, self._numbers[place], self._numbers[place + 1], None


@dataclass
class Trajectory:
    """States and integrals where the solution arrived.

    states, integrals: at each arrival in order; where every row has its own steps, stacked by
    output time in one entry each, with one more for the rows' events if there are any; times: of
    the arrivals; labels: the output time that was reached, or −1 − i for event i, or None for the
    end of another step; marks: how many steps had been accepted; record: the accepted steps, where
    they were kept; stopped: each row's event, −1 for none.
    """

    states: list[Leaves] = field(default_factory=list)
    integrals: list[Leaves] = field(default_factory=list)
    times: list[Any] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    record: list[Accepted] = field(default_factory=list)
    stopped: np.ndarray | None = None

    @property
    def path(self) -> Path:
        """All of it but the tensors.  A record that keeps few of the steps has all in `steps`."""
        steps = getattr(self.record, "steps", None)
        if steps is None and any(isinstance(one.t, Tensor) for one in self.record[:1]):
            steps = [(one.rows, one.t, one.h, one.slot) for one in self.record]
        elif steps is None:
            steps = Steps(self.record)
        return Path(self.times, self.labels, self.marks, self.stopped, steps)


class Counted:
    """A field that counts its calls."""

    def __init__(self, field: Any, stats: Stats) -> None:
        self.inner, self._stats = field, stats

    def __call__(self, t: Any, y: Leaves) -> Evaluation:
        self._stats.calls += 1
        return self.inner(t, y)

    def count(self, calls: int) -> None:
        """Count evaluations that were made of the inner field itself."""
        self._stats.calls += calls

    def jacobian(self, t: Any, y: Leaves) -> Tensor:
        self._stats.jacobians += 1
        return jacobian_of(self.inner, t, y)


def tolerances(y: Leaves, control: Adaptive) -> Leaves:
    """atol + rtol·|y| of every leaf, in units of `_unit`.

    Never 0, since a part that stays 0 would have the error 0/0.
    """
    found, graph = [], torch.is_grad_enabled()
    for leaf in y:
        size = (leaf.detach() if graph else leaf).abs()
        limits = torch.finfo(size.dtype)
        offset = max(control.atol, limits.tiny) / (control.rtol or math.inf)
        if 0 < offset < limits.max:
            # of a number torch makes a tensor at every call, and dynamo looks through no cache
            is_traced = torch.compiler.is_compiling()
            size.add_(offset if is_traced else _constant(offset, size.dtype))
        else:
            size.fill_(1.0)
        found.append(size)
    return tuple(found)


@cache
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """A 0-d tensor on the host, which takes part in sums on any device."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


def error_ratio(step: Step, before: Leaves, after: Leaves, control: Adaptive) -> Any:
    """Estimated error over tolerance: the largest RMS of the state's leaves and integrals.

    before, after: the `tolerances` where the step begins and where it ends.
    On the host, by one device-to-host read: a float, or (rows,) where every row has its own steps.
    """
    parts = [
        error / torch.maximum(*both) for error, *both in zip(step.error, before, after, strict=True)
    ]
    units = [_unit(control)] * len(parts)
    if control.quadrature_atol is not None and step.increment_error:
        parts += step.increment_error
        units += [control.quadrature_atol] * len(step.increment_error)
    return _largest_rms(parts, units, control.per_sample)


@torch.no_grad()
def first_size(
    problem: Problem, evaluate: Evaluate, y: Leaves, first: Evaluation, unit: Leaves
) -> Any:
    """The first step to try, a float or one for each row; unit: the `tolerances` at y, if steps are
    adaptive and errors have no measure of their own.

    Source: Hairer, Nørsett & Wanner I, section II.4, starting step.
    """
    control, span = problem.control, problem.span
    if isinstance(control, FixedStep):
        return choose(span < math.inf, control.step_size, control.step_size)
    if control.first_step is not None:
        return control.within(_smaller(control.first_step, span))
    size = _size_at(problem, y, control, unit)
    height, slope = size(y), size(first.slope)
    whole = choose(span < math.inf, span, 1.0)
    steady = (height > 1e-5) & (slope > 1e-5)
    trial = _smaller(choose(steady, over(0.01 * height, slope), 1e-6 * whole), span)
    # a field that is not finite, say: the loop will shrink the step, or say what is wrong
    usable = (trial > 0) & (trial < math.inf)
    trial = choose(usable, trial, 0.0)
    then = _ahead(problem, evaluate, y, first, trial)
    bend = over(size(tuple(map(torch.sub, then.slope, first.slope))), trial)
    steepest = choose(bend > slope, bend, slope)
    guess = over(0.01, steepest) ** (1 / problem.method.order)
    found = choose(guess < math.inf, _smaller(_smaller(100 * trial, guess), span), trial)
    moves = usable & (steepest > 1e-15)  # else the field stands still here
    return control.within(choose(moves, found, whole))


def _ahead(
    problem: Problem, evaluate: Evaluate, y: Leaves, first: Evaluation, trial: Any
) -> Evaluation:
    """The field after a step of Euler's method by `trial`."""
    start, h = problem.times[0], problem.direction * trial
    if problem.per_sample:
        start, h = on_device(start, y), on_device(h, y)
        first, at = OwnPace(evaluate, start, h).scaled(first), 1.0
    else:
        at = h
    ahead = (torch.add(leaf, k, alpha=at) for leaf, k in zip(y, first.slope, strict=True))
    return evaluate(start + h, tuple(ahead))


def on_device(numbers: np.ndarray, y: Leaves) -> Tensor:
    """Host numbers, float64, where the state is."""
    tensor = torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.float64))
    return tensor.to(y[0].device, non_blocking=True)


def _smaller(a: Any, b: Any) -> Any:
    """The smaller of two numbers, or of two of each row; `a` where it is NaN."""
    return choose(a > b, b, a)


def on_host(numbers: Tensor) -> np.ndarray:
    """The numbers of a tensor in float64: one device-to-host read."""
    numbers = numbers.detach().double()
    if is_transformed():  # torch.func lets numbers be read, but makes no arrays
        return np.array(numbers_of(numbers), dtype=np.float64).reshape(numbers.shape)
    return numbers.cpu().numpy()


def _unit(control: Adaptive) -> float:
    """What `tolerances` leave out: on small tensors a product costs as much as on the host."""
    return control.rtol or control.atol


def _size_at(
    problem: Problem, y: Leaves, control: Adaptive, unit: Leaves
) -> Callable[[Leaves], Any]:
    """What measures leaves against the tolerance at y: a float or one for each row."""
    measure = problem.measure
    if measure is not None:
        return lambda leaves: measure(leaves, y, y)

    def size(leaves: Leaves) -> Any:
        parts = list(map(torch.div, leaves, unit))
        return _largest_rms(parts, [_unit(control)] * len(parts), control.per_sample)

    return size


def _largest_rms(parts: Sequence[Tensor], units: Sequence[float], of_rows: bool) -> Any:
    """The largest RMS of the parts, each in its own unit, NaN where one of them is.

    On the host: a float, or (rows,) for the RMS of each row.
    """
    if len(parts) == 1 and not of_rows:
        return torch.linalg.vector_norm(parts[0]).item() / (units[0] * _root(parts[0].numel()))
    rows = [as_matrix(part) if of_rows else part.flatten()[None] for part in parts]
    norms = torch.stack([torch.linalg.vector_norm(row, dim=1).double() for row in rows])
    weights = [1 / (unit * _root(row.shape[1])) for unit, row in zip(units, rows, strict=True)]
    largest = (on_host(norms).T * weights).max(-1)
    return largest if of_rows else float(largest[0])


def _root(size: int) -> float:
    return math.sqrt(size or 1)


OUTGROWN = "t has outgrown its dtype, and the event has not come"
BEYOND = " before a non-finite value"  # said of steps that were refused for one


def failure(
    reason: str,
    problem: Problem,
    t: float,
    step: float,
    stats: Stats,
    reached: Sequence[Leaves],
    rows: Sequence[int] = (),
    stiff: float | None = None,
) -> IntegrationError:
    """The error that says where the solution ended, and what to try.

    stiff: |h λ| where the problem was found to be stiff there.
    """
    where = f" (rows {', '.join(map(str, rows))})" if len(rows) else ""
    fixed = isinstance(problem.control, FixedStep)
    if stiff is not None:
        cause, remedy = f"the problem is stiff there (h·ρ ≈ {stiff:.2g})", "method='kvaerno5'"
    elif fixed:
        cause = "the solution may blow up or be stiff there"
        remedy = "a smaller step_size, bounded weights in the field, or inputs of unit scale"
    else:
        cause = "the solution may blow up there"
        remedy = "a larger atol and rtol, a smoother field, inputs of unit scale, or more max_steps"
    return IntegrationError(
        f"{reason}{where} at t={t:.6g} with step {abs(step):.2g} of {problem.method.name}, after "
        f"{stats.calls} evaluations; {cause}: try {remedy}",
        t=t,
        step=abs(step),
        nfe=stats.calls,
        partial=list(reached),
    )


def furthest(problem: Problem) -> float:
    """How far t may go where there is no end: a step times a weight is a number as well."""
    return 1e-3 * torch.finfo(problem.clock).max


def tiniest(problem: Problem) -> Any:
    """The shortest step worth trying: below it time does not advance; one for each row if rows
    have their own.
    """
    start, end, span = abs(problem.times[0]), abs(problem.times[-1]), problem.span
    longest = -_smaller(-start, -choose(np.isfinite(end), end, 1.0))
    return -1e-13 * _smaller(-longest, -choose(np.isfinite(span), span, 1.0))
