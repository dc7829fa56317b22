"""FFJORD's stack of ODEs at several scales: it inverts, and its determinant is the Jacobian's."""

from __future__ import annotations

import pytest
import torch

from cnf.error import InputError
from cnf.flow.continuous import Solver
from cnf.flow.divergence import Hutchinson, Tangents, push
from cnf.flow.multiscale import Multiscale
from cnf.nets.chain import Chain
from cnf.nets.conv import conv_stack
from cnf.ode.control import Adaptive

TIGHT = Solver("dopri5", Adaptive(1e-8, 1e-8))
SHAPE = (1, 8, 8)


def stack(shape=SHAPE, **settings) -> Multiscale:
    torch.manual_seed(0)
    made = Multiscale(shape, **({"blocks": 1, "widths": (3,)} | settings)).double()
    with torch.no_grad():
        for parameter in made.parameters():  # the last layers start at 0
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_scales_are_squeezed_and_split() -> None:
    assert stack(scales=3).sizes == [(1, 8, 8), (4, 4, 4), (2, 4, 4), (8, 2, 2), (4, 2, 2)]
    mnist = Multiscale((1, 28, 28), widths=(2,))
    assert mnist.sizes == [(1, 28, 28), (4, 14, 14), (2, 14, 14), (8, 7, 7), (4, 7, 7)]
    assert [len(fields) for fields in mnist.fields] == [2] * 5
    with pytest.raises(InputError, match="scales=4 halve 28 x 28"):
        Multiscale((1, 28, 28), scales=4)


def test_an_untrained_stack_only_moves_pixels() -> None:
    made, x = Multiscale(SHAPE, blocks=1, widths=(3,)), images().float()
    moved = made.to_base(x, Hutchinson(), Solver())
    assert torch.equal(moved.x.sort(1).values, x.sort(1).values)
    assert not moved.logdet.any()
    assert torch.equal(made.to_data(moved.x, Solver()), x)


@pytest.mark.parametrize("scales", [1, 2, 3])
def test_it_inverts(scales: int) -> None:
    made, x = stack(scales=scales, blocks=2), images()
    with torch.no_grad():
        z = made.to_base(x, Hutchinson(), TIGHT).x
        back = made.to_data(z, TIGHT)
    assert z.shape == x.shape and not torch.allclose(z, x, atol=0.1)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


def test_the_determinant_is_that_of_the_jacobian() -> None:
    made, x = stack((1, 4, 4), scales=2), images(1)[:, :16]
    moved = made.to_base(x, Tangents(), TIGHT)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: made.to_base(x[None], Hutchinson(), TIGHT).x[0], x[0]
    )
    assert abs(moved.logdet.item()) > 0.01
    assert moved.logdet.item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-6)
    assert moved.stats.nfe > 3 * 7 and moved.stats.calls > 0


def test_every_parameter_has_a_gradient_by_the_estimated_trace() -> None:
    made, x = stack(), images()
    moved = made.to_base(x, Hutchinson(seed=None), Solver())
    (moved.x.square().sum() - moved.logdet.sum()).backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_tangents_of_the_convolutions_are_torchs() -> None:
    field = conv_stack((2, 4, 4), (5,)).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert isinstance(field, Chain)
    t, x = torch.tensor([0.2, 0.7], dtype=torch.float64), images(2)[:, :32]
    tangents = torch.randn(3, 2, 32, dtype=torch.float64)
    value, pushed = field.tangent(t, x, tangents)
    torch.testing.assert_close(value, field(t, x))
    expected = push(lambda t, x: field(t[0], x), t[:1], x[:1], tangents[:, :1])[1]
    torch.testing.assert_close(pushed[:, :1], expected)
