"""Self-attention, with relative position and windows on a feature map, and cross-attention.

Legend: N images, L tokens on a grid of H x W, C channels, M heads, D = C / M channels per head, S
window side, K = ceil(H / S) * ceil(W / S) windows of an image in row-major order. In
cross-attention: Q queries of C channels, L memory tokens of E channels.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from crossmae_det.layers.attention_backends import attend, check_backend, relative_position


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
        _check_heads(dim, num_heads)
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

    def forward(
        self, x: Tensor, grid: tuple[int, int] | None = None, window_size: int = 0
    ) -> Tensor:
        """Attend between all tokens, or between those of a window.

        Args:
            x: (N, L, C).
            grid: (H, W) with H * W = L, or None for tokens that are not on a grid; the relative
                position, if configured, is used on a grid only.
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
        return relative_position(q, self.rel_pos_h, self.rel_pos_w, grid)


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
        _check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(memory_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Attend from queries (N, Q, C) to a memory (N, L, E); returns (N, Q, C)."""
        q = by_head(self.q(queries), self.num_heads)
        k, v = (by_head(y, self.num_heads) for y in self.kv(memory).chunk(2, dim=-1))
        x = attend(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


def _check_heads(dim: int, num_heads: int) -> None:
    if dim % num_heads:
        raise ValueError(f"width {dim} is not divisible by {num_heads} attention heads")


def window_partition(x: Tensor, pad: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
    """Cut a map of tokens into windows that do not overlap, head by head, with one copy.

    A map that the window does not divide is padded at the bottom and on the right. The padding
    takes part in the attention, as in ViTDet, whose weights expect it. ViTDet pads with zeros
    before the projection to queries, keys and values; here the map is padded after it, with the
    bias that the projection makes of zeros, so that nothing is projected for the padding.

    Args:
        x: (N, H * W, M, D).
        pad: (M, D), a token of padding; converted to the type of ``x``.
        size: window side S in tokens.
        grid: (H, W).

    Returns:
        (N * K, M, S * S, D), contiguous.
    """
    return _partition(x, pad.to(x.dtype), size, *grid)


def window_unpartition(windows: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`window_partition`, which drops the padding, with one copy.

    Args:
        windows: (N * K, M, S * S, D).
        size: window side S in tokens.
        grid: (H, W) of the map before it was partitioned.

    Returns:
        (N, H * W, M, D), contiguous.
    """
    return _unpartition(windows, size, *grid)


def _axis(length: int, size: int) -> list[tuple[slice, slice, int]]:
    """Windows along one axis that hold the same number of tokens: the whole ones, and the one that
    the edge cuts; each as (windows, their tokens in the map, tokens per window)."""
    count, rest = divmod(length, size)
    whole = slice(0, count), slice(0, count * size), size
    cut = slice(count, count + 1), slice(count * size, length), rest
    return ([whole] if count else []) + ([cut] if rest else [])


def _regions(
    tokens: Tensor, windows: Tensor, size: int, grid: tuple[int, int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the same tokens in a map (N, L, M, D) and in its windows (N * K, M, S * S, D)."""
    tokens = tokens.unflatten(1, grid)
    windows = _by_window(windows, size, grid)
    for rows, map_rows, height in _axis(grid[0], size):
        for columns, map_columns, width in _axis(grid[1], size):
            part = tokens[:, map_rows, map_columns].unflatten(2, (-1, width))
            part = part.unflatten(1, (-1, height)).transpose(2, 3)
            yield part, windows[:, rows, columns, :height, :width]


def _padding(windows: Tensor, size: int, grid: tuple[int, int]) -> Iterator[Tensor]:
    """Views of the padding in windows (N * K, M, S * S, D); the heads are their last but one
    dimension."""
    windows = _by_window(windows, size, grid)
    for rows, _, height in _axis(grid[0], size):
        for columns, _, width in _axis(grid[1], size):
            yield windows[:, rows, columns, height:]
            yield windows[:, rows, columns, :height, width:]


def _by_window(windows: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
    """(N * K, M, S * S, D) as (N, K_h, K_w, S, S, M, D), a view."""
    x = windows.unflatten(0, (-1, *_counts(size, grid))).unflatten(4, (size, size))
    return x.permute(0, 1, 2, 4, 5, 3, 6)


def _counts(size: int, grid: tuple[int, int]) -> tuple[int, int]:
    """(K_h, K_w): windows in a column and in a row of a map."""
    return -(-grid[0] // size), -(-grid[1] // size)


def _empty_windows(x: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
    n, _, heads, channels = x.shape
    rows, columns = _counts(size, grid)
    return x.new_empty(n * rows * columns, heads, size * size, channels)


def _empty_map(windows: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
    count, heads, _, channels = windows.shape
    rows, columns = _counts(size, grid)
    return windows.new_empty(count // (rows * columns), grid[0] * grid[1], heads, channels)


# Operators of their own for the compiler and for autograd: in the backward pass, slices written in
# place would cost a copy of the whole tensor for each slice.


@torch.library.custom_op("crossmae_det::window_partition", mutates_args=())
def _partition(x: Tensor, pad: Tensor, size: int, height: int, width: int) -> Tensor:
    grid = (height, width)
    windows = _empty_windows(x, size, grid)
    for source, target in _regions(x, windows, size, grid):
        target.copy_(source)
    for target in _padding(windows, size, grid):
        target.copy_(pad)
    return windows


@torch.library.custom_op("crossmae_det::window_unpartition", mutates_args=())
def _unpartition(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    grid = (height, width)
    x = _empty_map(windows, size, grid)
    for target, source in _regions(x, windows, size, grid):
        target.copy_(source)
    return x


@torch.library.custom_op("crossmae_det::window_padding_sum", mutates_args=())
def _padding_sum(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """(N * K, M, S * S, D) -> (M, D)."""
    total = windows.new_zeros(windows.shape[1], windows.shape[3])
    for part in _padding(windows, size, (height, width)):
        total += part.sum((0, 1, 2, 3, 4))
    return total


@_partition.register_fake
def _(x: Tensor, pad: Tensor, size: int, height: int, width: int) -> Tensor:
    return _empty_windows(x, size, (height, width))


@_unpartition.register_fake
def _(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    return _empty_map(windows, size, (height, width))


@_padding_sum.register_fake
def _(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    return windows.new_empty(windows.shape[1], windows.shape[3])


def _save_sizes(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.sizes = inputs[-3:]


def _partition_gradient(ctx: Any, grad: Tensor) -> tuple:
    grad_pad = _padding_sum(grad, *ctx.sizes)
    return _unpartition(grad, *ctx.sizes), grad_pad, None, None, None


def _unpartition_gradient(ctx: Any, grad: Tensor) -> tuple:
    # The map has no padding: its gradient is zero.
    zero = grad.new_zeros(grad.shape[2:])
    return _partition(grad, zero, *ctx.sizes), None, None, None


_partition.register_autograd(_partition_gradient, setup_context=_save_sizes)
_unpartition.register_autograd(_unpartition_gradient, setup_context=_save_sizes)
