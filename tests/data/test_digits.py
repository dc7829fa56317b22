import math

import numpy as np
import pytest
import torch
from sklearn import datasets

from cnf.data.digits import LEVELS, SHAPE, bits_per_dim, dequantize, load_digits
from cnf.error import InputError


def test_digits_are_split_into_three_parts_of_whole_numbers():
    data = load_digits()
    parts = [
        (data.train, data.train_labels),
        (data.validation, data.validation_labels),
        (data.test, data.test_labels),
    ]
    for (pixels, labels), rows in zip(parts, (1257, 270, 270), strict=True):
        assert pixels.shape == (rows, math.prod(SHAPE)) and labels.shape == (rows,)
        assert pixels.dtype == np.float32 and labels.dtype == np.int64
        assert np.array_equal(pixels, pixels.round())
        assert set(labels) == set(range(10))
    assert data.train.min() == 0 and data.train.max() == LEVELS - 1


def test_the_split_uses_every_digit_once_and_is_always_the_same():
    first, second = load_digits(), load_digits()
    assert np.array_equal(first.test, second.test)
    assert first.test_labels[:8].tolist() == [2, 5, 6, 6, 1, 9, 4, 3]
    together = np.concatenate([first.train, first.validation, first.test])
    images = datasets.load_digits().data
    assert np.array_equal(np.unique(together, axis=0), np.unique(images, axis=0))
    assert len(together) == len(images)


def test_images_keep_their_labels():
    data, (images, labels) = load_digits(), datasets.load_digits(return_X_y=True)
    row = int(np.flatnonzero((images == data.test[17]).all(axis=1))[0])
    assert labels[row] == data.test_labels[17]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dequantized_pixels_lie_in_their_own_bin(dtype):
    pixels = torch.arange(17.0, dtype=dtype).repeat(1000, 1)
    values = dequantize(pixels, torch.Generator().manual_seed(1))
    assert values.dtype == dtype and values.shape == pixels.shape
    assert values.min() >= 0 and values.max() < 1
    assert (values * LEVELS - pixels - 0.5).abs().max() <= 0.5 + 1e-5
    assert abs((values * LEVELS - pixels).mean() - 0.5) < 0.01


def test_dequantization_never_rounds_up_to_one(monkeypatch):
    almost = 1 - torch.finfo(torch.float32).eps / 2
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, almost))
    assert dequantize(torch.full((2, 64), 16.0)).max() < 1


def test_a_seed_repeats_the_noise():
    pixels = torch.full((5, 64), 3)
    first, second = (dequantize(pixels, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second) and first.dtype == torch.float32
    assert not torch.equal(first, dequantize(pixels, torch.Generator().manual_seed(8)))


def test_read_only_bytes_are_dequantized():
    images = np.frombuffer(bytes(range(256)), dtype=np.uint8)
    assert dequantize(images, levels=256).shape == (256,)


@pytest.mark.parametrize(
    "pixels",
    [
        torch.tensor([0.5]),
        torch.tensor([17.0]),
        torch.tensor([-1]),
        torch.tensor([math.nan]),
        torch.tensor([math.inf]),
        torch.tensor([1j]),
        np.array(["a"]),
        "abc",
        None,
        [[1], [2, 3]],
    ],
)
def test_what_is_no_pixel_is_refused_in_a_sentence(pixels):
    with pytest.raises(InputError) as caught:
        dequantize(pixels)
    assert str(caught.value).startswith("pixels ") and "; pass " in str(caught.value)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("dim", [1, 64])
def test_the_uniform_density_pays_the_logarithm_of_the_levels(dim, levels):
    bits = bits_per_dim(torch.zeros(3, dtype=torch.float64), dim, levels)
    assert torch.allclose(bits, torch.full((3,), math.log2(levels), dtype=torch.float64))


def test_a_density_of_whole_bins_pays_the_entropy_of_the_pixels():
    probability = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    log_density = torch.log(probability * 4)  # bins of width 1/4
    bits = (probability * bits_per_dim(log_density, dim=1, levels=4)).sum()
    assert bits.item() == pytest.approx(1.75)


def test_one_level_is_a_density_in_bits():
    assert bits_per_dim(torch.tensor([-2 * math.log(2)]), dim=2, levels=1).item() == 1.0


@pytest.mark.parametrize("dim, levels", [(0, 256), (-3, 256), (4, 0)])
def test_dimensions_and_levels_must_be_positive(dim, levels):
    with pytest.raises(InputError, match="at least 1; pass"):
        bits_per_dim(torch.zeros(1), dim, levels)
