"""Images to patches, patches to tokens.

Legend: N images, H x W patches, L = H * W, P patch side in pixels, F = P * P * B values of a patch
in the order row, column, channel, C channels of a token, B channels of an image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def patch_grid(images: Tensor, patch_size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) of images (N, B, H * P, W * P) in patches.

    Raises:
        ValueError: the patch does not divide the image.
    """
    (height, width), (patch_h, patch_w) = images.shape[-2:], patch_size
    if height % patch_h or width % patch_w:
        raise ValueError(
            f"an image of {height}x{width} pixels is not divisible into {patch_h}x{patch_w} patches"
        )
    return height // patch_h, width // patch_w


def _by_patch(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """(N, B, H * P, W * P) as (N, H, W, P, P, B), a view."""
    height, width = patch_grid(images, patch_size)
    x = images.unflatten(3, (width, patch_size[1])).unflatten(2, (height, patch_size[0]))
    return x.permute(0, 2, 4, 3, 5, 1)


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images into patches: (N, B, H * P, W * P) -> (N, L, F), row-major.

    Raises:
        ValueError: the patch (P_h, P_w) does not divide the image.
    """
    return _by_patch(images, patch_size).flatten(3).flatten(1, 2)


def take_patches(images: Tensor, indices: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """The patches of :func:`patchify` at (N, K) int64 indices, without cutting the others:
    (N, B, H * P, W * P) -> (N, K, F).

    Raises:
        ValueError: the patch (P_h, P_w) does not divide the image.
    """
    patches = _by_patch(images, patch_size)
    image = torch.arange(len(images), device=indices.device)[:, None]
    width = patches.shape[2]
    return patches[image, indices // width, indices % width].flatten(2)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`patchify`: (N, L, F) of a grid (H, W) -> (N, B, H * P, W * P)."""
    x = patches.unflatten(2, (*patch_size, -1)).unflatten(1, grid)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class PatchEmbed(nn.Module):
    """Linear embedding of patches, kept as the convolution that published checkpoints hold.

    Args:
        patch_size: (P_h, P_w) in pixels.
        in_chans: channels B of an image.
        embed_dim: channels C of a token.
    """

    def __init__(self, patch_size: tuple[int, int], in_chans: int, embed_dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Embed every patch: (N, B, H * P, W * P) -> (N, L, C).

        Raises:
            ValueError: the images do not have B channels.
        """
        self._check_channels(images)
        # Contiguous, or every token stays spread over memory: sums of tensors keep the strides of
        # the first, and each norm would copy its input.
        return self.proj(images).flatten(2).transpose(1, 2).contiguous()

    def embed_visible(self, images: Tensor, visible: Tensor) -> Tensor:
        """Embed the patches at (N, L_visible) int64 indices; the others are not read.

        Returns:
            (N, L_visible, C): the rows of ``forward`` at those indices.

        Raises:
            ValueError: the images do not have B channels.
        """
        self._check_channels(images)
        patches = take_patches(images, visible, self.patch_size)
        # (C, B, P_h, P_w) -> (C, F), the order within a patch.
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches, weight, self.proj.bias)

    def _check_channels(self, images: Tensor) -> None:
        if images.shape[1] != self.proj.in_channels:
            raise ValueError(
                f"images of {images.shape[1]} channels for a model that takes"
                f" {self.proj.in_channels}: check the image format and in_chans"
            )
