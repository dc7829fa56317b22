"""Reversible steps: the method's order, gradients exact to rounding, from the last state alone."""

from __future__ import annotations

import math

import pytest
import torch

import cnf

F64 = torch.float64


def pendulum(matrix: torch.Tensor):
    return lambda t, y: torch.tanh(y @ matrix) * (1 + 0.5 * torch.sin(t)) - 0.1 * y


def loss_of(gradient, y0, matrix, t, **settings):
    solution = cnf.solve(pendulum(matrix), y0, t, gradient=gradient, **settings)
    return sum((i + 1) * y.square().sum() for i, y in enumerate(solution.y)), solution


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(5, 3, dtype=F64, requires_grad=True), (
        0.7 * torch.randn(3, 3, dtype=F64)
    ).requires_grad_()


def finite_differences(f, x, h=1e-6):
    found = torch.zeros_like(x)
    for i in range(x.numel()):
        e = torch.zeros(x.numel(), dtype=F64)
        e[i] = h
        e = e.reshape(x.shape)
        found.view(-1)[i] = (f(x + e) - f(x - e)) / (2 * h)
    return found


@pytest.mark.parametrize("method", ["midpoint", "rk4", "dopri5"])
@pytest.mark.parametrize("t", [[0.0, 2.0], [1.0, 0.3, -1.0]])
def test_gradients_are_those_of_the_computed_solution(method, t, inputs):
    y0, matrix = inputs
    settings = dict(method=method, step_size=0.11)
    loss, _ = loss_of("reversible", y0, matrix, t, **settings)
    by_state, by_matrix = torch.autograd.grad(loss, (y0, matrix))

    def value(y, m):
        with torch.no_grad():
            return loss_of("reversible", y, m, t, **settings)[0]

    assert torch.allclose(
        by_matrix, finite_differences(lambda m: value(y0.detach(), m), matrix.detach()), atol=1e-6
    )
    assert torch.allclose(
        by_state, finite_differences(lambda y: value(y, matrix.detach()), y0.detach()), atol=1e-6
    )


@pytest.mark.parametrize(("method", "order"), [("midpoint", 2), ("rk4", 4), ("dopri5", 5)])
def test_the_scheme_has_the_methods_order(method, order, inputs):
    y0, matrix = (x.detach() for x in inputs)
    exact = cnf.solve(pendulum(matrix), y0, [0.0, 1.5], method="dopri8", rtol=1e-13, atol=1e-14)
    errors = []
    for steps in (32, 64):
        found = cnf.solve(
            pendulum(matrix), y0, [0.0, 1.5], method=method, step_size=1.5 / steps,
            gradient="reversible",
        )  # fmt: skip
        errors.append((found.y[-1] - exact.y[-1]).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.5)


def test_adaptive_steps_meet_the_tolerance_and_agree_with_checkpoint(inputs):
    y0, matrix = inputs
    settings = dict(rtol=1e-9, atol=1e-9)
    found = {}
    for gradient in ("reversible", "checkpoint"):
        loss, solution = loss_of(gradient, y0, matrix, [0.0, 1.0, 3.0], **settings)
        found[gradient] = (solution.y, *torch.autograd.grad(loss, (y0, matrix)))
    for ours, theirs in zip(*found.values(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_solution_is_the_same_with_and_without_gradients(inputs):
    y0, matrix = inputs
    with_graph = loss_of("reversible", y0, matrix, [0.0, 2.0], rtol=1e-4)[1]
    with torch.no_grad():
        without = loss_of("reversible", y0, matrix, [0.0, 2.0], rtol=1e-4)[1]
    assert torch.equal(with_graph.y, without.y) and with_graph.stats.nfe == without.stats.nfe


@pytest.mark.parametrize("every", [None, 7, 50])
def test_steps_are_undone_to_rounding(every, inputs):
    y0, matrix = inputs
    settings = dict(method="rk4", step_size=0.01)
    loss, solution = loss_of(cnf.Reversible(every=every), y0, matrix, [0.0, 1.0, 2.0], **settings)
    assert solution.stats.accepted == 200
    reversible = torch.autograd.grad(loss, (y0, matrix))
    exact = loss_of("checkpoint", y0, matrix, [0.0, 1.0, 2.0], **settings)[0]
    for ours, theirs in zip(reversible, torch.autograd.grad(exact, (y0, matrix)), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-9)


def test_over_a_long_time_the_states_part_and_say_so(inputs):
    y0, matrix = inputs
    settings = dict(method="rk4", step_size=0.02)
    with pytest.raises(cnf.IntegrationError, match=r"have parted by .*every=50"):
        loss_of(cnf.Reversible(0.999), y0, matrix, [0.0, 40.0], **settings)
    loss, _ = loss_of(cnf.Reversible(every=20), y0, matrix, [0.0, 40.0], **settings)
    exact = loss_of("checkpoint", y0, matrix, [0.0, 40.0], **settings)[0]
    ours, theirs = (torch.autograd.grad(x, (y0, matrix)) for x in (loss, exact))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def steep(matrix):
    return lambda t, y: torch.tanh(4 * y @ matrix) + t - y


@pytest.mark.parametrize("settings", [
    dict(method="euler", step_size=1.0), dict(method="euler", step_size=0.5),
    dict(method="midpoint", step_size=0.5), dict(method="rk4", step_size=0.5), dict(rtol=1e-2),
])  # fmt: skip
def test_coarse_steps_of_a_steep_field_are_taken(settings, inputs):
    y0, matrix = inputs
    settings = {"method": "dopri5"} | settings
    if "rtol" in settings:  # steps are constants: hold them still for the differences
        record = cnf.solve(steep(matrix), y0, [0.0, 1.0], gradient="reversible", **settings)
        settings = {"method": "dopri5", "step_size": 1 / record.stats.accepted}

    def value(y):
        return (
            cnf.solve(steep(matrix), y, [0.0, 1.0], gradient="reversible", **settings).y[-1].sum()
        )

    found = torch.autograd.grad(value(y0), y0)[0]
    differences = finite_differences(lambda y: value(y).detach(), y0.detach())
    assert torch.allclose(found, differences, atol=1e-5)


@pytest.mark.parametrize(("dtype", "rate"), [(torch.float32, 5.0), (F64, 12.0)])
@pytest.mark.parametrize("steps", [dict(method="rk4", step_size=0.02), dict(rtol=1e-4, atol=1e-5)])
def test_contractions_that_the_coupling_makes_up_for(dtype, rate, steps):
    y0 = torch.linspace(1, 2, 5, dtype=dtype, requires_grad=True)
    solution = cnf.solve(lambda t, y: 1 - rate * y, y0, [0.0, 1.0], gradient="reversible", **steps)
    assert torch.allclose(solution.y[-1], 1 / rate + (y0 - 1 / rate) * math.exp(-rate), rtol=1e-3)
    solution.y[-1].sum().backward()
    assert torch.allclose(y0.grad, torch.full_like(y0, math.exp(-rate)), rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("steps", [dict(method="rk4", step_size=0.01), dict(rtol=1e-4, atol=1e-5)])
def test_a_contraction_beyond_that_names_the_remedy(steps):
    y0 = torch.ones(3, requires_grad=True)

    def solved(gradient):
        return cnf.solve(lambda t, y: 1 - 40 * y, y0, [0.0, 1.0], gradient=gradient, **steps).y[-1]

    with pytest.raises(
        cnf.IntegrationError, match=r"contracts by more .*try gradient=Reversible\("
    ):
        solved("reversible")
    assert torch.allclose(solved(cnf.Reversible(every=2)), torch.full((3,), 1 / 40), rtol=0.01)


def test_anew_at_every_step_it_is_the_method_itself(inputs):
    y0, matrix = inputs
    settings = dict(method="rk4", step_size=0.25)
    ours, theirs = (
        loss_of(gradient, y0, matrix, [0.0, 2.0], **settings)[0]
        for gradient in (cnf.Reversible(every=1), "backprop")
    )
    assert torch.allclose(ours, theirs, rtol=1e-13)
    found = (torch.autograd.grad(x, (y0, matrix)) for x in (ours, theirs))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-10)


def test_what_starts_anew_is_differentiated_too(inputs):
    y0, matrix = inputs
    settings = dict(method="midpoint", step_size=0.1)

    def value(y):
        return loss_of(cnf.Reversible(every=3), y, matrix.detach(), [0.0, 2.0], **settings)[0]

    found = torch.autograd.grad(value(y0), y0)[0]
    assert torch.allclose(
        found, finite_differences(lambda y: value(y).detach(), y0.detach()), atol=1e-6
    )


def test_integrals_and_named_tensors_have_their_gradients():
    torch.manual_seed(0)
    y0, scale = torch.randn(4, dtype=F64, requires_grad=True), torch.tensor(0.7, dtype=F64)
    scale.requires_grad_()

    def field(t, y, s):
        return -s * y, (s * y.square()).sum()

    def run(gradient):
        solution = cnf.solve(
            field, y0, [0.0, 1.0], params=[scale * 2], quadrature=True, gradient=gradient,
            rtol=1e-10, atol=1e-12,
        )  # fmt: skip
        return torch.autograd.grad(solution.integral[-1] + solution.y[-1].sum(), (y0, scale))

    for ours, theirs in zip(run("reversible"), run("checkpoint"), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-9)


def test_nothing_is_kept_but_the_last_state(inputs):
    y0, matrix = inputs
    sizes = []
    for step_size in (0.5, 0.01):
        loss, _ = loss_of("reversible", y0, matrix, [0.0, 2.0], method="rk4", step_size=step_size)
        node = next(n for n, _ in _nodes(loss.grad_fn) if "Undone" in type(n).__name__)
        sizes.append(sum(x.numel() for x in node.saved_tensors))
    assert sizes[0] == sizes[1] == 2 * y0.numel() + matrix.numel()


def _nodes(root):
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node, None
        waiting.extend(child for child, _ in node.next_functions)


def test_evaluations_are_counted():
    y0 = torch.ones(1, requires_grad=True)
    solution = cnf.solve(
        lambda t, y: -y, y0, [0.0, 1.0], method="rk4", step_size=0.1, gradient="reversible"
    )
    assert solution.stats.nfe == 80  # four stages there and four back, ten times
    solution.y[-1].backward()
    assert solution.stats.nfe_backward == 80


@pytest.mark.parametrize("coupling", [0.0, -1.0, 1.5, "half", math.nan])
def test_a_coupling_without_a_meaning_is_refused(coupling):
    with pytest.raises(cnf.InputError, match="coupling must be a number in"):
        cnf.Reversible(coupling)


def test_what_it_does_not_go_with_is_refused():
    y0 = torch.ones(3, requires_grad=True)
    for more in (
        dict(dense=True),
        dict(control=cnf.Adaptive(per_sample=True)),
        dict(event=cnf.Event(lambda t, y: y.sum() - 1)),
    ):
        with pytest.raises(cnf.InputError, match="gradient='reversible' undoes steps"):
            cnf.solve(lambda t, y: -y, y0, [0.0, 1.0], gradient="reversible", **more)
