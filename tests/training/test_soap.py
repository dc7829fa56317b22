"""SOAP: Adam where nothing is turned, less of an error where axes are, and put down."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cnf.training.soap import INTERVAL, LARGEST, SIDES, SOAP


def stepped(optimizer, parameters, gradients):
    """The parameters after as many steps as there are gradients, each for all of them."""
    for given in gradients:
        for parameter, gradient in zip(parameters, given, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def rotation(size, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


@pytest.mark.parametrize("shape", [(5,), (), (3, 4, 2), (LARGEST + 1, LARGEST + 2), (1, 1)])
def test_what_is_not_turned_is_stepped_as_by_adam(shape):
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(shape, dtype=torch.float64)) for _ in range(2))
    gradients = [[torch.randn(shape, dtype=torch.float64)] for _ in range(2 * INTERVAL + 1)]
    found = stepped(SOAP([ours], 0.1), [ours], gradients)
    adam = torch.optim.Adam([theirs], 0.1, betas=(0.9, 0.99))
    wanted = stepped(adam, [theirs], gradients)
    assert torch.allclose(found[0], wanted[0], atol=1e-12)


def test_half_precision_is_stepped_too():
    weight = nn.Parameter(torch.ones(3, 3, dtype=torch.bfloat16))
    found = stepped(SOAP([weight], 0.1), [weight], [[torch.ones_like(weight)]] * (INTERVAL + 1))
    assert (found[0] < 1).all()


def test_a_side_that_is_too_long_is_left_and_the_other_turned():
    weight = nn.Parameter(torch.zeros(LARGEST + 1, 3))
    optimizer = SOAP([weight])
    stepped(optimizer, [weight], [[torch.randn(LARGEST + 1, 3)]])
    assert "rows" not in optimizer.state[weight]
    assert optimizer.state[weight]["columns"].shape == (3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bases_are_the_eigenvectors_of_the_gradients_moments(dtype):
    torch.manual_seed(0)
    left, right = rotation(6, 1).to(dtype), rotation(4, 2).to(dtype)
    scale = torch.logspace(0, -2, 6, dtype=dtype)[:, None] * torch.logspace(0, -1, 4, dtype=dtype)
    weight = nn.Parameter(torch.zeros(6, 4, dtype=dtype))
    optimizer = SOAP([weight])
    gradients = [[left @ (scale * torch.randn(6, 4, dtype=dtype)) @ right.T] for _ in range(400)]
    stepped(optimizer, [weight], gradients)
    state = optimizer.state[weight]
    for side in SIDES:
        basis = state[side]
        turned = basis.T @ state[f"{side}_moment"] @ basis
        size = turned.diagonal().rsqrt()
        away = size[:, None] * turned * size - torch.eye(len(turned), dtype=dtype)
        assert away.abs().max() < 0.5  # it lags by up to INTERVAL steps
        assert turned.diagonal().diff().max() < 0  # in the order of the eigenvalues
        assert torch.allclose(basis.T @ basis, torch.eye(len(turned), dtype=dtype), atol=1e-5)


def error_of_regression(kind, size=32, steps=500):
    """What stochastic gradients leave of a linear regression's error, where the inputs' variances
    span four orders of magnitude along turned axes.
    """
    torch.manual_seed(0)
    spread = torch.logspace(0, -2, size, dtype=torch.float64)[:, None] * rotation(size, 3)
    wanted = torch.randn(size, size, dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(size, size, dtype=torch.float64))
    optimizer = kind([weight], betas=(0.9, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        x, noise = torch.randn(2, 64, size, dtype=torch.float64)
        optimizer.zero_grad()
        (x @ spread @ (weight - wanted) + 0.3 * noise).square().mean().backward()
        optimizer.step()
    return (spread @ (weight - wanted)).square().mean().item()


def test_it_leaves_less_than_adam_where_axes_are_turned():
    assert error_of_regression(SOAP) < 0.6 * error_of_regression(torch.optim.Adam)


def test_zero_gradients_and_few_directions_do_no_harm():
    torch.manual_seed(0)
    weight, frozen = nn.Parameter(torch.ones(20, 30)), nn.Parameter(torch.ones(3))
    optimizer = SOAP([weight, frozen])
    weight.grad = torch.zeros(20, 30)
    for _ in range(INTERVAL):
        optimizer.step()
    assert torch.equal(weight, torch.ones(20, 30))
    direction = torch.randn(20, 1) @ torch.randn(1, 30)
    stepped(SOAP([weight]), [weight], [[direction]] * (3 * INTERVAL))
    assert weight.isfinite().all()
    assert torch.equal(frozen, torch.ones(3))  # without a gradient


def test_it_goes_on_from_its_state():
    torch.manual_seed(0)
    weight, shift = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(4))
    gradients = [[torch.randn(6, 4), torch.randn(4)] for _ in range(3 * INTERVAL)]
    optimizer = SOAP([weight, shift], 0.1)
    stepped(optimizer, [weight, shift], gradients[:13])
    kept = copy.deepcopy(optimizer.state_dict())
    again = [nn.Parameter(p.detach().clone()) for p in (weight, shift)]
    wanted = stepped(optimizer, [weight, shift], gradients[13:])
    other = SOAP(again, 0.1)
    other.load_state_dict(kept)
    for found, value in zip(stepped(other, again, gradients[13:]), wanted, strict=True):
        assert torch.equal(found, value)


def test_the_state_of_another_optimizer_is_refused():
    weight = nn.Parameter(torch.ones(3, 3))
    adam = torch.optim.Adam([weight])
    stepped(adam, [weight], [[torch.ones(3, 3)]])
    with pytest.raises(ValueError, match="another optimizer"):
        SOAP([weight]).load_state_dict(adam.state_dict())


def test_a_closure_is_called_once_with_gradients():
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = SOAP([weight])

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert (weight < 1).all()
