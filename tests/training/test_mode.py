"""A module is in another mode for a while, and each of its parts in its own again."""

from __future__ import annotations

import pytest
from torch import nn

from cnf.training.mode import InMode


@pytest.mark.parametrize("training", [True, False])
def test_every_part_comes_back_in_its_own_mode(training: bool) -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Dropout(), nn.BatchNorm1d(1)).train()
    net[2].eval()  # frozen
    with pytest.raises(RuntimeError, match="within"), InMode(net, training):
        assert all(part.training == training for part in net.modules())
        raise RuntimeError("within")
    assert [part.training for part in net.modules()] == [True, True, True, False]
