"""Batches: all rows in a new order, again and again, from wherever they stood."""

from __future__ import annotations

import torch

from cnf.training.batches import Shuffled, resampled, shifted


def numbered(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(count), -torch.arange(count)


def test_every_row_comes_once_before_any_comes_twice() -> None:
    batches = Shuffled(numbered(12), 4)
    for _ in range(3):
        seen = torch.cat([batches()[0] for _ in range(3)])
        assert sorted(seen.tolist()) == list(range(12))


def test_parts_stay_together_and_the_first_may_be_changed() -> None:
    batches = Shuffled(numbered(10), 4, change=lambda rows: rows + 100)
    first, second = batches()
    assert torch.equal(first - 100, -second)


def test_rows_left_over_begin_the_next_round() -> None:
    batches = Shuffled(numbered(5), 3)
    seen = torch.cat([batches()[0] for _ in range(5)])
    assert torch.bincount(seen).tolist() == [3] * 5


def test_a_batch_is_no_larger_than_the_data() -> None:
    assert len(Shuffled(numbered(5), 100)()[0]) == 5


def test_they_go_on_where_they_stood() -> None:
    batches = Shuffled(numbered(10), 4)
    batches()
    state, random = batches.state_dict(), torch.get_rng_state()
    expected = [batches()[0].tolist() for _ in range(6)]
    again = Shuffled(numbered(10), 4)
    again.load_state_dict(state)
    torch.set_rng_state(random)
    assert [again()[0].tolist() for _ in range(6)] == expected
    assert state["order"].untyped_storage().nbytes() == 8 * len(state["order"])


def test_images_move_by_a_few_pixels() -> None:
    images = torch.zeros(200, 2, 7, 7)
    images[:, 0, 3, 3], images[:, 1, 3, 3] = 1.0, 2.0
    moved = shifted(images, 2)
    assert moved.shape == images.shape
    assert torch.equal(moved.sum((2, 3)), images.sum((2, 3)))  # nothing left the frame
    assert torch.equal(2 * moved[:, 0], moved[:, 1])
    places = {tuple(place) for place in moved[:, 0].nonzero()[:, 1:].tolist()}
    assert places == {(i, j) for i in range(1, 6) for j in range(1, 6)}


def test_what_leaves_the_frame_is_filled_with_zeros() -> None:
    moved = shifted(torch.ones(50, 1, 4, 4), 1)
    assert {int(total) for total in moved.sum((1, 2, 3))} == {9, 12, 16}


def test_no_shift_is_the_same_image() -> None:
    images = torch.rand(3, 1, 4, 4)
    assert torch.equal(shifted(images, 0), images)


def test_a_row_comes_up_as_often_as_its_weight_says():
    weights = torch.tensor([2.0, 1.0, 0.5, 0.5])
    batches = Shuffled(numbered(4), 4, weights=weights)
    drawn = torch.cat([batches()[0].flatten() for _ in range(500)])
    shares = torch.bincount(drawn.long(), minlength=4)[:4] / len(drawn)
    torch.testing.assert_close(shares, weights / 4, atol=0.02, rtol=0.0)


def test_resampling_takes_each_row_as_often_as_its_share_but_for_one():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(1000, generator=generator) ** 4
    weights[::3] = 0
    for offset in (0.0, 0.3, 1 - 1e-9):
        chosen = resampled(weights, 700, offset)
        counts = torch.bincount(chosen, minlength=1000)
        assert (counts - 700 * weights / weights.sum()).abs().max() < 1 + 1e-3
        assert not counts[weights == 0].any()
