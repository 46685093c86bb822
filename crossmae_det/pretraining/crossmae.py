"""CrossMAE: a decoder of cross-attention only (https://arxiv.org/abs/2401.14391).

Legend: N images, L patches on a grid of H x W, T = 1 + L_visible tokens of the encoder, C channels
of the encoder, D channels of the decoder, K features of the encoder that the decoder reads, F
values of a patch.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crossmae_det.layers.blocks import CrossAttentionBlock
from crossmae_det.modeling.vit import LAYER_NORM, ViT
from crossmae_det.pretraining.masked_image_model import (
    DECODER_MLP_RATIO,
    MaskedDecoder,
    MaskedImageModel,
    Masking,
)

logger = logging.getLogger(__name__)


class CrossAttentionDecoder(MaskedDecoder):
    """Predicts patches from queries that attend to the visible tokens, and not to each other.

    Inter-block attention: each block reads its own learned weighted sum of K features of the
    encoder (the input of its first block, outputs of its blocks), with its own LayerNorm.
    ``feature_weights`` is (depth, K): row by decoder block, column by feature, in the order of the
    encoder.

    Args:
        encoder, dim, depth, num_heads: as for :class:`MaskedDecoder`.
        feature_blocks: indices of the encoder's blocks whose outputs are read, negative ones
            counted from the end; None for all.
        use_input_feature: read the input of the encoder's first block as well.
        self_attention: let the queries attend to each other in every block: the paper's ablation.

    Raises:
        ValueError: a size or an index out of range, or no block is read.
    """

    def __init__(
        self,
        encoder: ViT,
        dim: int,
        depth: int,
        num_heads: int,
        *,
        feature_blocks: Sequence[int] | None,
        use_input_feature: bool,
        self_attention: bool,
    ):
        super().__init__(encoder, dim, depth, num_heads)
        self.feature_indices = _feature_indices(
            len(encoder.blocks), feature_blocks, use_input_feature
        )
        count = len(self.feature_indices)
        self.feature_weights = nn.Parameter(torch.empty(depth, count))
        self.feature_norms = nn.ModuleList(LAYER_NORM(encoder.embed_dim) for _ in range(depth))
        self.blocks = nn.ModuleList(
            CrossAttentionBlock(
                dim,
                encoder.embed_dim,
                num_heads,
                mlp_ratio=DECODER_MLP_RATIO,
                norm_layer=LAYER_NORM,
                self_attention=self_attention,
            )
            for _ in range(depth)
        )
        self.initialize()
        nn.init.normal_(self.feature_weights, std=count**-0.5)

    def forward(
        self, features: Sequence[Tensor], masking: Masking, grid: tuple[int, int]
    ) -> Tensor:
        """Predict patches.

        Args:
            features: depth + 1 tensors (N, T, C) of the encoder, class token first.
            masking: which patches are predicted.
            grid: (H, W).

        Returns:
            (N, L_predicted, F), in the order of ``masking.predicted``.
        """
        x = self.mask_token + self.positions(grid)[0, 1:][masking.predicted]
        read = torch.stack([features[index] for index in self.feature_indices])
        # One matrix product for all blocks: (depth, K) x (K, N T C).
        memories = torch.einsum("dk,kntc->dntc", self.feature_weights, read).unbind(0)
        for block, norm, memory in zip(self.blocks, self.feature_norms, memories, strict=True):
            x = block(x, norm(memory))
        return self.pred(self.norm(x))


class CrossMAE(MaskedImageModel):
    """CrossMAE on an encoder.

    Args:
        encoder: the encoder, with a class token; its position embedding is kept fixed.
        decoder_dim: channels of the decoder, a multiple of 4.
        decoder_depth: blocks of the decoder.
        decoder_num_heads: attention heads; must divide ``decoder_dim``.
        mask_ratio: fraction of all patches that the encoder does not see, in (0, 1).
        prediction_ratio: fraction of ALL patches that are predicted, in (0, mask_ratio]: 0.75 with
            a mask of 0.75 predicts every masked patch, 0.25 a third of them.
        feature_blocks: indices of the encoder blocks that the decoder reads, negative ones counted
            from the end; None for all. Blocks after the last of them are frozen.
        use_input_feature: the decoder also reads the input of the first encoder block.
        decoder_self_attention: the paper's ablation: queries also attend to each other.
        norm_pix_loss: predict each patch normalized by its own mean and deviation, not raw.

    Raises:
        ValueError: a ratio, a size or an index out of range.
    """

    def __init__(
        self,
        encoder: ViT,
        *,
        decoder_dim: int = 512,
        decoder_depth: int = 12,
        decoder_num_heads: int = 16,
        mask_ratio: float = 0.75,
        prediction_ratio: float = 0.25,
        feature_blocks: Sequence[int] | None = None,
        use_input_feature: bool = True,
        decoder_self_attention: bool = False,
        norm_pix_loss: bool = True,
    ):
        decoder = CrossAttentionDecoder(
            encoder,
            decoder_dim,
            decoder_depth,
            decoder_num_heads,
            feature_blocks=feature_blocks,
            use_input_feature=use_input_feature,
            self_attention=decoder_self_attention,
        )
        super().__init__(
            encoder,
            decoder,
            mask_ratio=mask_ratio,
            prediction_ratio=prediction_ratio,
            norm_pix_loss=norm_pix_loss,
        )
        # Feature i is the input of block i; feature depth is the output of the last block.
        read = decoder.feature_indices[-1]
        if unread := encoder.blocks[read:]:
            # Parameters without a gradient stop DistributedDataParallel.
            unread.requires_grad_(False)
            logger.warning(
                "The decoder reads no block after %d: the %d blocks that follow are frozen",
                read - 1,
                len(unread),
            )


def _feature_indices(
    depth: int, feature_blocks: Sequence[int] | None, use_input_feature: bool
) -> list[int]:
    """Ascending indices into the depth + 1 features of an encoder: 0 is the input of block 0."""
    chosen = range(depth) if feature_blocks is None else feature_blocks
    for index in chosen:
        if not -depth <= index < depth:
            raise ValueError(
                f"feature block {index} does not exist in an encoder of {depth} blocks"
            )
    blocks = sorted({index % depth for index in chosen})
    if not blocks:
        raise ValueError("feature_blocks is empty: the decoder must read at least one block")
    return [0] * use_input_feature + [index + 1 for index in blocks]
