"""A map of tokens to square windows, and back, with one copy each way.

Legend: N images, H x W tokens, M heads, D channels per head, S window side, K = ceil(H / S) *
ceil(W / S) windows of an image, in row-major order.

A map that the window does not divide is padded at the bottom and on the right. The padding takes
part in the attention, as in ViTDet: weights trained there expect it. There it is padded with zeros
before the projection to queries, keys and values; here after it, with what the projection makes of
zeros, its bias. So nothing is projected for the padding, neither before nor after the attention.

Each way is an operator of its own for the compiler and for autograd: slices written in place would
cost a copy of everything for each slice in the backward pass.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def _regions(grid: Sequence[int], size: int) -> Iterator[tuple[slice, slice, int, int]]:
    """Rows and columns of windows that hold the same number of tokens, and that (height, width):
    those within the map, and those that its lower or right edge cuts."""

    def axis(length: int) -> list[tuple[slice, int]]:
        whole, rest = length // size, length % size
        parts = [(slice(0, whole), size)] if whole else []
        return [*parts, (slice(whole, whole + 1), rest)] if rest else parts

    for rows, height in axis(grid[0]):
        for columns, width in axis(grid[1]):
            yield rows, columns, height, width


def _pairs(tokens: Tensor, windows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the same tokens in a map and in its windows, region by region.

    Args:
        tokens: (N, H, W, ...).
        windows: (N, K_h, K_w, S, S, ...).
    """
    size = windows.shape[3]
    for rows, columns, height, width in _regions((tokens.shape[1], tokens.shape[2]), size):
        top, left = rows.start * size, columns.start * size
        count_h, count_w = rows.stop - rows.start, columns.stop - columns.start
        part = tokens[:, top : top + count_h * height, left : left + count_w * width]
        part = part.unflatten(1, (count_h, height)).unflatten(3, (count_w, width)).transpose(2, 3)
        yield part, windows[:, rows, columns, :height, :width]


def _padding(windows: Tensor, grid: Sequence[int]) -> Iterator[Tensor]:
    """Views of the padding in windows (N, K_h, K_w, S, S, ...) of a map (H, W)."""
    size = windows.shape[3]
    for rows, columns, height, width in _regions(grid, size):
        if height < size:
            yield windows[:, rows, columns, height:]
        if width < size:
            yield windows[:, rows, columns, :height, width:]


def _count(size: int, grid: Sequence[int]) -> tuple[int, int]:
    """(K_h, K_w): windows in a column and in a row of a map (H, W)."""
    return -(-grid[0] // size), -(-grid[1] // size)


def _by_window(windows: Tensor, size: int, grid: Sequence[int]) -> Tensor:
    """(N * K, M, S * S, D) as (N, K_h, K_w, S, S, M, D), a view."""
    x = windows.unflatten(0, (-1, *_count(size, grid))).unflatten(4, (size, size))
    return x.permute(0, 1, 2, 4, 5, 3, 6)


def _empty_windows(x: Tensor, size: int, grid: Sequence[int]) -> Tensor:
    n, _, heads, channels = x.shape
    rows, columns = _count(size, grid)
    return x.new_empty(n * rows * columns, heads, size * size, channels)


def _empty_map(windows: Tensor, size: int, grid: Sequence[int]) -> Tensor:
    count, heads, _, channels = windows.shape
    rows, columns = _count(size, grid)
    return windows.new_empty(count // (rows * columns), grid[0] * grid[1], heads, channels)


@torch.library.custom_op("crossmae_det::window_partition", mutates_args=())
def _partition(x: Tensor, pad: Tensor, size: int, height: int, width: int) -> Tensor:
    grid = (height, width)
    windows = _empty_windows(x, size, grid)
    by_window = _by_window(windows, size, grid)
    for source, target in _pairs(x.unflatten(1, grid), by_window):
        target.copy_(source)
    for target in _padding(by_window, grid):
        target.copy_(pad)
    return windows


@torch.library.custom_op("crossmae_det::window_unpartition", mutates_args=())
def _unpartition(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    grid = (height, width)
    x = _empty_map(windows, size, grid)
    for target, source in _pairs(x.unflatten(1, grid), _by_window(windows, size, grid)):
        target.copy_(source)
    return x


@torch.library.custom_op("crossmae_det::window_padding_sum", mutates_args=())
def _padding_sum(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """(N * K, M, S * S, D) -> (M, D)."""
    grid = (height, width)
    total = windows.new_zeros(windows.shape[1], windows.shape[3])
    for part in _padding(_by_window(windows, size, grid), grid):
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


def _keep_sizes(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.sizes = inputs[-3:]


def _partition_gradient(ctx: Any, grad: Tensor) -> tuple:
    grad_pad = _padding_sum(grad, *ctx.sizes)
    return _unpartition(grad, *ctx.sizes), grad_pad, None, None, None


def _unpartition_gradient(ctx: Any, grad: Tensor) -> tuple:
    # Padding is dropped on the way to the map: its gradient is zero.
    zero = grad.new_zeros(grad.shape[2:])
    return _partition(grad, zero, *ctx.sizes), None, None, None


_partition.register_autograd(_partition_gradient, setup_context=_keep_sizes)
_unpartition.register_autograd(_unpartition_gradient, setup_context=_keep_sizes)


def window_partition(x: Tensor, pad: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
    """Cut a map of tokens into windows that do not overlap, head by head.

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
    """Put the windows of :func:`window_partition` together again and drop the padding.

    Args:
        windows: (N * K, M, S * S, D).
        size: window side S in tokens.
        grid: (H, W) of the map before it was partitioned.

    Returns:
        (N, H * W, M, D), contiguous.
    """
    return _unpartition(windows, size, *grid)
