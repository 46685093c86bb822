"""Self-attention, with relative position and windows where a map has them, and cross-attention.

Legend: N images, L tokens, C channels, M heads, D = C / M channels per head, S window side. In
cross-attention: Q queries of C channels, K memory tokens of E channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmae_det.layers.attention_backends import attend, check_backend
from crossmae_det.layers.parameter_cache import ParameterCache
from crossmae_det.layers.relative_position import axis_scores, pairwise_table
from crossmae_det.layers.windows import window_partition, window_unpartition


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
        backend: a name in :data:`.attention_backends.BACKENDS`.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or an unknown backend.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        rel_pos_size: tuple[int, int] | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} attention heads")
        check_backend(backend)
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.use_rel_pos = rel_pos_size is not None
        if rel_pos_size is not None:
            height, width = rel_pos_size
            # Zeros, as in ViTDet: fine-tuning starts from the attention that was pretrained.
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * height - 1, dim // num_heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * width - 1, dim // num_heads))
            self._pairs_h, self._pairs_w = ParameterCache(), ParameterCache()

    def train(self, mode: bool = True) -> "Attention":
        """Set training mode; what was computed from the tables is forgotten."""
        if self.use_rel_pos:
            self._pairs_h.clear()
            self._pairs_w.clear()
        return super().train(mode)

    def forward(
        self, x: Tensor, grid: tuple[int, int] | None = None, window_size: int = 0
    ) -> Tensor:
        """Attend between all tokens, or between those of a window.

        Args:
            x: (N, L, C).
            grid: (H, W) with H * W = L where the tokens lie on a grid; the relative position, if
                there is one, is used only then.
            window_size: side S of the windows that divide the grid; 0 for none. Where S does not
                divide it, tokens of zeros fill the last windows and take part.

        Returns:
            (N, L, C).
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        if grid is None or not window_size:
            q, k, v = (part.transpose(1, 2) for part in qkv)
            x = attend(q, k, v, self._rel_pos(q, grid), self.backend).transpose(1, 2)
        else:
            # The projection of zeros is its bias.
            pad = self.qkv.bias.unflatten(0, (3, self.num_heads, -1))
            q, k, v = (
                window_partition(part, part_pad, window_size, grid)
                for part, part_pad in zip(qkv, pad, strict=True)
            )
            rel_pos = self._rel_pos(q, (window_size, window_size))
            x = window_unpartition(attend(q, k, v, rel_pos, self.backend), window_size, grid)
        return self.proj(x.flatten(2))

    def _rel_pos(self, q: Tensor, grid: tuple[int, int] | None) -> tuple[Tensor, Tensor] | None:
        if grid is None or not self.use_rel_pos:
            return None
        height, width = grid
        pairs_h = self._pairs_h(height, self.rel_pos_h, lambda table: pairwise_table(table, height))
        pairs_w = self._pairs_w(width, self.rel_pos_w, lambda table: pairwise_table(table, width))
        return axis_scores(q, pairs_h, pairs_w, grid)


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
