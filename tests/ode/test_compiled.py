"""Compiled steps: the same solution and gradients, one compilation for a field and its shapes.

The tests trace and differentiate as torch.compile does, but leave out the C++ compiler, which takes
most of the time; a slow test goes the whole way.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

import cnf
from cnf.ode import compiled
from cnf.ode.solution import solve

F64 = torch.float64
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # torch hides it itself
]


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch, request):
    torch._dynamo.reset()
    if "whole_way" not in request.node.name:
        monkeypatch.setattr(compiled, "BACKEND", "aot_eager")


class Net(nn.Module):
    """dy/dt = tanh(W y + t) s, with a rate if asked for; counts how often Python runs it."""

    def __init__(self, rated: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3, dtype=F64)
        self.rated, self.calls = rated, 0

    def forward(self, t, y, scale):
        slope = torch.tanh(self.layer(y) + t) * scale
        return (slope, (y.square() * (1 + t)).sum(-1)) if self.rated else slope


def found(field, **settings):
    y0 = torch.linspace(-1, 1, 12, dtype=F64).reshape(4, 3).requires_grad_()
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=F64, requires_grad=True)
    times = torch.tensor([0.0, 0.4, 1.0], dtype=F64, requires_grad=True)
    sol = solve(field, y0, times, params=[scale], quadrature=field.rated, **settings)
    loss = sol.y.sin().sum() + (sol.integral.sum() if field.rated else 0.0)
    inputs = (y0, scale, times, *field.parameters())
    return (sol.y.detach(), *torch.autograd.grad(loss, inputs)), sol.stats


@pytest.mark.parametrize("gradient", ["checkpoint", "backprop", "adjoint", cnf.Checkpoint("sqrt")])
@pytest.mark.parametrize("steps", [dict(rtol=1e-7), dict(method="rk4", step_size=0.1)])
def test_solution_and_gradients_are_those_of_plain_steps(gradient, steps):
    field = Net(rated=True)
    ours, stats = found(field, gradient=gradient, compile=True, **steps)
    plain = cnf.Checkpoint("steps") if gradient == "checkpoint" else gradient
    theirs, expected = found(field, gradient=plain, **steps)
    for part, same in zip(ours, theirs, strict=True):
        assert torch.allclose(part, same, rtol=1e-9, atol=1e-10)
    assert (stats.nfe, stats.nfe_backward) == (expected.nfe, expected.nfe_backward)


def test_one_compilation_serves_many_solves():
    field = Net()
    frames = torch._dynamo.utils.counters["frames"]
    for rtol in (1e-4, 1e-6):
        with torch.no_grad():
            solve(field, torch.ones(4, 3, dtype=F64), [0.0, 1.0], rtol=rtol, compile=True,
                  params=[torch.ones(3, dtype=F64)])  # fmt: skip
    assert frames["ok"] == frames["total"] and frames["total"] <= 2


def test_states_of_several_parts_are_compiled():
    field = lambda t, y: {"a": y["b"], "b": -y["a"]}  # noqa: E731
    y0 = {"a": torch.ones(2, dtype=F64), "b": torch.zeros(2, dtype=F64)}
    ours = solve(field, y0, [0.0, 1.0], compile=True, rtol=1e-8).y
    theirs = solve(field, y0, [0.0, 1.0], rtol=1e-8).y
    assert all(torch.allclose(ours[key], theirs[key], rtol=1e-10) for key in y0)


def test_dense_output_and_events_go_with_it():
    y0 = torch.tensor([1.0, 0.0], dtype=F64)
    field = lambda t, y: torch.stack([y[1], -y[0]])  # noqa: E731
    event = cnf.Event(lambda t, y: y[0])
    ours, theirs = (
        solve(field, y0, [0.0, 3.0], dense=True, event=event, compile=compile, rtol=1e-8)
        for compile in (True, False)
    )
    assert torch.allclose(ours.event_time, theirs.event_time, rtol=1e-9)
    assert torch.allclose(ours(0.7), theirs(0.7), rtol=1e-8)


def test_second_derivatives_come_from_plain_steps():
    y0 = torch.linspace(0.1, 1, 3, dtype=F64).requires_grad_()
    field = lambda t, y: torch.sin(y)  # noqa: E731

    def second(compile):
        y = solve(field, y0, [0.0, 1.0], compile=compile, rtol=1e-6).y[-1]
        (first,) = torch.autograd.grad(y.sum(), y0, create_graph=True)
        return torch.autograd.grad(first.square().sum(), y0)[0]

    assert torch.allclose(second(True), second(False), rtol=1e-9)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(method="kvaerno3"), "compile=True compiles explicit Runge–Kutta methods"),
        (dict(method="leapfrog", step_size=0.1), "compile=True compiles explicit"),
        (dict(control=cnf.Adaptive(per_sample=True)), "the step that all rows share"),
        (dict(control=cnf.Adaptive(jumps=(0.5,))), "the step that all rows share"),
        (dict(gradient="reversible"), "does not go with compile=True"),
        (dict(gradient=cnf.Checkpoint("stages")), "needs an explicit Runge–Kutta method"),
    ],
)
def test_what_it_does_not_go_with_is_refused(settings, words):
    y0 = torch.ones(2, 2, dtype=F64, requires_grad=True)
    with pytest.raises(cnf.InputError, match=words):
        solve(lambda t, y: -y, y0, [0.0, 1.0], compile=True, **settings)


def test_a_failure_to_compile_is_a_sentence(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler was found")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    with pytest.raises(cnf.InputError, match=r"cannot be compiled .*no compiler was found"):
        solve(lambda t, y: -y, torch.ones(2), [0.0, 1.0], compile=True)


def test_any_number_of_fields_is_compiled():
    y0 = torch.linspace(-1, 1, 4, dtype=F64)
    for k in range(12):  # torch.compile would give up after eight of one function

        def field(t, y, k=k):
            return -y * (k + t)

        fixed = dict(method="heun2", step_size=0.5)
        found = solve(field, y0, [0.0, 1.0], compile=True, **fixed).y
        assert torch.allclose(found, solve(field, y0, [0.0, 1.0], **fixed).y)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        return -y


def test_a_field_that_changes_at_every_call_is_a_sentence():
    field = Counting()
    with pytest.raises(cnf.InputError, match="compiled again and again"):
        for _ in range(20):
            solve(field, torch.ones(3), [0.0, 1.0], method="heun2", step_size=0.5, compile=True)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_the_whole_way_it_is_the_same():
    field = Net(rated=True)
    ours, _ = found(field, compile=True, rtol=1e-7)
    theirs, _ = found(field, gradient=cnf.Checkpoint("steps"), rtol=1e-7)
    for part, same in zip(ours, theirs, strict=True):
        assert torch.allclose(part, same, rtol=1e-8, atol=1e-9)
