"""An observer is told of every step, and a measure takes the place of the tolerances."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from cnf.error import IntegrationError
from cnf.ode.choice import choose_method
from cnf.ode.control import Adaptive, FixedStep
from cnf.ode.field import Evaluation
from cnf.ode.integrate import Problem, Stats, integrate
from cnf.ode.method import take_step
from cnf.ode.tableau import TABLEAUS

EVERY_METHOD = pytest.mark.parametrize("name", TABLEAUS)


class Swing:
    """A non-autonomous field of one leaf that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, t, y):
        self.calls += 1
        cosine = torch.cos(3 * t) if isinstance(t, torch.Tensor) else math.cos(3 * t)
        return Evaluation((cosine * torch.flip(y[0], [0]) - 0.1 * y[0] ** 2,), ())


class Watcher:
    """Notes what it is told; asks for the field at the end of a step if it is to."""

    def __init__(self, field=None):
        self.field, self.attempts, self.refused, self.accepted, self.ends = field, [], [], [], []

    def attempt(self, t, h, y):
        self.attempts.append((t, h))

    def refuse(self, t, h, y):
        self.refused.append((t, h))

    def accept(self, t, h, y, step):
        self.accepted.append((t, h))
        self.ends.append(step.y)
        if self.field is None or step.last is not None:
            return step.last
        return self.field(t + h, step.y)


def problem_of(field, end=2.0, method="dopri5", control=None, **more):
    control = control or Adaptive(1e-9, 1e-9, first_step=0.5)
    return Problem(field, (0.0, end), choose_method(method), control, 10_000, **more)


def start():
    return (torch.tensor([1.0, 0.5], dtype=torch.float64),)


@pytest.mark.parametrize("end", [2.0, -2.0])
def test_an_observer_is_told_of_every_step_before_and_after_it(end):
    watcher, stats = Watcher(), Stats()
    out = integrate(problem_of(Swing(), end, observer=watcher), start(), stats, keep=True)
    assert watcher.accepted == [(step.t, step.h) for step in out.record]
    assert len(watcher.refused) == stats.rejected > 0
    assert len(watcher.attempts) == stats.accepted + stats.rejected
    assert sorted(watcher.attempts) == sorted(watcher.accepted + watcher.refused)
    for end_of_one, start_of_next in pairwise([*out.record[1:], None]):
        assert start_of_next is None or end_of_one.t + end_of_one.h == start_of_next.t
    for step, y in zip(out.record[1:], watcher.ends, strict=False):
        assert torch.equal(step.y[0], y[0])


def test_an_observer_is_told_of_fixed_steps_too():
    watcher = Watcher()
    integrate(problem_of(Swing(), 1.0, control=FixedStep(0.25), observer=watcher), start(), Stats())
    assert watcher.accepted == watcher.attempts == [(i / 4, 0.25) for i in range(4)]


@EVERY_METHOD
def test_what_the_observer_asked_of_the_field_is_not_asked_again(name):
    method = choose_method(name)
    control = Adaptive(1e-3, 1e-3) if method.adaptive else FixedStep(0.1)
    alone, field = Swing(), Swing()
    stats = Stats()
    integrate(problem_of(alone, 1.0, name, control), start(), stats)
    integrate(problem_of(field, 1.0, name, control, observer=Watcher(field)), start(), Stats())
    # the last step's end is known already
    known = TABLEAUS[name].implicit or (method.adaptive and TABLEAUS[name].fsal)
    assert field.calls == alone.calls + (0 if known else 1)


def test_what_an_observer_raises_ends_the_solve():
    class Impatient(Watcher):
        def attempt(self, t, h, y):
            super().attempt(t, h, y)
            if len(self.attempts) == 3:
                raise KeyError("enough")

    watcher = Impatient()
    with pytest.raises(KeyError, match="enough"):
        integrate(problem_of(Swing(), observer=watcher), start(), Stats())
    assert len(watcher.attempts) == 3


def test_looking_for_where_a_solution_blew_up_is_not_observed():
    def explosive(t, y):
        return Evaluation((torch.full_like(y[0], math.inf if t > 0.5 else 1.0),), ())

    watcher = Watcher()
    problem = problem_of(explosive, control=FixedStep(0.1), method="euler", observer=watcher)
    with pytest.raises(IntegrationError):
        integrate(problem, start(), Stats())
    assert len(watcher.attempts) == 20


def test_a_measure_takes_the_place_of_the_tolerances():
    rtol, atol = 1e-5, 1e-6

    def measure(parts, y, end):
        scale = atol + rtol * torch.maximum(y[0].abs(), end[0].abs())
        return (parts[0] / scale).square().mean().sqrt().item()

    def strict(parts, y, end):
        return 30 * measure(parts, y, end)

    control = Adaptive(rtol, atol)
    by_control = problem_of(Swing(), control=control)
    found = [
        integrate(replace(by_control, measure=m), start(), Stats(), keep=True)
        for m in (None, measure, strict)
    ]
    lengths = [[step.h for step in out.record] for out in found]
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-9)
    assert len(lengths[2]) > 1.5 * len(lengths[1])


def test_the_measure_chooses_the_first_step_too():
    seen = []

    def measure(parts, y, end):
        seen.append(y[0] is end[0])
        return parts[0].abs().max().item() / 1e-6

    integrate(problem_of(Swing(), control=Adaptive(1.0, 1.0), measure=measure), start(), Stats())
    assert seen[:3] == [True] * 3 and not any(seen[3:])


@EVERY_METHOD
def test_a_step_between_tensor_times_is_that_of_floats_and_differentiable_by_them(name):
    method, field, (y,) = choose_method(name), Swing(), start()

    def end(t0, t1):
        first = field(t0, (y,))
        return take_step(method, field, t0, t1 - t0, (y,), first, False).y[0]

    t0, t1 = (torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (0.2, 0.5))
    torch.testing.assert_close(end(t0, t1), end(0.2, 0.5), rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(end, (t0, t1))


def test_a_step_between_tensor_times_keeps_a_state_without_dimensions():
    def field(t, y):
        return Evaluation((-y[0] * t.to(y[0]),), ())

    y = (torch.tensor(1.0),)
    t0, t1 = torch.tensor(0.2).double(), torch.tensor(0.5).double()
    step = take_step(choose_method("rk4"), field, t0, t1 - t0, y, field(t0, y), False)
    assert step.y[0].shape == () and step.y[0].dtype == torch.float32
    assert step.y[0].item() == pytest.approx(math.exp(-(0.25 - 0.04) / 2), abs=1e-5)
