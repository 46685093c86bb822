"""Tensors of a checkpoint in the sizes of a model.

Legend: L patches on a grid, C channels of the trunk, B channels of an image.
"""

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor, nn

from crossmae_det.checkpoint.names import RELATIVE_POSITION
from crossmae_det.checkpoint.structure import square_side, with_class_row
from crossmae_det.layers.position_embedding import (
    resample_position_embedding,
    sincos_position_embedding,
)
from crossmae_det.layers.relative_position import resample_table

# Where a checkpoint tells the grid (H, W) in patches of its position embeddings.
POSITION_GRID = "position_grid"
Grid = tuple[int, int]


def position_grid(model: nn.Module) -> dict[str, list[int]]:
    """The entry of a checkpoint that tells the grid of the model's position embeddings.

    A table of 36 positions does not tell 6 x 6 from 4 x 9. Empty for a model without a ViT.
    """
    for module in model.modules():
        if (grid := getattr(module, "pos_grid", None)) is not None:
            return {POSITION_GRID: list(grid)}
    return {}


def saved_grid(content: Mapping[str, Any]) -> Grid | None:
    """The grid that a checkpoint tells with :func:`position_grid`; None where it does not."""
    match content.get(POSITION_GRID):
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
    return None


def resized(
    name: str, tensor: Tensor, target: Tensor, grid: Grid | None, file_grid: Grid | None
) -> Tensor | None:
    """A tensor in the shape of ``target``.

    Position embeddings are resampled bicubically, relative positions linearly, and patch kernels so
    that an enlarged patch is embedded as the patch was (FlexiViT, https://arxiv.org/abs/2212.08013).

    Args:
        name: of the tensor in the model.
        tensor: of the file.
        target: of the model.
        grid: (H, W) in patches where the tensor is a position embedding (1, 1 + L, C), else None.
        file_grid: the grid of the file's position embeddings where it is known. Else it is the
            model's, if the table is the sine-cosine table of that; then a square one, if the number
            of positions allows it; then the model's, if that has as many positions.

    Returns:
        The tensor itself where it has that shape, and None where it is nothing that can be resized.
    """
    if grid is not None and _is_table(tensor) and tensor.shape[-1] == target.shape[-1]:
        return _resized_positions(tensor, grid, file_grid)
    if tensor.shape == target.shape:
        return tensor
    if tensor.ndim != target.ndim or 0 in tensor.shape:
        return None
    if name.endswith("patch_embed.proj.weight"):
        same_channels = tensor.shape[:2] == target.shape[:2]
        return (
            resample_patch_embed(tensor.float(), list(target.shape[2:])) if same_channels else None
        )
    if tensor.shape[-1] != target.shape[-1]:
        return None
    if RELATIVE_POSITION.search(name) and tensor.ndim == 2:
        return resample_table(tensor.float(), (len(target) + 1) // 2)
    return None


def _is_table(tensor: Tensor) -> bool:
    return tensor.ndim == 3 and len(tensor) == 1 and 0 not in tensor.shape


def _resized_positions(tensor: Tensor, grid: Grid, file_grid: Grid | None) -> Tensor | None:
    """A position embedding (1, L, C) or (1, 1 + L, C) of a file on the grid of a model."""
    length = grid[0] * grid[1]
    told = 0 if file_grid is None else file_grid[0] * file_grid[1]
    table = tensor
    if tensor.shape[1] == length and told != length - 1:
        table = with_class_row(tensor.float())
    count, side = table.shape[1] - 1, square_side(table)
    if file_grid is not None and told == count:
        old = file_grid
    elif count == length and (side is None or _is_sincos(table, grid)):
        old = grid
    elif side is not None:
        old = (side, side)
    else:
        return None
    return table if old == grid else resample_position_embedding(table.float(), old, grid)


def _is_sincos(table: Tensor, grid: Grid) -> bool:
    """Whether a table (1, 1 + H * W, C) is that of a pretraining run, which is never trained."""
    if table.shape[-1] % 4:
        return False
    expected = sincos_position_embedding(table.shape[-1], grid)
    return torch.allclose(table[:, 1:].float(), expected[:, 1:], atol=0.01)  # also from bf16
