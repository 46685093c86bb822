"""Self- and cross-attention over torch's scaled_dot_product_attention.

Legend: N images or windows, L tokens, C channels, M heads, D = C / M channels per head. In
cross-attention: Q queries of C channels, K memory tokens of E channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmae_det.layers.relative_position import decomposed_bias


def by_head(x: Tensor, num_heads: int) -> Tensor:
    """Divide the channels among the heads: (N, L, C) -> (N, M, L, D), without a copy."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with an optional decomposed relative position.

    Args:
        dim: channels C of a token.
        num_heads: heads M; must divide ``dim``.
        rel_pos_size: (H, W) of the grid that the relative-position tables are made for, or None for
            attention without tables. Another grid resamples them.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, num_heads: int, rel_pos_size: tuple[int, int] | None = None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} attention heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.use_rel_pos = rel_pos_size is not None
        if rel_pos_size is not None:
            height, width = rel_pos_size
            # Zeros, as in ViTDet: fine-tuning starts from the attention that was pretrained.
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * height - 1, dim // num_heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * width - 1, dim // num_heads))

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Attend between all tokens.

        Args:
            x: (N, L, C).
            grid: (H, W) with H * W = L where the tokens lie on a grid; the relative position, if
                there is one, is used only then.

        Returns:
            (N, L, C).
        """
        q, k, v = (by_head(y, self.num_heads) for y in self.qkv(x).chunk(3, dim=-1))
        bias = None
        if self.use_rel_pos and grid is not None:
            bias = decomposed_bias(q, self.rel_pos_h, self.rel_pos_w, grid)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention from queries to a memory; the queries do not see each other.

    Args:
        dim: channels C of a query.
        memory_dim: channels E of a memory token.
        num_heads: heads M; must divide ``dim``.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, memory_dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} attention heads")
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(memory_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Attend from every query to every memory token.

        Args:
            queries: (N, Q, C).
            memory: (N, K, E).

        Returns:
            (N, Q, C).
        """
        q = by_head(self.q(queries), self.num_heads)
        k, v = (by_head(y, self.num_heads) for y in self.kv(memory).chunk(2, dim=-1))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))
