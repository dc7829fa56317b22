"""The adjoint along a solution is what automatic differentiation finds from each time on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import cnf
from cnf.error import InputError
from cnf.ode.sensitivity import adjoint_state

F64 = torch.float64
TIMES = [0.2, 0.5, 0.9, 1.3]


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3, dtype=F64))
        self.b = nn.Parameter(torch.randn(3, dtype=F64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.w + t * t * self.b)


def loss(y: Tensor) -> Tensor:
    return 100 * y.pow(3).sum()


@pytest.mark.parametrize("times", [TIMES, TIMES[::-1]])
def test_it_is_the_gradient_by_the_state_at_each_time(times: list[float]) -> None:
    field, y0 = Field(), torch.randn(2, 3, dtype=F64)
    found = adjoint_state(field, y0, times, loss, rtol=1e-9, atol=1e-10)
    assert found.a.shape == found.y.shape == (4, 2, 3) and found.a_params == ()
    for i in range(3):
        y = found.y[i].detach().requires_grad_()
        end = cnf.solve(field, y, [times[i], times[-1]], rtol=1e-9, atol=1e-10).y[-1]
        (expected,) = torch.autograd.grad(loss(end), y)
        assert torch.allclose(found.a[i], expected, rtol=1e-6)
    assert torch.allclose(found.a[-1], 300 * found.y[-1] ** 2)


def test_parameters_and_the_start_earn_their_parts() -> None:
    field, y0 = Field(), torch.randn(2, 3, dtype=F64)
    params = (field.w, field.b)
    found = adjoint_state(field, y0, TIMES, loss, params=params, rtol=1e-9, atol=1e-10)
    for i in range(3):
        t = torch.tensor([TIMES[i], TIMES[-1]], dtype=F64, requires_grad=True)
        end = cnf.solve(field, found.y[i].detach(), t, rtol=1e-9, atol=1e-10).y[-1]
        *expected, by_time = torch.autograd.grad(loss(end), (*params, t))
        for part, other in zip(found.a_params, expected, strict=True):
            assert torch.allclose(part[i], other, rtol=1e-5, atol=1e-6)
        assert torch.allclose(found.a_t[i], by_time[0], rtol=1e-5)
    assert not any(part[-1].any() for part in found.a_params)


def test_a_parameter_that_is_not_read_earns_nothing() -> None:
    spare = torch.ones(2, requires_grad=True)
    found = adjoint_state(lambda t, y: -y, torch.ones(1), [0.0, 1.0], torch.sum, params=[spare])
    assert found.a_params[0].shape == (2, 2) and not found.a_params[0].any()


def test_wrong_input_is_refused() -> None:
    with pytest.raises(InputError, match="loss must return one number"):
        adjoint_state(lambda t, y: -y, torch.ones(3), [0.0, 1.0], lambda y: y)
    with pytest.raises(InputError, match="params are tensors that require grad"):
        adjoint_state(lambda t, y: -y, torch.ones(3), [0.0, 1.0], torch.sum, params=[torch.ones(1)])


def test_it_is_public() -> None:
    assert cnf.adjoint_state is adjoint_state


def test_the_times_may_be_more_precise_than_the_state():
    net = torch.nn.Linear(3, 2)

    def field(t, y):
        return torch.tanh(net(torch.cat([y, t.expand(1)])))

    t = torch.linspace(0, 1, 3, dtype=torch.float64)
    found = adjoint_state(field, torch.ones(2), t, lambda y: y.sum())
    assert torch.isfinite(found.a).all() and found.a.shape == (3, 2)


def test_a_field_that_does_not_depend_on_the_state_has_a_constant_adjoint():
    found = adjoint_state(lambda t, y: torch.ones_like(y), torch.ones(2), [0.0, 1.0], torch.sum)
    assert torch.allclose(found.a, torch.ones(2, 2))
