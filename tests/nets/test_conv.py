"""Convolutional fields: shapes, the time as a channel, and the sizes of the paper."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cnf.nets.conv import (
    STEMS,
    ConvField,
    ResidualBlock,
    Standardize,
    TimeConv,
    Widen,
    class_head,
    group_norm,
    image_stem,
)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_time_is_one_channel_more() -> None:
    layer = TimeConv(3, 5)
    x, t = torch.randn(2, 3, 6, 6), torch.tensor(0.7)
    plain = nn.Conv2d(4, 5, 3, padding=1)
    with torch.no_grad():
        plain.weight.copy_(torch.cat([layer.time, layer.conv.weight], 1))
        plain.bias.copy_(layer.conv.bias)
    assert count(plain) == count(layer)
    expected = plain(torch.cat([t.expand(2, 1, 6, 6), x], 1))
    assert torch.allclose(layer(t, x), expected, atol=1e-6)


@pytest.mark.parametrize("timed", [True, False])
def test_every_row_may_have_a_time_of_its_own(timed: bool) -> None:
    field = ConvField(8, timed=timed)
    x, t = torch.randn(3, 8, 5, 5), torch.tensor([0.0, 0.4, 0.9])
    together = field(t, x)
    assert together.shape == x.shape
    for i in range(3):
        assert torch.allclose(together[i], field(t[i], x[i : i + 1])[0], atol=1e-5)


def test_a_steady_field_does_not_see_the_time() -> None:
    x = torch.randn(2, 8, 4, 4)
    steady, timed = ConvField(8, timed=False), ConvField(8)
    assert torch.equal(steady(torch.tensor(0.0), x), steady(torch.tensor(1.0), x))
    assert not torch.allclose(timed(torch.tensor(0.0), x), timed(torch.tensor(1.0), x))


def test_a_residual_block_keeps_or_halves() -> None:
    x = torch.randn(2, 6, 8, 8)
    assert ResidualBlock(6, 6)(x).shape == x.shape
    assert ResidualBlock(6, 6, 2)(x).shape == (2, 6, 4, 4)
    assert ResidualBlock(6, 9)(x).shape == (2, 9, 8, 8)
    assert ResidualBlock(6, 6).shortcut is None


@pytest.mark.parametrize(
    ("kind", "size"), [("residual", 7), ("conv", 6), ("strided", 7), ("fine", 14)]
)
def test_stems_shrink_images(kind: str, size: int) -> None:
    assert image_stem(kind, 1, 8)(torch.rand(2, 1, 28, 28)).shape == (2, 8, size, size)


@pytest.mark.parametrize("kind", STEMS)
def test_stems_take_small_images_too(kind: str) -> None:
    features = image_stem(kind, 1, 8)(torch.rand(2, 1, 8, 8))
    assert features.shape[:2] == (2, 8) and min(features.shape) > 0


def test_an_unknown_stem_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown stem 'wide'"):
        image_stem("wide", 1, 8)


@pytest.mark.parametrize(("kind", "numbers"), [("residual", 156_800), ("conv", 132_096)])
def test_the_papers_stems_have_their_sizes(kind: str, numbers: int) -> None:
    assert count(image_stem(kind, 1, 64)) == numbers
    assert count(ConvField(64)) == 75_392 and count(class_head(64, 10)) == 778


def test_wider_features_end_in_zeros() -> None:
    x = torch.randn(2, 3, 4, 4)
    wide = Widen(2)(x)
    assert torch.equal(wide[:, :3], x) and not wide[:, 3:].any() and wide.shape[1] == 5


def test_standardized_values_have_mean_zero_and_deviation_one() -> None:
    x = 3 * torch.rand(50, 1, 4, 4) + 2
    layer = Standardize()
    assert torch.equal(layer(x), x)
    layer.fit(x)
    assert layer(x).mean().item() == pytest.approx(0, abs=1e-5)
    assert layer(x).std().item() == pytest.approx(1, abs=1e-5)
    assert layer.state_dict().keys() == {"mean", "deviation"}
    layer.fit(torch.ones(5))
    assert torch.isfinite(layer(torch.ones(5))).all()


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (48, 16), (7, 1), (33, 1)])
def test_groups_divide_the_channels(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups
