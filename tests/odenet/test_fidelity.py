"""What a classifier finds in images: Fréchet distance, nearest images, shares."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import nn

from cnf.error import InputError
from cnf.odenet.fidelity import Fidelities, frechet_distance, histogram, nearest, seen, share_of


def features(count: int, width: int = 5, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=draw, dtype=torch.float64)
    return torch.randn(count, width, generator=draw, dtype=torch.float64) @ mixed


class Brightness(nn.Module):
    """Two classes, dark and bright; in training it answers nonsense."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.last.weight.copy_(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = images.flatten(1).mean(1)
        return self.last(torch.stack([mean, 0 * mean + 0.5 + self.training], 1))


def pictures(*brightness: float) -> torch.Tensor:
    draw = torch.Generator().manual_seed(len(brightness))
    noise = 0.1 * torch.rand(len(brightness), 1, 4, 4, generator=draw)
    return torch.tensor(brightness).reshape(-1, 1, 1, 1) + noise


# distances ----------------------------------------------------------------------------------------


def test_frechet_distance_agrees_with_the_matrix_square_root() -> None:
    x, y = features(200), 0.3 + features(300, seed=1)
    own, other = np.cov(x.numpy().T), np.cov(y.numpy().T)
    cross = np.trace(linalg.sqrtm(own @ other).real)
    apart = float((x.mean(0) - y.mean(0)).square().sum())
    expected = apart + np.trace(own) + np.trace(other) - 2 * cross
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_a_shift_is_its_square() -> None:
    x = features(100)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(x, x + torch.tensor([3.0, 4, 0, 0, 0])) == pytest.approx(25.0)


def test_frechet_distance_bears_fewer_rows_than_columns_and_one_column() -> None:
    assert math.isfinite(frechet_distance(features(3, 8), features(4, 8)))
    assert frechet_distance(features(9, 1), 2 * features(9, 1)) > 0
    with pytest.raises(InputError, match="y has 1 rows"):
        frechet_distance(features(3), features(1))


def test_nearest_finds_the_image_itself_and_the_distance_to_others() -> None:
    others = pictures(0.0, 0.2, 0.5, 0.9)
    distances, indices = nearest(others, others, 2)
    assert indices[:, 0].tolist() == [0, 1, 2, 3]
    assert distances[:, 0].tolist() == pytest.approx([0.0] * 4, abs=1e-3)
    expected = (others[0] - others[1]).norm().item()
    assert indices[0, 1] == 1 and distances[0, 1].item() == pytest.approx(expected, rel=1e-4)


def test_nearest_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    images, others = torch.rand(10, 1, 4, 4), torch.rand(20, 1, 4, 4)
    whole = nearest(images, others, 3)
    monkeypatch.setattr("cnf.odenet.fidelity.CHUNK", 3)
    for one, other in zip(whole, nearest(images, others, 3), strict=True):
        torch.testing.assert_close(one, other)


# what is seen -------------------------------------------------------------------------------------


def test_features_are_what_the_last_layer_is_given() -> None:
    net, images = Brightness(), pictures(0.1, 0.8, 0.3)
    found = seen(net, images, batch=2)
    assert found.predictions.tolist() == [0, 1, 0] and found.features.dtype == torch.float64
    logits = net.eval()(images)
    torch.testing.assert_close(net.last(found.features.float()), logits)


def test_a_net_is_judged_in_evaluation_mode_and_left_as_it_was() -> None:
    net = Brightness().train()
    assert seen(net, pictures(0.8)).predictions.tolist() == [1]
    assert net.training and not net.last._forward_pre_hooks


def test_shares_and_their_errors() -> None:
    assert histogram(torch.tensor([0, 2, 2, 2]), 4) == (0.25, 0.0, 0.75, 0.0)
    share, error = share_of(torch.tensor([True, True, True, False]))
    assert share == 0.75 and error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))


def test_fidelity_of_images_of_any_class_and_of_given_ones() -> None:
    judged = Fidelities(Brightness(), pictures(0.1, 0.2, 0.8, 0.9))
    found = judged(pictures(0.1, 0.15, 0.7), pictures(0.9, 0.9), torch.tensor([1, 0]))
    assert (found.recognized, found.images, found.given) == (0.5, 3, 2)
    assert found.histogram == pytest.approx((2 / 3, 1 / 3))
    assert found.as_dict()["nearest"] == found.nearest > 0


def test_fidelity_of_training_images_themselves_is_perfect() -> None:
    train = pictures(0.1, 0.2, 0.8, 0.9)
    found = Fidelities(Brightness(), train)(train)
    assert found.recognized is None and found.given == 0
    assert found.distance == pytest.approx(0.0, abs=1e-9)
    assert found.nearest == pytest.approx(0.0, abs=1e-3)
