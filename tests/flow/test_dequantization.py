"""Learned noise stays in its cell, inverts, counts its Jacobian and starts uniform."""

from __future__ import annotations

import pytest
import torch

from cnf.flow.dequantization import VariationalDequantization
from cnf.flow.pixel import dequantized, quantized

SHAPE = (2, 3, 3)
PIXELS = torch.randint(0, 8, (4, 18))


def rows():
    return dequantized(PIXELS, torch.rand(4, 18, dtype=torch.float64).clamp(0.01, 0.99), 8)


def moved():
    noise = VariationalDequantization(SHAPE, 8).double()
    with torch.no_grad():
        for parameter in noise.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return noise


def test_it_starts_as_the_identity():
    x = rows()
    same, logdet = VariationalDequantization(SHAPE, 8)(x)
    assert torch.allclose(same, x, atol=1e-9) and torch.allclose(logdet, torch.zeros(4).double())


def test_noise_stays_in_its_cell_and_comes_back():
    noise, x = moved(), rows()
    y = noise(x)[0]
    assert torch.equal(quantized(y, 8), quantized(x, 8)) and not torch.allclose(y, x, atol=1e-3)
    assert torch.allclose(noise.invert(y), x, atol=1e-7)


def test_it_counts_its_jacobian():
    noise, x = moved(), rows()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: noise(row[None])[0][0]))(x)
    assert torch.allclose(noise(x)[1], torch.linalg.slogdet(jacobian)[1], atol=1e-6)


@pytest.mark.parametrize("other", [0, 5])
def test_the_noise_of_a_pixel_depends_on_the_pixels_around_it(other):
    noise, x = moved(), rows()
    changed = x.clone()
    changed[:, 4] = (other + 0.5) / 8
    assert not torch.allclose(noise(x)[0][:, 3], noise(changed)[0][:, 3], atol=1e-6)
