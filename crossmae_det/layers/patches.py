"""Images to patches, patches to tokens.

Legend: N images, H x W patches, L = H * W, P patch side in pixels, C channels of a token, B
channels of an image.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images into patches.

    Args:
        images: (N, B, H * P, W * P).
        patch_size: (P_h, P_w); must divide the image.

    Returns:
        (N, L, P_h * P_w * B), row-major; inside a patch: row, column, channel.

    Raises:
        ValueError: the patch does not divide the image.
    """
    n, channels, height, width = images.shape
    patch_h, patch_w = patch_size
    if height % patch_h or width % patch_w:
        raise ValueError(
            f"an image of {height}x{width} pixels is not divisible into {patch_h}x{patch_w} patches"
        )
    x = images.reshape(n, channels, height // patch_h, patch_h, width // patch_w, patch_w)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, patch_h * patch_w * channels)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`patchify`.

    Args:
        patches: (N, L, P_h * P_w * B).
        patch_size: (P_h, P_w).
        grid: (H, W) with H * W = L.

    Returns:
        (N, B, H * P_h, W * P_w).
    """
    (patch_h, patch_w), (height, width) = patch_size, grid
    x = patches.reshape(len(patches), height, width, patch_h, patch_w, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, height * patch_h, width * patch_w)


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
            ValueError: the images have another number of channels than B.
        """
        self._check_channels(images)
        # Contiguous, or every token stays spread over memory: sums of tensors keep the strides of
        # the first, and each norm would copy its input.
        return self.proj(images).flatten(2).transpose(1, 2).contiguous()

    def embed_visible(self, images: Tensor, visible: Tensor) -> Tensor:
        """Embed only some of the patches.

        Args:
            images: (N, B, H * P, W * P).
            visible: (N, L_visible) int64 patch indices.

        Returns:
            (N, L_visible, C): the same rows that ``forward`` gives at those indices.

        Raises:
            ValueError: the images have another number of channels than B.
        """
        self._check_channels(images)
        patches = patchify(images, self.patch_size)
        patches = patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[-1]))
        # (C, B, P_h, P_w) -> (C, P_h * P_w * B), the order of patchify.
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches, weight, self.proj.bias)

    def _check_channels(self, images: Tensor) -> None:
        if images.shape[1] != self.proj.in_channels:
            raise ValueError(
                f"images of {images.shape[1]} channels for a model that takes"
                f" {self.proj.in_channels}: check the image format and in_chans"
            )
