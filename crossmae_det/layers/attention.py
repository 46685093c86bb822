"""A map of tokens to square windows, and back, with one copy each way.

Legend: N images, H x W tokens, M heads, D channels per head, S window side, K = ceil(H / S) *
ceil(W / S) windows of an image, in row-major order.

A map that the window does not divide is padded at the bottom and on the right. The padding takes
part in the attention, as in ViTDet: weights trained there expect it. There it is padded with zeros
before the projection to queries, keys and values; here after it, with what the projection makes of
zeros, its bias. So nothing is projected for the padding, neither before nor after the attention.

Each way is an operator of its own for the compiler and for autograd: slices written in place would
cost a copy of everything for each slice in the backward pass.

What follows from a parameter and a size alone, computed once for each size.

Self-attention, with relative position and windows where a map has them, and cross-attention.

Legend: N images, L tokens, C channels, M heads, D = C / M channels per head, S window side. In
cross-attention: Q queries of C channels, K memory tokens of E channels.
"""

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmae_det.layers.attention_backends import (
    attend,
    axis_scores,
    check_backend,
    pairwise_table,
)


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


# Sizes that are kept: images of one dataset have a few.
CAPACITY = 8


class ParameterCache:
    """Keeps what was computed from a parameter, for as long as the parameter stays as it is.

    It keeps nothing while a graph is compiled, where it would be a constant, and forgets all where
    gradients are recorded: a backward pass needs a graph of its own, and an optimizer's step may
    follow. torch's fused optimizers change a parameter without a trace. Otherwise a value is taken
    again only where the parameter is the same object, with the same memory and the same version:
    ``load_state_dict``, ``.to()`` and whatever else writes to it change one of them. A write
    through ``parameter.data`` changes none; :meth:`clear` is for that.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[Tensor, int, Tensor]] = {}
        self._owner: weakref.ref[nn.Parameter] | None = None

    def __call__(
        self, key: Hashable, parameter: nn.Parameter, compute: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The value of ``compute(parameter)``.

        Args:
            key: what else the value depends on, such as a size.
            parameter: one cache is for one parameter.
            compute: a function of the parameter and of the key.
        """
        if torch.compiler.is_compiling():
            return compute(parameter)
        if torch.is_grad_enabled():
            self.clear()
            return compute(parameter)
        # Inference tensors have no version, and those on "meta" no memory.
        if parameter.is_inference() or parameter.is_meta:
            return compute(parameter)
        if self._owner is None or self._owner() is not parameter:
            self.clear()
            self._owner = weakref.ref(parameter)
        memory, version, value = self._entries.get(key, (None, -1, None))
        if (
            memory is not None
            and value is not None
            and memory.data_ptr() == parameter.data_ptr()
            and version == parameter._version
        ):
            return value
        value = compute(parameter)
        self._entries.pop(key, None)
        while len(self._entries) >= CAPACITY:
            self._entries.pop(next(iter(self._entries)))
        # The alias keeps the memory, lest other numbers come to lie at the same address.
        self._entries[key] = (parameter.detach(), parameter._version, value)
        return value

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._owner = None

    def __deepcopy__(self, memo: dict) -> "ParameterCache":
        return ParameterCache()

    def __reduce__(self) -> tuple:
        return ParameterCache, ()


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
