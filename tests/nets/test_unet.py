"""A U-Net takes images of any sides and any labels, and its tangents are the Jacobian's."""

from __future__ import annotations

import math

import pytest
import torch

from cnf import nets
from cnf.flow.divergence import push

F64 = torch.float64
SHAPES = {
    "blocks of pixels, and down": (1, 16, 20),
    "down alone": (2, 4, 6),
    "odd sides": (3, 5, 3),
    "large and odd": (1, 17, 18),
    "one pixel": (1, 1, 1),
}


def moving(shape, **settings):
    """A U-Net in double precision whose last layer is not zero."""
    net = nets.UNet(shape, width=8, **settings).to(F64)
    torch.nn.init.normal_(net.last.weight, std=0.1)
    torch.nn.init.normal_(net.last.bias, std=0.1)
    return net


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_tangents_of_images_of_any_sides_are_those_of_autograd(shape):
    net, dim = moving(shape), math.prod(shape)
    t, x = torch.tensor(0.4, dtype=F64), torch.randn(2, dim, dtype=F64)
    tangents = torch.randn(3, 2, dim, dtype=F64)

    value, pushed = net.tangent(t, x, tangents)
    plain, expected = push(lambda t, x: net(t, x), t, x, tangents)

    assert torch.allclose(value, plain) and value.shape == x.shape
    assert torch.allclose(pushed, expected)


def test_every_row_has_its_own_time_and_label():
    net = moving((1, 4, 4), classes=3)
    torch.nn.init.normal_(net.labels.weight)
    t, x = torch.rand(4, dtype=F64), torch.randn(4, 16, dtype=F64)
    labels = torch.tensor([[2.0], [-1.0], [0.0], [2.0]], dtype=F64)

    together = net(t, x, net.embed(labels))
    alone = [net(t[i], x[i : i + 1], net.embed(labels[i : i + 1])) for i in range(4)]

    assert torch.allclose(together, torch.cat(alone))
    assert not torch.allclose(net(t, x, net.embed(labels.flip(0))), together)


def test_no_label_is_the_label_minus_one():
    net = moving((1, 4, 4), classes=3)
    t, x = torch.tensor(0.2, dtype=F64), torch.randn(2, 16, dtype=F64)
    none = net.embed(torch.full((2, 1), -1.0))

    assert torch.allclose(net(t, x), net(t, x, none))


def test_one_pixel_of_one_image_is_enough():
    net = moving((1, 1, 1))
    x = torch.randn(2, 1, dtype=F64)
    t = torch.tensor(0.5, dtype=F64)
    assert torch.allclose(net(t, x[:1]), net(t, x)[:1])
    assert not torch.allclose(net(t, x[:1]), net(t, x[1:]))


def test_it_starts_as_a_field_that_stands_still():
    net = nets.UNet((1, 16, 16), width=8, classes=2)
    assert not net(torch.tensor(0.7), torch.randn(3, 256)).any()


def test_width_and_blocks_are_what_it_is_made_of():
    small, large = nets.UNet((1, 8, 8), width=8), nets.UNet((1, 8, 8), width=8, blocks=2, middle=3)
    assert len(small.down) == len(small.up) == 1 and len(small.middle) == 2
    assert len(large.down) == len(large.up) == 2 and len(large.middle) == 3
    assert large(torch.tensor(0.0), torch.randn(2, 64)).shape == (2, 64)


@pytest.mark.parametrize("wrong", [{"width": 0}, {"blocks": 0}, {"classes": -1}])
def test_what_no_net_can_have_is_refused(wrong):
    with pytest.raises(ValueError, match="expected a shape"):
        nets.UNet((1, 8, 8), **wrong)


def test_labels_of_a_net_that_takes_none_are_refused():
    with pytest.raises(ValueError, match="classes="):
        nets.UNet((1, 8, 8), width=8).embed(torch.zeros(2, 1))
