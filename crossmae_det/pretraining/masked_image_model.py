"""What CrossMAE and MAE share: masking, targets and loss, and the ends of a decoder.

Legend: N images, L patches on a grid of H x W, P patch side in pixels, B channels of an image,
F = P * P * B values of a patch, C channels of the encoder, D channels of the decoder.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmae_det.layers.patches import patch_grid, take_patches, unpatchify
from crossmae_det.layers.position_embedding import (
    resample_position_embedding,
    sincos_position_embedding,
)
from crossmae_det.modeling.vit import LAYER_NORM, ViT

# Hidden width of a decoder's MLPs over its width, in every published decoder.
DECODER_MLP_RATIO = 4.0

# ImageNet's colors, RGB in 0 to 255, which every published model normalizes with.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)

# Keeps the target of a patch of one color finite, as in MAE.
VARIANCE_EPSILON = 1e-6


class Masking(NamedTuple):
    """Patch indices (N, L_...) int64, ascending; each patch of an image is in exactly one.

    Ignored patches are neither encoded nor predicted.
    """

    visible: Tensor
    predicted: Tensor
    ignored: Tensor


@dataclass(frozen=True)
class Reconstruction:
    """Predictions and their targets.

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

    @property
    def loss(self) -> Tensor:
        """Scalar in float32: the mean squared error."""
        # Under autocast the prediction has a lower precision; the mean is not taken in it.
        return F.mse_loss(self.pred.float(), self.target.float())


@dataclass(frozen=True)
class Panels:
    """Visualization of a reconstruction.

    Attributes:
        original: (N, 3, H * P, W * P) uint8 in RGB.
        masked: the same shape: the visible patches on the mean color.
        predicted: the predicted patches on the mean color.
        pasted: the predicted and the visible patches together.
        psnr: (N,) peak signal-to-noise ratio of the predicted patches in 8 bits, in dB; infinite
            where they equal the original.
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
        """The images by their titles."""
        return {
            "original": self.original,
            "masked": self.masked,
            "prediction": self.predicted,
            "with visible patches": self.pasted,
        }


def check_ratios(mask_ratio: float, prediction_ratio: float) -> None:
    """Raise ValueError unless 0 < prediction_ratio <= mask_ratio < 1."""
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio must lie between 0 and 1, both excluded; got {mask_ratio}")
    if not 0 < prediction_ratio <= mask_ratio:
        raise ValueError(
            f"prediction_ratio is a fraction of all patches, above 0 and at most the mask_ratio"
            f" {mask_ratio}; got {prediction_ratio}"
        )


def count_patches(length: int, mask_ratio: float, prediction_ratio: float) -> tuple[int, int, int]:
    """Numbers of visible, predicted and ignored patches.

    They are rounded as in the published implementation, in floats: ``int(L * (1 - mask_ratio))``
    visible, ``int(L * (mask_ratio - prediction_ratio))`` ignored, and the rest predicted, so that
    the three always add up to L. A product that a float holds just below a whole number is one
    patch less, there and here: 20 * (1 - 0.9) is 1 visible patch, not 2.

    Args:
        length: number of patches L of an image.
        mask_ratio, prediction_ratio: as for :func:`mask_patches`.

    Raises:
        ValueError: a ratio is out of range, or no patch is left visible or predicted.
    """
    check_ratios(mask_ratio, prediction_ratio)
    visible = int(length * (1 - mask_ratio))
    ignored = int(length * (mask_ratio - prediction_ratio))
    predicted = length - visible - ignored
    if not visible:
        raise ValueError(
            f"mask_ratio {mask_ratio} leaves none of {length} patches visible:"
            " lower it, or use larger images"
        )
    if not predicted:
        raise ValueError(
            f"prediction_ratio {prediction_ratio} leaves none of {length} patches predicted:"
            " raise it, or use larger images"
        )
    return visible, predicted, ignored


def mask_patches(noise: Tensor, mask_ratio: float, prediction_ratio: float) -> Masking:
    """Divide the patches of each image by the order of their noise.

    The lowest noise is visible, the highest predicted, what lies between is ignored.

    Args:
        noise: (N, L), uniform in [0, 1) for a random masking.
        mask_ratio: fraction of all patches that the encoder does not see, in (0, 1).
        prediction_ratio: fraction of all patches that the decoder predicts, in (0, mask_ratio].

    Returns:
        The indices; :func:`count_patches` says how their numbers are rounded.

    Raises:
        ValueError: as :func:`count_patches`.
    """
    visible, predicted, ignored = count_patches(noise.shape[1], mask_ratio, prediction_ratio)
    order = noise.argsort(dim=1, stable=True)
    first, middle, last = (
        part.sort(dim=1).values for part in order.split([visible, ignored, predicted], dim=1)
    )
    return Masking(visible=first, predicted=last, ignored=middle)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of patches (N, L, F), over all their pixels and channels: two
    tensors (N, L, 1). The deviation is that of the unbiased variance plus 1e-6."""
    variance, mean = torch.var_mean(patches, dim=-1, correction=1, keepdim=True)
    return mean, (variance + VARIANCE_EPSILON).sqrt()


class MaskedDecoder(nn.Module):
    """The ends of a decoder: mask token and positions, final norm and the linear map to pixels.

    A subclass has ``forward(features, masking, grid)``, from the encoder's tokens (depth + 1
    tensors (N, 1 + L_visible, C)), the :class:`Masking` and (H, W) to (N, L_predicted, F).

    The positions are a fixed sine-cosine table, a buffer made for the encoder's own grid. It is
    resampled for other grids as the encoder's table is, so that both agree.

    Args:
        encoder: the encoder that is decoded.
        dim: channels D.
        depth: number of blocks.
        num_heads: attention heads; must divide ``dim``.

    Raises:
        ValueError: a size that is out of range or does not divide.
    """

    pos_embed: Tensor

    def __init__(self, encoder: ViT, dim: int, depth: int, num_heads: int):
        super().__init__()
        if depth < 1:
            raise ValueError(f"decoder_depth must be at least 1, got {depth}")
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"decoder_dim {dim} is not divisible by {num_heads} attention heads")
        patch_h, patch_w = encoder.patch_size
        self.pos_grid = encoder.pos_grid
        self.register_buffer("pos_embed", sincos_position_embedding(dim, self.pos_grid))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm = LAYER_NORM(dim)
        self.pred = nn.Linear(dim, patch_h * patch_w * encoder.patch_embed.proj.in_channels)

    def initialize(self) -> None:
        """MAE's initialization; a subclass calls it at the end of its constructor."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table for a grid (H, W): (1, 1 + L, D), class token first."""
        return resample_position_embedding(self.pos_embed, self.pos_grid, grid)


class MaskedImageModel(nn.Module):
    """An encoder that sees some of the patches, and a decoder that predicts others.

    Its state dict is ``encoder.*``, the encoder's own, and ``decoder.*``. The encoder's position
    embedding is kept fixed (it gets no gradient), as in MAE.

    ``mask_ratio`` and ``prediction_ratio`` may be changed on a model that is built: no weight
    depends on them. Images may be bytes or floats: see :meth:`normalize`.

    Args:
        encoder: the encoder, with a class token.
        decoder: predicts pixels from the encoder's tokens.
        mask_ratio: fraction of all patches that the encoder does not see, in (0, 1).
        prediction_ratio: fraction of all patches that are predicted, in (0, mask_ratio].
        norm_pix_loss: predict each patch normalized by its own mean and deviation, not raw.

    Raises:
        ValueError: a ratio is out of range, or the encoder has no class token.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    forward_methods = ("reconstruct",)  # beside forward: see engine.fsdp.shard

    def __init__(
        self,
        encoder: ViT,
        decoder: MaskedDecoder,
        *,
        mask_ratio: float,
        prediction_ratio: float,
        norm_pix_loss: bool,
    ):
        super().__init__()
        check_ratios(mask_ratio, prediction_ratio)
        if encoder.cls_token is None:
            raise ValueError("pretraining needs an encoder with class_token=True")
        self.mask_ratio = mask_ratio
        self.prediction_ratio = prediction_ratio
        self.norm_pix_loss = norm_pix_loss
        self.encoder = encoder
        self.decoder = decoder
        encoder.pos_embed.requires_grad_(False)
        for name, values in (("pixel_mean", PIXEL_MEAN), ("pixel_std", PIXEL_STD)):
            buffer = torch.tensor(values).view(-1, 1, 1)
            self.register_buffer(name, buffer, persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize bytes, (N, 3, height, width) uint8 in RGB on any device, to floats on the
        model's device with ImageNet's mean 0 and standard deviation 1. Floats, (N, B, height,
        width), are taken as normalized and returned unchanged."""
        if images.dtype != torch.uint8:
            return images
        # Moved as bytes: a quarter of the size of floats.
        images = images.to(self.pixel_mean.device, non_blocking=True)
        return (images - self.pixel_mean) / self.pixel_std

    def denormalize(self, images: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`: (N, 3, height, width) floats -> uint8 in RGB."""
        return (images * self.pixel_std + self.pixel_mean).round().clamp(0, 255).to(torch.uint8)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """The loss of a training step: arguments and errors are those of :meth:`predict`.

        Returns:
            ``loss_reconstruction``: scalar, the mean squared error of the predicted patches.
        """
        return {"loss_reconstruction": self.predict(images, noise).loss}

    def predict(
        self, images: Tensor, noise: Tensor | None = None, prediction_ratio: float | None = None
    ) -> Reconstruction:
        """Mask images, encode the visible patches and predict masked ones.

        Args:
            images: (N, B, H * P, W * P), bytes or normalized: see :meth:`normalize`; any H and W.
            noise: (N, L), decides the masking (see :func:`mask_patches`); None draws it uniformly.
            prediction_ratio: fraction of all patches that are predicted; None for the model's own.

        Returns:
            Predictions, targets and the masking.

        Raises:
            ValueError: the patch does not divide the image, the noise does not fit it, or the
                ratios leave no patch visible or predicted.
        """
        images = self.normalize(images)
        masking = self.mask(images, noise, prediction_ratio)
        patch_size = self.encoder.patch_size
        # Every patch is cut at most once: visible ones by the encoder, predicted ones here.
        features = self.encoder.forward_tokens(images, masking.visible)
        pred = self.decoder(features, masking, patch_grid(images, patch_size))
        target = take_patches(images, masking.predicted, patch_size)
        if self.norm_pix_loss:
            mean, deviation = patch_statistics(target)
            target = (target - mean) / deviation
        return Reconstruction(pred, target, masking.visible, masking.predicted)

    def mask(
        self, images: Tensor, noise: Tensor | None = None, prediction_ratio: float | None = None
    ) -> Masking:
        """The masking of :meth:`predict`, with its arguments and errors."""
        height, width = patch_grid(images, self.encoder.patch_size)
        shape = len(images), height * width
        if noise is None:
            noise = torch.rand(shape, device=images.device)
        elif noise.shape != shape:
            raise ValueError(
                f"the noise is {tuple(noise.shape)} where the images have {shape} patches"
            )
        if prediction_ratio is None:
            prediction_ratio = self.prediction_ratio
        return mask_patches(noise, self.mask_ratio, prediction_ratio)

    def fixed_noise(self, images: Tensor, seed: int = 0) -> Tensor:
        """Noise for :meth:`predict` that depends on ``seed`` and the shape of the images only, so
        that maskings can be compared: (N, L), uniform in [0, 1), on the model's device."""
        height, width = patch_grid(images, self.encoder.patch_size)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(len(images), height * width, generator=generator)
        return noise.to(self.pixel_mean.device)

    def features(self, images: Tensor) -> Tensor:
        """One feature (N, C) per image (N, B, H * P, W * P), see :meth:`normalize`: the mean of its
        patch tokens after the last block, unmasked."""
        return self.encoder.forward_tokens(self.normalize(images))[-1][:, 1:].mean(dim=1)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor | None = None) -> Panels:
        """Predict every masked patch, whatever the ``prediction_ratio``, and visualize it.

        Args:
            images: (N, 3, H * P, W * P), see :meth:`normalize`.
            noise: (N, L), see :meth:`predict`.

        Returns:
            Images on the model's device. Where the targets are normalized, a predicted patch has
            the mean and the deviation of the true one: the model does not predict them.

        Raises:
            ValueError: as :meth:`predict`.
        """
        images = self.normalize(images)
        result = self.predict(images, noise, prediction_ratio=self.mask_ratio)
        patch_size = self.encoder.patch_size
        grid = patch_grid(images, patch_size)

        def place(patches: Tensor, indices: Tensor) -> Tensor:
            """Images of the patches (N, K, F) at (N, K) indices, 0 elsewhere: the mean color."""
            blank = patches.new_zeros(len(patches), grid[0] * grid[1], patches.shape[2])
            indices = indices[..., None].expand(-1, -1, patches.shape[2])
            return unpatchify(blank.scatter(1, indices, patches), patch_size, grid)

        true = take_patches(images, result.predicted, patch_size)
        pixels = result.pred.to(true.dtype)  # lower precision under autocast
        if self.norm_pix_loss:
            mean, deviation = patch_statistics(true)
            pixels = pixels * deviation + mean
        masked = place(take_patches(images, result.visible, patch_size), result.visible)
        predicted = place(pixels, result.predicted)
        original, pasted = self.denormalize(images), self.denormalize(masked + predicted)
        # Only the predicted pixels differ.
        error = (pasted.float() - original.float()).square().sum(dim=(1, 2, 3))
        return Panels(
            original=original,
            masked=self.denormalize(masked),
            predicted=self.denormalize(predicted),
            pasted=pasted,
            psnr=10 * torch.log10(torch.tensor(255.0**2 * true[0].numel()) / error),
            loss=result.loss.item(),
        )
