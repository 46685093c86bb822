"""Transformer blocks: that of the ViT, and that of a cross-attention decoder.

Legend: N images, H x W patches, L tokens, C channels. In the decoder: Q queries of C channels, L
memory tokens of E channels.
"""

from collections.abc import Callable

from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from crossmae_det.layers.attention import Attention, CrossAttention


class Block(nn.Module):
    """Pre-norm transformer block, for a sequence of tokens or for a feature map.

    Args:
        dim: channels C.
        num_heads: attention heads; must divide ``dim``.
        mlp_ratio: hidden width of the MLP over ``dim``.
        drop_path: stochastic depth rate in [0, 1).
        norm_layer: makes a norm from a number of channels.
        window_size: side of the attention windows on a feature map; 0 for global attention.
        rel_pos_size: (H, W) of the relative-position tables, or None for none.
        attention_backend: a name in :data:`.attention_backends.BACKENDS`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        drop_path: float,
        norm_layer: Callable[[int], nn.Module],
        window_size: int = 0,
        rel_pos_size: tuple[int, int] | None = None,
        attention_backend: str = "auto",
    ):
        super().__init__()
        self.window_size = window_size
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, rel_pos_size, attention_backend)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Transform tokens (N, L, C) to (N, L, C).

        Args:
            x: (N, L, C).
            grid: None for the token path: global attention, no relative position. (H, W) with
                H * W = L for the feature-map path: windows and relative position as configured.
        """
        x = x + self.drop_path(self.attn(self.norm1(x), grid, self.window_size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class CrossAttentionBlock(nn.Module):
    """Pre-norm decoder block: the queries attend to a memory, then an MLP.

    The memory is not normalized here. Without ``self_attention`` a query does not depend on the
    other queries.

    Args:
        dim: channels C of a query.
        memory_dim: channels E of a memory token.
        num_heads: attention heads; must divide ``dim``.
        mlp_ratio: hidden width of the MLP over ``dim``.
        norm_layer: makes a norm from a number of channels.
        self_attention: let the queries attend to each other first (CrossMAE's ablation).
    """

    def __init__(
        self,
        dim: int,
        memory_dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        norm_layer: Callable[[int], nn.Module],
        self_attention: bool = False,
    ):
        super().__init__()
        self.self_attention = self_attention
        if self_attention:
            self.self_norm = norm_layer(dim)
            self.self_attn = Attention(dim, num_heads)
        self.norm1 = norm_layer(dim)
        self.cross_attn = CrossAttention(dim, memory_dim, num_heads)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Transform queries (N, Q, C) with a normalized memory (N, L, E); returns (N, Q, C)."""
        x = queries
        if self.self_attention:
            x = x + self.self_attn(self.self_norm(x))
        x = x + self.cross_attn(self.norm1(x), memory)
        return x + self.mlp(self.norm2(x))
