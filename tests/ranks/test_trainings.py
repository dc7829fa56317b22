"""Two ranks come to the same weights, and to those of one process with the same total batch."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cnf.error import InputError
from cnf.training.ranks import ALONE, Ranks, here, row_noise

PROGRAM = Path(__file__).with_name("trainings.py")
program = runpy.run_path(str(PROGRAM))
Found = list[dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def found(torchrun: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What either rank came to, by the training's name."""
    folder = tmp_path_factory.mktemp("ranks")
    ended = torchrun(folder, PROGRAM, folder)
    assert ended.returncode == 0, ended.stderr
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(2)]


def test_both_ranks_have_the_same_weights(found: Found) -> None:
    for name, value in found[0].items():
        assert np.array_equal(value, found[1][name], equal_nan=True), name


def test_two_ranks_come_to_what_one_process_does(found: Found, tmp_path: Path) -> None:
    trainings = program["TRAININGS"] | {"mapped": program["mapped"](tmp_path)}
    for name, training in trainings.items():
        alone = training().numpy()
        assert np.abs(found[0][name] - alone).max() < 1e-10, name


def test_a_batch_that_one_rank_cannot_solve_is_left_out_by_both(found: Found) -> None:
    *_, skipped = found[0]["skipping"]
    losses = found[0]["skipping"][3:-1]
    assert np.isnan(losses).nonzero()[0].tolist() == [2, 4] and skipped == 2


def test_a_budget_in_seconds_ends_at_the_same_step(found: Found) -> None:
    assert 10 <= found[0]["timed"][0] == found[1]["timed"][0]


def test_rows_are_gathered_in_order(found: Found) -> None:
    assert found[0]["gathered"].tolist() == list(range(7))


@pytest.mark.parametrize(("total", "world"), [(7, 2), (8, 2), (2, 3), (100, 7), (0, 2)])
def test_shares_are_all_rows_in_order(total: int, world: int) -> None:
    rows = torch.arange(total)
    shares = [rows[Ranks(rank, world).share(total)] for rank in range(world)]
    assert torch.cat(shares).tolist() == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_noise_belongs_to_rows_of_the_whole_batch() -> None:
    def noise(ranks: Ranks, rows: int) -> torch.Tensor:
        torch.manual_seed(3)
        with ranks.together():
            return row_noise(rows, lambda rows: torch.randn(rows, 2))

    parts = [noise(Ranks(rank, 4), 5) for rank in range(4)]
    assert torch.equal(torch.cat(parts), noise(ALONE, 20))


def test_a_batch_is_cut_to_what_ranks_can_share() -> None:
    assert Ranks(0, 3).batch_size(2048) == 2046 and ALONE.batch_size(2048) == 2048
    with pytest.raises(InputError, match="a batch of 2 rows leaves none for some of 3 ranks"):
        Ranks(0, 3).batch_size(2)


def test_a_process_by_itself_is_alone() -> None:
    assert here() == ALONE and ALONE.is_first
    assert ALONE.agreed(3, False) == (3, False) and ALONE.mean(0.3) == (0.3,)
