import math

import pytest
import torch

from crossmae_det.layers.patches import patchify
from crossmae_det.pretraining.reconstruction import (
    Reconstruction,
    masked_images,
    pixels_to_targets,
    psnr,
    reconstructed_images,
    targets_to_pixels,
)

PATCH = (4, 2)
# Grid of 2 x 3 patches.
SHAPE = (2, 3, 8, 6)


def perfect_reconstruction(images, normalized):
    visible = torch.tensor([[0, 5], [1, 2]])
    predicted = torch.tensor([[1, 3, 4], [0, 3, 5]])
    patches = patchify(images, PATCH)
    target = torch.stack([pixels_to_targets(patches[n, predicted[n]], normalized) for n in (0, 1)])
    return Reconstruction(pred=target, target=target, visible=visible, predicted=predicted)


def patch_of(images, index):
    row, column = index // 3 * 4, index % 3 * 2
    return images[:, row : row + 4, column : column + 2]


def test_normalized_targets_by_their_formula():
    torch.manual_seed(0)
    patches = 3 * torch.randn(1, 2, 24) + 5
    patches[0, 1] = 0.25  # one color: the variance is 0
    expected = torch.zeros(1, 2, 24)
    for patch in range(2):
        values = patches[0, patch].tolist()
        mean = sum(values) / 24
        variance = sum((value - mean) ** 2 for value in values) / 23
        expected[0, patch] = (patches[0, patch] - mean) / (variance + 1e-6) ** 0.5
    torch.testing.assert_close(pixels_to_targets(patches, True), expected)


def test_raw_targets_are_the_pixels():
    patches = torch.randn(1, 2, 24)
    assert torch.equal(pixels_to_targets(patches, False), patches)


@pytest.mark.parametrize("normalized", [True, False])
def test_pixels_come_back_from_targets(normalized):
    torch.manual_seed(0)
    patches = 3 * torch.randn(2, 5, 24) + 5
    targets = pixels_to_targets(patches, normalized)
    torch.testing.assert_close(targets_to_pixels(targets, patches, normalized), patches)


@pytest.mark.parametrize("paste_visible", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_every_patch_is_in_its_place_or_zero(normalized, paste_visible):
    torch.manual_seed(0)
    images = torch.randn(SHAPE) + 2
    reconstruction = perfect_reconstruction(images, normalized)
    result = reconstructed_images(
        images, reconstruction, PATCH, norm_pix_loss=normalized, paste_visible=paste_visible
    )
    assert result.shape == SHAPE
    for n in range(2):
        shown = set(reconstruction.predicted[n].tolist())
        if paste_visible:
            shown |= set(reconstruction.visible[n].tolist())
        for index in range(6):
            expected = patch_of(images[n], index)
            expected = expected if index in shown else torch.zeros_like(expected)
            torch.testing.assert_close(patch_of(result[n], index), expected)


def test_a_prediction_in_lower_precision_gives_pixels_in_that_of_the_images():
    images = torch.randn(SHAPE)
    perfect = perfect_reconstruction(images, True)
    half = Reconstruction(
        perfect.pred.bfloat16(), perfect.target, perfect.visible, perfect.predicted
    )
    result = reconstructed_images(images, half, PATCH, norm_pix_loss=True, paste_visible=True)
    assert result.dtype == torch.float32


def test_masked_images_show_the_visible_patches():
    torch.manual_seed(0)
    images = torch.randn(SHAPE) + 2
    visible = torch.tensor([[0, 5], [1, 2]])
    result = masked_images(images, visible, PATCH)
    for n in range(2):
        for index in range(6):
            expected = patch_of(images[n], index)
            expected = expected if index in visible[n] else torch.zeros_like(expected)
            assert torch.equal(patch_of(result[n], index), expected)


def test_psnr_counts_the_chosen_pixels_alone():
    first = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    second = first.clone()
    second[0, :, 0, 0] = 51  # a fifth of the range
    second[0, :, 3, 3] = 255
    where = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    where[:, :, 0, 0] = True
    result = psnr(first, second, where)
    assert result[0].item() == pytest.approx(20 * math.log10(5))
    assert result[1].item() == math.inf
