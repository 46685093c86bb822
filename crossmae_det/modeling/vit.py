"""The plain Vision Transformer: one ViT for pretraining, detection and classification.

Legend: N images, H x W patches, L = H * W, P patch side in pixels, B channels of an image, C
channels of a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crossmae_det.layers.blocks import Block
from crossmae_det.layers.patches import PatchEmbed, patch_grid
from crossmae_det.layers.position_embedding import (
    resample_position_embedding,
    sincos_position_embedding,
)

# Published ViTs are trained with this epsilon, not with torch's.
LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


def spread_global_blocks(depth: int, count: int = 4) -> list[int]:
    """The blocks that keep global attention: the last one of each of ``count`` equal groups.

    ViTDet, section 3: four of them, evenly spaced. 12 blocks give [2, 5, 8, 11].
    """
    count = min(count, depth)
    return [(group + 1) * depth // count - 1 for group in range(count)]


@dataclass(frozen=True)
class Size:
    """Width, depth and heads of a ViT, and its patch side in pixels as pretrained."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16

    @property
    def global_blocks(self) -> list[int]:
        """Indices of the blocks with global attention where the others have windows."""
        return spread_global_blocks(self.depth)


SIZES: dict[str, Size] = {
    "tiny": Size(embed_dim=192, depth=12, num_heads=3),
    "small": Size(embed_dim=384, depth=12, num_heads=6),
    "base": Size(embed_dim=768, depth=12, num_heads=12),
    "large": Size(embed_dim=1024, depth=24, num_heads=16),
    # Pretrained at patch 14. A pyramid needs a power of two: detection runs it at 16.
    "huge": Size(embed_dim=1280, depth=32, num_heads=16, patch_size=14),
}


class ViT(nn.Module):
    """Plain ViT with a token path, :meth:`forward_tokens`, and a feature-map path,
    :meth:`forward_map`.

    Its state dict has the keys of detectron2's ViT and of the published MAE checkpoints, so that
    either loads without renaming. There is no final norm: heads and decoders have their own.

    Args:
        img_size: image side in pixels, int or (H, W), that the relative-position tables are made
            for. They are resampled for images of other sizes.
        patch_size: patch side P in pixels, int or (H, W).
        embed_dim: channels C.
        depth: number of blocks.
        num_heads: attention heads; must divide ``embed_dim``.
        mlp_ratio: hidden width of the MLPs over ``embed_dim``.
        in_chans: channels B of an image.
        pretrain_img_size: image side that the absolute position embedding is made for; None means
            ``img_size``. It is resampled for other grids.
        class_token: keep a class token, for the token path. The position embedding has its row
            either way.
        window_size: side in patches of the attention windows on the feature-map path; 0 for none.
            It need not divide the grid.
        global_blocks: with windows, the indices of the blocks that stay global, negative ones
            counted from the end; None spreads four of them evenly.
        use_rel_pos: decomposed relative position on the feature-map path.
        drop_path_rate: stochastic depth rate of the last block in [0, 1), growing linearly from 0.
        norm_layer: makes a norm from a number of channels.
        use_act_checkpoint: recompute the blocks' activations in the backward pass, to save memory.
        freeze_blocks: freeze the patch embedding, the position embedding and the first
            ``freeze_blocks`` blocks: no gradients, no stochastic depth. 0 for none.
        attention_backend: how attention is computed, which changes its speed and its memory only:
            a name in :data:`crossmae_det.layers.attention_backends.BACKENDS`.

    Raises:
        ValueError: a size, an index or a rate out of range.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        *,
        in_chans: int = 3,
        pretrain_img_size: int | tuple[int, int] | None = None,
        class_token: bool = True,
        window_size: int = 0,
        global_blocks: Sequence[int] | None = None,
        use_rel_pos: bool = False,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = LAYER_NORM,
        use_act_checkpoint: bool = False,
        freeze_blocks: int = 0,
        attention_backend: str = "auto",
    ):
        super().__init__()
        self.patch_size = to_2tuple(patch_size)
        sizes = dict(embed_dim=embed_dim, depth=depth, num_heads=num_heads, in_chans=in_chans)
        for name, value in (sizes | {"patch_size": min(self.patch_size)}).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if window_size < 0:
            raise ValueError(f"window_size must not be negative (0: no windows), got {window_size}")
        if not 0 <= freeze_blocks <= depth:
            raise ValueError(f"freeze_blocks must lie in [0, {depth}], got {freeze_blocks}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must lie in [0, 1), got {drop_path_rate}")
        self.embed_dim = embed_dim
        self.use_act_checkpoint = use_act_checkpoint
        self.freeze_blocks = freeze_blocks

        self.patch_embed = PatchEmbed(self.patch_size, in_chans, embed_dim)
        self.pos_grid = self._grid(pretrain_img_size or img_size)
        self.pos_embed = nn.Parameter(sincos_position_embedding(embed_dim, self.pos_grid))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None

        global_indices = _global_indices(depth, global_blocks, window_size)
        self.blocks = nn.ModuleList()
        for index in range(depth):
            window = 0 if index in global_indices else window_size
            rel_pos_size = (window, window) if window else self._grid(img_size)
            self.blocks.append(
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio=mlp_ratio,
                    drop_path=drop_path_rate * index / max(depth - 1, 1),
                    norm_layer=norm_layer,
                    window_size=window,
                    rel_pos_size=rel_pos_size if use_rel_pos else None,
                    attention_backend=attention_backend,
                )
            )
        self._initialize()
        if freeze_blocks:
            self.pos_embed.requires_grad_(False)
            for module in (self.patch_embed, *self.blocks[:freeze_blocks]):
                module.requires_grad_(False)

    def _grid(self, img_size: int | tuple[int, int]) -> tuple[int, int]:
        """(H, W) in patches of an image, rounded up: a part of a patch is padded to a whole one."""
        (height, width), (patch_h, patch_w) = to_2tuple(img_size), self.patch_size
        return -(-height // patch_h), -(-width // patch_w)

    def _initialize(self) -> None:
        """MAE's initialization: Xavier for every linear map, the patch embedding seen as one."""
        weight = self.patch_embed.proj.weight
        nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def train(self, mode: bool = True) -> "ViT":
        """Set training mode; frozen blocks stay in evaluation mode, without stochastic depth."""
        super().train(mode)
        for block in self.blocks[: self.freeze_blocks]:
            block.eval()
        return self

    def _position(self, grid: tuple[int, int]) -> Tensor:
        """The position embedding of a grid, class token first: (1, 1 + H * W, C)."""
        return resample_position_embedding(self.pos_embed, self.pos_grid, grid)

    def _run_block(self, block: nn.Module, x: Tensor, grid: tuple[int, int] | None) -> Tensor:
        if self.use_act_checkpoint and torch.is_grad_enabled():
            return checkpoint(block, x, grid, use_reentrant=False)
        return block(x, grid)

    def forward_tokens(self, images: Tensor, visible: Tensor | None = None) -> list[Tensor]:
        """Encode images as tokens: global attention, no windows, no relative position.

        Args:
            images: (N, B, H * P, W * P), normalized.
            visible: (N, L_visible) int64 indices of the patches to encode; None encodes all L.

        Returns:
            depth + 1 tensors (N, 1 + L_visible, C), class token first: the input of the first
            block, then the output of every block.

        Raises:
            ValueError: the ViT has no class token, or the patch does not divide the image.
        """
        if self.cls_token is None:
            raise ValueError("forward_tokens needs a ViT with class_token=True")
        position = self._position(patch_grid(images, self.patch_size))
        patch_position = position[:, 1:]
        if visible is None:
            x = self.patch_embed(images) + patch_position
        else:
            x = self.patch_embed.embed_visible(images, visible) + patch_position[0, visible]
        class_token = (self.cls_token + position[:, :1]).expand(len(x), -1, -1)
        features = [torch.cat([class_token, x], dim=1)]
        for block in self.blocks:
            features.append(self._run_block(block, features[-1], None))
        return features

    def forward_map(self, images: Tensor) -> Tensor:
        """Encode images as feature maps: no class token, windows and relative position as
        configured.

        Args:
            images: (N, B, height, width), normalized. A side that the patch does not divide is
                padded with zeros at the bottom or on the right.

        Returns:
            (N, C, H, W) with H = ceil(height / P), W = ceil(width / P).

        Raises:
            ValueError: the image is smaller than one patch.
        """
        (height, width), (patch_h, patch_w) = images.shape[-2:], self.patch_size
        if height < patch_h or width < patch_w:
            raise ValueError(
                f"an image of {height}x{width} pixels is smaller than a patch of"
                f" {patch_h}x{patch_w}"
            )
        if height % patch_h or width % patch_w:
            images = F.pad(images, (0, -width % patch_w, 0, -height % patch_h))
        grid = self._grid((height, width))
        x = self.patch_embed(images) + self._position(grid)[:, 1:]
        for block in self.blocks:
            x = self._run_block(block, x, grid)
        return x.transpose(1, 2).unflatten(2, grid)


def _global_indices(
    depth: int, global_blocks: Sequence[int] | None, window_size: int
) -> Sequence[int]:
    """Indices from 0 of the blocks without windows."""
    if not window_size:
        return range(depth)
    if global_blocks is None:
        return spread_global_blocks(depth)
    for index in global_blocks:
        if not -depth <= index < depth:
            raise ValueError(f"global block {index} does not exist in a ViT of {depth} blocks")
    return [index % depth for index in global_blocks]


def size_arguments(size: str, **overrides: Any) -> dict[str, Any]:
    """Arguments of a ViT of the size table.

    Args:
        size: a name in :data:`SIZES`.
        **overrides: further arguments, or replacements of the table's; None leaves the table's
            value or the default.

    Raises:
        ValueError: an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"unknown backbone size '{size}'; sizes are {', '.join(SIZES)}")
    given = {name: value for name, value in overrides.items() if value is not None}
    return asdict(SIZES[size]) | given


def build_vit(size: str = "base", **overrides: Any) -> ViT:
    """A ViT of the size table: :class:`ViT` with :func:`size_arguments`."""
    return ViT(**size_arguments(size, **overrides))
