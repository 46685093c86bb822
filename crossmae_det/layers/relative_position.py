"""Decomposed relative position (MViTv2, https://arxiv.org/abs/2112.01526, section 4.1).

Legend: N images or windows, M heads, H x W query grid = key grid, L = H * W, D channels per head.

The bias between query (y, x) and key (v, u) is ``q . table_h[y - v] + q . table_w[x - u]``: two
small tables per block instead of one entry for each pair of positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def resample_table(table: Tensor, size: int) -> Tensor:
    """Resample a table of relative positions linearly to a grid side of ``size``.

    Args:
        table: (2 * S - 1, D), one row for each distance from -(S - 1) to S - 1.
        size: side of the grid in patches, at least 1.

    Returns:
        (2 * size - 1, D); the table itself when it already fits.
    """
    rows = 2 * size - 1
    if table.shape[0] == rows:
        return table
    return F.interpolate(table.T[None], size=rows, mode="linear")[0].T


def pairwise_table(table: Tensor, size: int) -> Tensor:
    """Look up a table for every pair of positions on one axis.

    Args:
        table: (2 * S - 1, D), resampled when S differs from ``size``.
        size: number of positions on the axis.

    Returns:
        (size, size, D): entry [i, j] belongs to query i and key j.
    """
    positions = torch.arange(size, device=table.device)
    distance = positions[:, None] - positions[None, :] + (size - 1)
    return resample_table(table, size)[distance]


def axis_scores(
    q: Tensor, pairs_h: Tensor, pairs_w: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The two parts of the bias, each between the queries and the keys of one axis.

    Args:
        q: (N, M, L, D) queries before scaling.
        pairs_h: (H, H, D) from :func:`pairwise_table` of the vertical distances.
        pairs_w: (W, W, D) from :func:`pairwise_table` of the horizontal distances.
        grid: (H, W) with H * W = L.

    Returns:
        (N, M, L, H), by row of the key, and (N, M, L, W), by column of the key, both in the type
        of ``q``.
    """
    query_grid = q.unflatten(2, grid)
    rel_h = torch.einsum("nmyxd,yvd->nmyxv", query_grid, pairs_h)
    rel_w = torch.einsum("nmyxd,xud->nmyxu", query_grid, pairs_w)
    return rel_h.flatten(2, 3).to(q.dtype), rel_w.flatten(2, 3).to(q.dtype)


def full_bias(rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """The bias of every pair from its two parts.

    Args:
        rel_h: (..., L, H).
        rel_w: (..., L, W).

    Returns:
        (..., L, H * W) additive bias for the scaled attention scores.
    """
    return (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)
