"""MAE, the baseline: a decoder of self-attention over all patches (arXiv 2111.06377).

Legend: N images, L patches on a grid of H x W, T = 1 + L_visible tokens of the encoder, C channels
of the encoder, D channels of the decoder, F values of a patch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crossmae_det.layers.blocks import Block
from crossmae_det.modeling.vit import LAYER_NORM, ViT
from crossmae_det.pretraining.masked_image_model import (
    DECODER_MLP_RATIO,
    MaskedDecoder,
    MaskedImageModel,
    Masking,
)


class SelfAttentionDecoder(MaskedDecoder):
    """Predicts patches by self-attention over visible tokens and mask tokens together.

    MAE's encoder ends with a norm, which the ViT does not have: it is kept here, as
    ``encoder_norm``, so that ``encoder.*`` of a pretraining state dict is the ViT alone.

    Args:
        encoder, dim, depth, num_heads: as for :class:`MaskedDecoder`.

    Raises:
        ValueError: a size that is out of range or does not divide.
    """

    def __init__(self, encoder: ViT, dim: int, depth: int, num_heads: int):
        super().__init__(encoder, dim, depth, num_heads)
        self.encoder_norm = LAYER_NORM(encoder.embed_dim)
        self.embed = nn.Linear(encoder.embed_dim, dim)
        options: dict[str, Any] = dict(mlp_ratio=DECODER_MLP_RATIO, norm_layer=LAYER_NORM)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, drop_path=0.0, **options) for _ in range(depth)
        )
        self.initialize()

    def forward(
        self, features: Sequence[Tensor], masking: Masking, grid: tuple[int, int]
    ) -> Tensor:
        """Predict patches.

        Args:
            features: the encoder's tensors (N, T, C), class token first; the last is read.
            masking: which patches are visible, and which are predicted.
            grid: (H, W).

        Returns:
            (N, L_predicted, F), in the order of ``masking.predicted``.
        """
        x = self.embed(self.encoder_norm(features[-1]))
        n, _, dim = x.shape
        # Under autocast x has a lower precision; scatter requires one for both.
        patches = self.mask_token.to(x.dtype).expand(n, grid[0] * grid[1], dim)
        visible = masking.visible[..., None].expand(-1, -1, dim)
        patches = patches.scatter(1, visible, x[:, 1:])
        x = torch.cat([x[:, :1], patches], dim=1) + self.positions(grid)
        for block in self.blocks:
            x = block(x)
        predicted = x[:, 1:].take_along_dim(masking.predicted[..., None], dim=1)
        return self.pred(self.norm(predicted))


class MAE(MaskedImageModel):
    """MAE on an encoder; every masked patch is predicted.

    Args:
        encoder: the encoder, with a class token; its position embedding is kept fixed.
        decoder_dim: channels of the decoder, a multiple of 4.
        decoder_depth: blocks of the decoder.
        decoder_num_heads: attention heads; must divide ``decoder_dim``.
        mask_ratio: fraction of all patches that the encoder does not see, in (0, 1).
        norm_pix_loss: predict each patch normalized by its own mean and deviation, not raw.

    Raises:
        ValueError: a ratio or a size out of range.
    """

    def __init__(
        self,
        encoder: ViT,
        *,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
    ):
        super().__init__(
            encoder,
            SelfAttentionDecoder(encoder, decoder_dim, decoder_depth, decoder_num_heads),
            mask_ratio=mask_ratio,
            prediction_ratio=mask_ratio,
            norm_pix_loss=norm_pix_loss,
        )
