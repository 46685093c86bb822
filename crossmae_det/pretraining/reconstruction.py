"""What a decoder is to predict, and how predictions become pictures.

Legend: N images, L patches on a grid of H x W, P patch side in pixels, B channels of an image,
F = P * P * B values of a patch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from crossmae_det.layers.patches import patchify, unpatchify

# Keeps a patch of one color finite, as in MAE.
VARIANCE_EPSILON = 1e-6


@dataclass(frozen=True)
class Reconstruction:
    """Predictions with what they are compared to.

    Attributes:
        pred: (N, L_predicted, F), in the order of ``predicted``.
        target: (N, L_predicted, F), what ``pred`` should be.
        visible: (N, L_visible) int64, ascending: the patches that the encoder saw.
        predicted: (N, L_predicted) int64, ascending.
    """

    pred: Tensor
    target: Tensor
    visible: Tensor
    predicted: Tensor


@dataclass(frozen=True)
class Panels:
    """What a model makes of images, as pictures.

    Attributes:
        original: (N, 3, H * P, W * P) uint8 in RGB.
        masked: the same shape: the visible patches on the mean color.
        predicted: the predicted patches on the mean color.
        pasted: the predicted and the visible patches together.
        psnr: (N,) peak signal-to-noise ratio of the predicted patches, in dB; see :func:`psnr`.
        loss: mean squared error of the predictions against the targets.
    """

    original: Tensor
    masked: Tensor
    predicted: Tensor
    pasted: Tensor
    psnr: Tensor
    loss: float

    @property
    def columns(self) -> dict[str, Tensor]:
        """The pictures by their titles."""
        return {
            "original": self.original,
            "masked": self.masked,
            "prediction": self.predicted,
            "with visible patches": self.pasted,
        }


def psnr(pictures: Tensor, others: Tensor, where: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of 8-bit pictures over some of their pixels.

    Args:
        pictures: (N, B, height, width) uint8.
        others: the same shape and type.
        where: (N, 1, height, width) bool: the pixels that count.

    Returns:
        (N,) in dB, infinite where they are equal.
    """
    error = (pictures.float() - others.float()).square() * where
    count = where.sum(dim=(1, 2, 3)) * pictures.shape[1]
    return 10 * torch.log10(255**2 * count / error.sum(dim=(1, 2, 3)))


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch, all its pixels and channels together.

    Args:
        patches: (N, L, F).

    Returns:
        Two tensors (N, L, 1). The deviation is that of the unbiased variance plus 1e-6.
    """
    variance, mean = torch.var_mean(patches, dim=-1, correction=1, keepdim=True)
    return mean, (variance + VARIANCE_EPSILON).sqrt()


def pixels_to_targets(patches: Tensor, normalized: bool) -> Tensor:
    """The targets of a decoder for patches (N, L, F) of pixels.

    Args:
        patches: (N, L, F).
        normalized: each patch less its mean, over its standard deviation; else the pixels as they
            are.

    Returns:
        (N, L, F).
    """
    if not normalized:
        return patches
    mean, deviation = patch_statistics(patches)
    return (patches - mean) / deviation


def targets_to_pixels(values: Tensor, patches: Tensor, normalized: bool) -> Tensor:
    """The inverse of :func:`pixels_to_targets`, also for predictions in place of targets.

    Args:
        values: (N, L, F), targets or predictions.
        patches: (N, L, F), the true pixels: a normalized target does not hold the mean and the
            deviation of its patch.
        normalized: as the targets were made.

    Returns:
        (N, L, F), pixels.
    """
    if not normalized:
        return values
    mean, deviation = patch_statistics(patches)
    return values * deviation + mean


def masked_images(images: Tensor, visible: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """What the encoder sees: the visible patches, 0 (the mean color) elsewhere.

    Args:
        images: (N, B, H * P, W * P), normalized.
        visible: (N, L_visible) int64 patch indices.
        patch_size: (P_h, P_w) in pixels.

    Returns:
        (N, B, H * P, W * P).
    """
    patches = patchify(images, patch_size)
    seen = _paste(torch.zeros_like(patches), visible, _take(patches, visible))
    return unpatchify(seen, patch_size, _grid(images, patch_size))


def reconstructed_images(
    images: Tensor,
    reconstruction: Reconstruction,
    patch_size: tuple[int, int],
    *,
    norm_pix_loss: bool,
    paste_visible: bool,
) -> Tensor:
    """The predicted patches as pixels, in their places.

    Args:
        images: (N, B, H * P, W * P), normalized: those that were predicted.
        reconstruction: the predictions for ``images``.
        patch_size: (P_h, P_w) in pixels.
        norm_pix_loss: whether the model predicts normalized patches; they are turned back with the
            mean and the deviation of the true patch.
        paste_visible: put the visible patches in as well.

    Returns:
        (N, B, H * P, W * P), normalized as ``images`` are. A patch that was not predicted, and not
        pasted, is 0: the mean color.
    """
    patches = patchify(images, patch_size)
    predicted, visible = reconstruction.predicted, reconstruction.visible
    pixels = targets_to_pixels(reconstruction.pred, _take(patches, predicted), norm_pix_loss)
    result = _paste(torch.zeros_like(patches), predicted, pixels)
    if paste_visible:
        result = _paste(result, visible, _take(patches, visible))
    return unpatchify(result, patch_size, _grid(images, patch_size))


def _take(patches: Tensor, indices: Tensor) -> Tensor:
    """The patches at (N, K) indices: (N, L, F) -> (N, K, F)."""
    return patches.take_along_dim(indices[..., None], dim=1)


def _paste(patches: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """(N, L, F) with the rows at (N, K) indices replaced by values (N, K, F)."""
    indices = indices[..., None].expand(-1, -1, patches.shape[-1])
    # Predictions come in a lower precision under autocast.
    return patches.scatter(1, indices, values.to(patches.dtype))


def _grid(images: Tensor, patch_size: tuple[int, int]) -> tuple[int, int]:
    return images.shape[-2] // patch_size[0], images.shape[-1] // patch_size[1]
