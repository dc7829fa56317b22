"""A learned end time is an end time: of the solution, of its density and of their gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cnf.flow.divergence import ClosedForm, Tangents, choose_divergence
from cnf.flow.flow import Flow
from cnf.flow.objective import MaximumLikelihood
from cnf.nets.end_time import EndTime, EndTimeClosedForm, learned_end_time
from cnf.nets.mlp import MLP, BilinearMLP
from cnf.ode.solution import solve

F64 = torch.float64


def shaken(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double()


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)

    def forward(self, t, x):
        return torch.tanh(self.net(x)) * (1 + t.unsqueeze(-1))


FIELDS = {
    "closed form": lambda: shaken(BilinearMLP(2, (6, 5))),
    "tangents": lambda: shaken(MLP(2, (6, 5, 4))),
    "plain": lambda: shaken(Plain()),
}
EACH = pytest.mark.parametrize("make", FIELDS.values(), ids=FIELDS)


def flow_of(field, end=1.6, **settings):
    wrapped = learned_end_time(field, end).double()
    with torch.no_grad():
        wrapped.log_end.copy_(torch.tensor(end, dtype=F64).log())  # not rounded on its way
    return Flow(2, field=wrapped, rtol=1e-9, atol=1e-9, logdet_atol=1e-8, **settings).double()


@EACH
def test_the_solution_is_that_over_the_longer_interval(make):
    field, x = make(), torch.randn(5, 2, dtype=F64)
    expected = solve(field, x, [0.0, 1.6], rtol=1e-9, atol=1e-9).y[-1]
    assert torch.allclose(flow_of(field).decode(x), expected, atol=1e-7)


@EACH
@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
def test_the_end_time_gets_the_gradient_of_finite_differences(make, gradient):
    field, x = make(), torch.randn(5, 2, dtype=F64)

    def loss(end):
        return -flow_of(field, end, gradient=gradient).log_prob(x).mean()

    flow = flow_of(field, gradient=gradient)
    (-flow.log_prob(x).mean()).backward()
    found = flow.field.log_end.grad / flow.field.end.detach()
    with torch.no_grad():
        expected = (loss(1.6 + 1e-4) - loss(1.6 - 1e-4)) / 2e-4
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7) and expected.abs() > 1e-4


@EACH
def test_the_gradient_is_the_cores_own_by_its_times(make):
    """∂L/∂T as `solve` gives it for a tensor of times."""
    field, x = make(), torch.randn(5, 2, dtype=F64)
    end = torch.tensor(1.6, dtype=F64, requires_grad=True)
    times = torch.stack([torch.zeros((), dtype=F64), end])
    solve(field, x, times, rtol=1e-9, atol=1e-9).y[-1].square().sum().backward()
    flow = flow_of(field)
    flow.decode(x).square().sum().backward()
    assert torch.allclose(flow.field.log_end.grad / 1.6, end.grad, rtol=1e-5)


def test_it_is_learned():
    """Of a field that cannot change, the time alone finds how long it must run."""

    class Growth(nn.Module):
        def forward(self, t, x):
            return x

    flow = Flow(1, field=learned_end_time(Growth()), base=None, whiten=False)
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-2)
    x = 3.0 * torch.randn(500, 1)
    for _ in range(60):
        optimizer.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        optimizer.step()
    assert flow.field.end.item() == pytest.approx(x.square().mean().sqrt().log().item(), abs=0.02)


@EACH
def test_it_offers_what_the_field_offers(make):
    field = make()
    wrapped = learned_end_time(field)
    known = hasattr(field, "with_divergence")
    assert type(wrapped) is (EndTimeClosedForm if known else EndTime)
    assert choose_divergence("auto", wrapped) == (ClosedForm() if known else Tangents())
    assert (wrapped.tangent is None) == (not hasattr(field, "tangent"))


@EACH
def test_it_is_copied_and_stored(make, tmp_path):
    flow, x = flow_of(make()), torch.randn(4, 2, dtype=F64)
    twin = copy.deepcopy(flow)
    assert torch.equal(twin.log_prob(x), flow.log_prob(x))
    flow.save(tmp_path / "flow.safetensors")
    again = Flow.load(tmp_path / "flow.safetensors", field=learned_end_time(make()))
    assert torch.allclose(again.log_prob(x), flow.log_prob(x), atol=1e-12)


@pytest.mark.parametrize("end", [0.0, -1.0, float("nan"), float("inf")])
def test_an_end_that_is_none_is_refused(end):
    with pytest.raises(ValueError, match="the end time must be a number > 0"):
        learned_end_time(Plain(), end)


@pytest.mark.parametrize("hidden", [(5,), (5, 4), (5, 4, 3)])
def test_a_field_with_a_context_keeps_it(hidden):
    net = MLP if len(hidden) > 2 else BilinearMLP
    field = learned_end_time(net(2, hidden, context=3), 1.3)
    flow = Flow(2, context=3, field=field, rtol=1e-8, atol=1e-8).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x, context = torch.randn(4, 2, dtype=F64), torch.randn(4, 3, dtype=F64)
    assert torch.allclose(flow.decode(flow.encode(x, context), context), x, atol=1e-4)
    assert not torch.allclose(flow.log_prob(x, context), flow.log_prob(x, -context), atol=1e-3)
    MaximumLikelihood(flow)(x, context).backward()
    assert all(p.grad is not None for p in flow.parameters())
