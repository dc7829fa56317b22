"""Pixels are read as they are meant or refused; maps of the unit cube invert, with Jacobians."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cnf.error import InputError
from cnf.flow.pixel import Equalize, Logit, as_pixels, dequantized, fresh_noise, quantized

F64 = torch.float64
WHOLE = torch.randint(0, 256, (5, 1, 3, 4), dtype=torch.uint8)


@pytest.mark.parametrize(
    "images",
    [
        WHOLE,
        WHOLE.long(),
        WHOLE.numpy(),
        WHOLE.numpy().astype(np.uint16),
        WHOLE.squeeze(1),
        WHOLE / 255,
        (WHOLE / 255).double(),
        (WHOLE.numpy() / 255).astype(np.float32),
    ],
)
def test_whole_numbers_and_shares_of_white_are_the_same_pixels(images):
    pixels = as_pixels(images, (1, 3, 4), 256)
    assert pixels.dtype == torch.uint8 and torch.equal(pixels, WHOLE.reshape(5, 12))


def test_pixels_of_other_levels_are_read_alike():
    images = torch.randint(0, 1024, (2, 3, 2, 2))
    assert torch.equal(as_pixels(images, (3, 2, 2), 1024), images.flatten(1).int())
    assert torch.equal(as_pixels(images / 1023, (3, 2, 2), 1024), images.flatten(1).int())


REFUSED = {
    "floats of whole numbers": (WHOLE.float(), "in an integer dtype"),
    "floats below 0": (-WHOLE / 255 - 0.1, "floats are read as 0 … 1"),
    "NaN": (torch.full((2, 1, 3, 4), math.nan), "hold nan"),
    "noise added already": (torch.rand(2, 1, 3, 4), "no multiple of 1/255"),
    "a level too high": (WHOLE.long() + 200, "expected whole numbers 0 … 255"),
    "a level too low": (WHOLE.long() - 300, "expected whole numbers 0 … 255"),
    "truths": (WHOLE > 3, "torch.bool"),
    "another shape": (WHOLE.reshape(5, 1, 4, 3), r"\(n, 1, 3, 4\)"),
    "one image alone": (WHOLE[0, 0], r"images\[None\]"),
    "no numbers": (["a"], "holds no numbers"),
}


@pytest.mark.parametrize(("images", "words"), REFUSED.values(), ids=REFUSED)
def test_images_that_could_be_meant_otherwise_are_refused(images, words):
    with pytest.raises(InputError, match=words):
        as_pixels(images, (1, 3, 4), 256)


def test_dequantized_pixels_are_those_pixels_again():
    pixels = as_pixels(WHOLE, (1, 3, 4), 256)
    x = dequantized(pixels, fresh_noise(pixels), 256)
    assert x.dtype == F64 and x.min() >= 0 and x.max() < 1
    assert torch.equal(quantized(x, 256), pixels)


def equalized():
    law = Equalize(256)
    law.fit(torch.cat([WHOLE.flatten(), torch.zeros(200, dtype=torch.uint8)]))
    return law


def fitted_logit():
    logit = Logit(0.05)
    logit.fit(torch.rand(100, 12, dtype=F64))
    return logit


MAPS = {
    "logit": lambda: Logit(1e-6),
    "logit that keeps away from the ends": lambda: Logit(0.05),
    "logit of mean 0 and deviation 1": fitted_logit,
    "equalized": equalized,
    "equalized before any fit": lambda: Equalize(256),
}


@pytest.mark.parametrize("make", MAPS.values(), ids=MAPS)
def test_maps_of_the_unit_cube_invert_and_count_their_jacobian(make):
    pixel_map = make()
    x = dequantized(WHOLE.flatten(1), torch.rand(5, 12, dtype=F64).clamp(0.01, 0.99), 256)

    y, logdet = pixel_map(x)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: pixel_map(row[None])[0][0]))(x)

    assert torch.allclose(pixel_map.invert(y), x, atol=1e-9)
    assert torch.allclose(logdet, torch.linalg.slogdet(jacobian)[1], rtol=1e-6)


@pytest.mark.parametrize("make", MAPS.values(), ids=MAPS)
def test_any_point_of_the_space_is_some_pixel(make):
    pixels = quantized(make().invert(torch.tensor([[-60.0, -5.0, 0.0, 5.0, 60.0]]).double()), 256)
    assert (pixels.diff() >= 0).all() and pixels[0, 0] == 0 and pixels[0, -1] == 255


def test_equalized_pixels_are_normal():
    law = Equalize(8)
    pixels = torch.randint(0, 3, (4000, 5)) * 2  # levels 0, 2 and 4 of 8
    law.fit(pixels)
    y = law(dequantized(pixels, torch.rand(4000, 5, dtype=F64), 8))[0]
    assert abs(y.mean()) < 0.02 and abs(y.std() - 1) < 0.02
    assert abs((y < 1).double().mean() - 0.8413) < 0.01


@pytest.mark.parametrize("alpha", [-0.1, 0.5, True, "small", math.nan])
def test_a_logit_that_cannot_be_is_refused(alpha):
    with pytest.raises(InputError, match="alpha"):
        Logit(alpha)
