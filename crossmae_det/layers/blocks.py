"""The transformer block of the trunk.

Legend: N images, H x W patches, L tokens, C channels.
"""

from collections.abc import Callable

from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from crossmae_det.layers.attention import Attention
from crossmae_det.layers.windows import window_partition, window_unpartition


class Block(nn.Module):
    """Pre-norm transformer block, for a sequence of tokens or for a map.

    Args:
        dim: channels C.
        num_heads: attention heads; must divide ``dim``.
        mlp_ratio: hidden width of the MLP over ``dim``.
        drop_path: stochastic depth rate in [0, 1).
        norm_layer: makes a norm from a number of channels.
        window_size: side of the attention windows in map mode; 0 for global attention.
        rel_pos_size: (H, W) of the relative-position tables, or None for none.
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
    ):
        super().__init__()
        self.window_size = window_size
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, rel_pos_size)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Transform tokens.

        Args:
            x: (N, L, C).
            grid: None for token mode: global attention, no relative position. (H, W) with
                H * W = L for map mode: windows and relative position as configured.

        Returns:
            (N, L, C).
        """
        y = self.norm1(x)
        if grid is None or not self.window_size:
            y = self.attn(y, grid)
        else:
            size = self.window_size
            y = self.attn(window_partition(y.unflatten(1, grid), size), (size, size))
            y = window_unpartition(y, size, grid).flatten(1, 2)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))
