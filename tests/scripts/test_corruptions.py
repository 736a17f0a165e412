"""Damaged images: each kind does what its formula says."""

from __future__ import annotations

import pytest
import torch
from compare.corruptions import CORRUPTIONS, corrupt

SIDES = (8, 32)


def images(side: int) -> torch.Tensor:
    return torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_strong_corruption_moves_the_pixels_more_than_a_mild_one(kind, side):
    pixels = images(side)
    before = pixels.clone()
    mild, strong = (corrupt(pixels, kind, severity) for severity in CORRUPTIONS[kind])
    assert torch.equal(pixels, before)
    for damaged in (mild, strong):
        assert damaged.shape == pixels.shape and damaged.dtype == pixels.dtype
        assert damaged.min() >= 0 and damaged.max() <= 1
    assert 0 < (mild - pixels).norm() < (strong - pixels).norm()


def test_the_noise_is_the_same_for_the_same_seed_and_has_its_standard_deviation():
    grey = torch.full((50, 3, 32, 32), 0.5)
    damaged = corrupt(grey, "gaussian_noise", 0.1, seed=3)
    assert torch.equal(damaged, corrupt(grey, "gaussian_noise", 0.1, seed=3))
    assert not torch.equal(damaged, corrupt(grey, "gaussian_noise", 0.1, seed=4))
    assert damaged.std().item() == pytest.approx(0.1, rel=0.01)


def test_the_blur_of_a_point_is_a_gaussian_of_sum_1_and_an_even_image_stays_as_it_is():
    point = torch.zeros(1, 1, 9, 9)
    point[0, 0, 4, 4] = 1
    blurred = corrupt(point, "gaussian_blur", 1.0)[0, 0]
    assert blurred.sum().item() == pytest.approx(1, abs=1e-5)
    assert (blurred[4, 5] / blurred[4, 4]).item() == pytest.approx(0.60653, abs=1e-4)  # e^(-1/2)
    assert (blurred[5, 5] / blurred[4, 4]).item() == pytest.approx(0.36788, abs=1e-4)  # e^-1
    even = torch.full((1, 3, 8, 8), 0.7)
    assert torch.allclose(corrupt(even, "gaussian_blur", 1.0), even)


def test_contrast_and_brightness_are_those_of_the_formulas():
    pixels = torch.tensor([[[[0.0, 1.0], [0.4, 0.6]]]])  # mean 0.5
    expected = torch.tensor([[[[0.25, 0.75], [0.45, 0.55]]]])
    assert torch.allclose(corrupt(pixels, "contrast", 0.5), expected)
    expected = torch.tensor([[[[0.3, 1.0], [0.7, 0.9]]]])  # 1.3 is clipped
    assert torch.allclose(corrupt(pixels, "brightness", 0.3), expected)


def test_pixelate_replaces_each_square_by_its_mean():
    pixels = torch.arange(16.0).reshape(1, 1, 4, 4) / 15
    expected = torch.tensor([[2.5, 2.5, 4.5, 4.5]] * 2 + [[10.5, 10.5, 12.5, 12.5]] * 2) / 15
    assert torch.allclose(corrupt(pixels, "pixelate", 0.5)[0, 0], expected)


def test_pixels_between_two_squares_count_by_their_area():
    row = torch.tensor([0.0, 0.4, 0.8, 1.0]).expand(1, 1, 4, 4)  # to 3: cells of 4/3 pixels
    cells = [0.25 * 0.4, 0.5 * 0.4 + 0.5 * 0.8, 0.25 * 0.8 + 0.75 * 1.0]
    expected = torch.tensor([cells[0], cells[1], cells[1], cells[2]]).expand(4, 4)
    assert torch.allclose(corrupt(row, "pixelate", 0.75)[0, 0], expected)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"kind='fog' is not allowed. Allowed: gaussian_noise, "):
        corrupt(images(8), "fog", 1.0)
