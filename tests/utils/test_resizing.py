"""Resizing compared to Pillow's."""

import math

import numpy as np
import pytest
import torch
from image_files import photo
from PIL import Image

from crossmae_det.utils.resizing import Part, resize, resize_part, to_tensor

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def by_pillow(pixels, height, width, mode):
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return np.asarray(image.resize((width, height), FILTERS[mode])).reshape(height, width, -1)


def psnr(pixels, expected):
    assert pixels.shape == expected.shape and pixels.dtype == np.uint8
    error = np.mean((pixels.astype(float) - expected) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


@pytest.mark.parametrize("mode", FILTERS)
@pytest.mark.parametrize("size", [(1, 1), (5, 90), (60, 81), (61, 80), (119, 40), (250, 33)])
def test_the_filters_are_those_of_pillow(size, mode):
    pixels = photo(60, 80)
    expected = by_pillow(pixels, *size, mode)
    assert psnr(resize(pixels, *size, mode), expected) > 50
    gray = np.ascontiguousarray(pixels[:, :, 1:2])
    assert psnr(resize(gray, *size, mode), expected[:, :, 1:2]) > 50


@pytest.mark.parametrize("mode", FILTERS)
@pytest.mark.parametrize("scale", [0.03, 0.3, 0.996, 1, 1.004, 1.3, 2.98])
def test_a_part_is_that_of_the_whole_resized_image(scale, mode):
    rng = np.random.default_rng(int(scale * 100))
    for _ in range(20):
        height, width = rng.integers(20, 300, 2).tolist()
        pixels = photo(height, width, seed=1)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        top, left = rng.integers(0, size).tolist()
        bottom, right = rng.integers((top + 1, left + 1), (size[0] + 1, size[1] + 1)).tolist()
        made = resize_part(
            pixels, (size[0] / height, size[1] / width), Part(top, left, bottom, right), mode
        )
        assert psnr(made, by_pillow(pixels, *size, mode)[top:bottom, left:right]) > 45


@pytest.mark.parametrize("mode", FILTERS)
@pytest.mark.parametrize("size", [(1, 9), (9, 1), (1, 1)])
def test_one_row_or_column_of_a_turned_image(size, mode):
    pixels = photo(20, 30)[::-1, ::-1][: size[0], : size[1]]
    expected = by_pillow(pixels.copy(), 6, 7, mode)
    assert psnr(resize(pixels, 6, 7, mode), expected) > 45
    whole = resize_part(pixels, (6 / size[0], 7 / size[1]), Part(0, 0, 6, 7), mode)
    assert psnr(whole, expected) > 45
    np.testing.assert_array_equal(to_tensor(pixels), pixels.transpose(2, 0, 1))


def test_a_whole_image_of_the_same_size_is_unchanged():
    pixels = photo(9, 12)
    np.testing.assert_array_equal(resize(pixels, 9, 12), pixels)
    np.testing.assert_array_equal(resize_part(pixels, (1, 1), Part(0, 0, 9, 12)), pixels)


@pytest.mark.parametrize("channels", [1, 3])
def test_planes_of_an_image(channels):
    pixels = photo(8, 12)[1:, 2:, :channels]  # not contiguous
    planes = to_tensor(pixels)
    assert planes.is_contiguous() and planes.dtype == torch.uint8
    np.testing.assert_array_equal(planes.numpy(), pixels.transpose(2, 0, 1))
    reverse = to_tensor(pixels, reverse=True)
    np.testing.assert_array_equal(reverse.numpy(), pixels[:, :, ::-1].transpose(2, 0, 1))
