"""Absolute position embeddings: the fixed 2-D sine-cosine table, and resampling to any grid.

Legend: H x W patches, L = H * W, C channels. The first row of an embedding is the class token's.
"""

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor


def sincos_position_embedding(dim: int, grid: tuple[int, int]) -> Tensor:
    """2-D sine-cosine position embedding (MAE, appendix A.1) with a zero row for the class token.

    Channels in order: sin(x f), cos(x f), sin(y f), cos(y f), each over C / 4 frequencies
    f = 10000 ** (-4 i / C), for column x and row y.

    Args:
        dim: channels C, a multiple of 4.
        grid: (H, W) in patches.

    Returns:
        (1, 1 + L, C) in float32.

    Raises:
        ValueError: ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a 2-D sine-cosine embedding needs a width divisible by 4, got {dim}")
    # In float64 first, so that large positions lose nothing before the sine.
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    x_phase, y_phase = x.reshape(-1, 1) * frequency, y.reshape(-1, 1) * frequency
    table = torch.cat([x_phase.sin(), x_phase.cos(), y_phase.sin(), y_phase.cos()], dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table])[None].float()


def resample_position_embedding(
    embedding: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> Tensor:
    """Resample a position embedding bicubically to another grid, as ViTDet does.

    Args:
        embedding: (1, 1 + H * W, C), class token first.
        old_grid: (H, W) of ``embedding``.
        new_grid: (H', W') of the result.

    Returns:
        (1, 1 + H' * W', C); the embedding itself when the grids are equal.
    """
    return resample_abs_pos_embed(
        embedding,
        new_size=list(new_grid),
        old_size=list(old_grid),
        num_prefix_tokens=1,
        interpolation="bicubic",
        antialias=False,
    )
