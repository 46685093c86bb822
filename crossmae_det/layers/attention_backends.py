"""Attention with decomposed relative position: one definition, several ways to compute it.

========  =====================================================================================
eager     the definition: all scores in memory
sdpa      torch's fused attention; the relative position is a mask of all pairs
folded    torch's fused attention without a mask, for its flash kernels: see :func:`_folded`
flex      torch's FlexAttention, which adds the relative position inside the kernel; CUDA only
chunked   as sdpa, but a cacheful of the mask at a time: see :func:`chunked_attention`; CPU only
auto      one of these, by device, type, size and whether gradients are needed
========  =====================================================================================

The relative position is that of MViTv2 (https://arxiv.org/abs/2112.01526, section 4.1): the bias
between query (y, x) and key (v, u) is ``q . table_h[y - v] + q . table_w[x - u]``, two small tables
per block instead of one entry for each pair of positions.

Legend: N images or windows, M heads, B = N * M, H x W grid of queries and keys, L = H * W tokens, D
channels per head.
"""

import functools
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "eager", "sdpa", "folded", "flex", "chunked")
# Backends that run on one type of device only.
DEVICES = {"flex": "cuda", "chunked": "cpu"}

# Flash kernels take at most this many channels per head, and only multiples of 8.
FLASH_CHANNELS = 256
# FlexAttention is compiled with it.
HAS_TRITON = importlib.util.find_spec("triton") is not None

# Pairs of a query and a key, over all matrices, up to which a CPU is faster without chunks: 16 MB
# of scores in float32.
FEW_PAIRS = 2**22
# Pairs per core and chunk. Forward: the fused kernel processes 256 queries at a time, and these are
# two such portions for 4096 keys; ten times as many exceed the last level of cache. Backward: 2 MB
# of weights in float32; half as many or twice as many take 10 % longer, on cores with 0.5 MB of
# cache each and 32 MB shared.
FORWARD_PAIRS_PER_CORE = 2**21
BACKWARD_PAIRS_PER_CORE = 2**19

# The two parts of the bias, by row and by column of the key: (N, M, L, H) and (N, M, L, W).
RelativePosition = tuple[Tensor, Tensor]


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


def relative_position(
    q: Tensor, table_h: Tensor, table_w: Tensor, grid: tuple[int, int]
) -> RelativePosition:
    """The two parts of the bias, each between the queries and the keys of one axis.

    Args:
        q: (N, M, L, D) queries before scaling.
        table_h: (2 * S - 1, D) of vertical distances; resampled when S differs from H.
        table_w: the same of horizontal distances.
        grid: (H, W) with H * W = L.

    Returns:
        (N, M, L, H), by row of the key, and (N, M, L, W), by column of the key, both in the type
        of ``q``.
    """
    queries = q.unflatten(2, grid)
    rel_h = torch.einsum("nmyxd,yvd->nmyxv", queries, _pairwise(table_h, grid[0]))
    rel_w = torch.einsum("nmyxd,xud->nmyxu", queries, _pairwise(table_w, grid[1]))
    return rel_h.flatten(2, 3).to(q.dtype), rel_w.flatten(2, 3).to(q.dtype)


def _pairwise(table: Tensor, size: int) -> Tensor:
    """(size, size, D): the row of a table for query i and key j."""
    positions = torch.arange(size, device=table.device)
    distance = positions[:, None] - positions[None, :] + (size - 1)
    return resample_table(table, size)[distance]


def full_bias(rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """The bias of every pair from its two parts: (..., L, H) and (..., L, W) -> (..., L, H * W)."""
    return (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)


def check_backend(name: str) -> None:
    """Raise ValueError unless ``name`` is in ``BACKENDS``."""
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend '{name}'; backends are {', '.join(BACKENDS)}")


def attend(
    q: Tensor, k: Tensor, v: Tensor, rel_pos: RelativePosition | None = None, backend: str = "auto"
) -> Tensor:
    """Attend from every query to every key: softmax(q k' / sqrt(D) + bias) v.

    Args:
        q, k, v: (N, M, L, D), of one type; without a bias, there may be other numbers of keys than
            of queries.
        rel_pos: the two parts of the bias from :func:`relative_position`, or None for no bias. All
            backends but "eager" are then ``scaled_dot_product_attention``, where "auto" finds it
            fast.
        backend: one of ``BACKENDS``.

    Returns:
        (N, M, L, D).

    Raises:
        ValueError: an unknown backend, or one that does not run on the device of ``q``.
    """
    check_backend(backend)
    if rel_pos is None:
        if backend == "eager" or (backend == "auto" and _fused_is_slow(q, k)):
            return _eager(q, k, v)
        return F.scaled_dot_product_attention(q, k, v)
    device = q.device.type
    if device == "meta":  # for shapes and FLOPs, which are those of the two products
        return _sdpa(q, k, v, rel_pos)
    if backend == "auto":
        backend = choose_backend(device, q.dtype, q.shape[-1], rel_pos, torch.is_grad_enabled())
        _log_choice(device, str(q.dtype).removeprefix("torch."), backend)
    elif device != DEVICES.get(backend, device):
        others = [name for name in BACKENDS if DEVICES.get(name, device) == device]
        raise ValueError(
            f"attention backend '{backend}' runs on {DEVICES[backend]} only, not on {device}:"
            f" choose one of {', '.join(others)}"
        )
    if q.shape[0] == 0:
        # torch's fused attention gives the mask of an empty batch no gradient instead of zeros.
        return _eager(q, k, v, rel_pos)
    return _FUNCTIONS[backend](q, k, v, rel_pos)


def _fused_is_slow(q: Tensor, k: Tensor) -> bool:
    """Whether the scores of all pairs in memory are faster than torch's fused attention.

    On CPUs, the gradient of the fused kernel has no fast products in bf16 and fp16: with 37 to 256
    tokens it takes two to eight times as long.
    """
    return (
        q.device.type == "cpu"
        and q.dtype != torch.float32
        and torch.is_grad_enabled()
        and q.shape[:-1].numel() * k.shape[-2] <= FEW_PAIRS
    )


def choose_backend(
    device: str, dtype: torch.dtype, channels: int, rel_pos: RelativePosition, grad: bool
) -> str:
    """The backend that "auto" selects.

    Args:
        device: type of the device.
        dtype: of queries, keys and values.
        channels: D.
        rel_pos: the two parts of the bias, for their sizes.
        grad: whether gradients are recorded.
    """
    if device == "cpu":
        if rel_pos[0].numel() * rel_pos[1].shape[-1] > FEW_PAIRS:
            return "chunked"
        # torch's fused kernel has no gradient for a mask and would fall back to its slow form.
        return "eager" if grad else "sdpa"
    if device != "cuda":
        return "sdpa"
    # Beyond the limit of flash kernels, the folded form is computed by a slower one.
    flash = _folded_channels(channels, rel_pos) <= FLASH_CHANNELS
    if not flash and dtype != torch.float32 and HAS_TRITON:
        return "flex"
    return "folded"


_logged: set[tuple[str, ...]] = set()


@torch.compiler.assume_constant_result
def _log_choice(*choice: str) -> None:
    """Log (device, dtype, backend) once per process.

    As a constant to the compiler, the call does not break the graph.
    """
    if choice not in _logged:
        _logged.add(choice)
        logger.info("Attention with relative position on %s in %s: %s", *choice)


def _eager(q: Tensor, k: Tensor, v: Tensor, rel_pos: RelativePosition | None = None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if rel_pos is not None:
        scores = scores + full_bias(*rel_pos)
    return scores.softmax(-1).to(v.dtype) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, rel_pos: RelativePosition) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=full_bias(*rel_pos))


def _folded_channels(channels: int, rel_pos: RelativePosition) -> int:
    """D + H + W, rounded up to a multiple of 8."""
    return -(-(channels + rel_pos[0].shape[-1] + rel_pos[1].shape[-1]) // 8) * 8


def _folded(q: Tensor, k: Tensor, v: Tensor, rel_pos: RelativePosition) -> Tensor:
    """Plain attention between longer vectors, whose products contain the bias.

    A query is followed by its biases for every row and for every column, a key by ones at its own
    row and its own column among zeros.
    """
    rel_h, rel_w = rel_pos
    height, width = rel_h.shape[-1], rel_w.shape[-1]
    channels = q.shape[-1]
    total = _folded_channels(channels, rel_pos)
    token = torch.arange(height * width, device=q.device)
    hot = torch.stack([token // width, token % width + height], dim=1)
    # (L, H + W), by comparison: a graph with symbolic sizes cannot be compiled with a scatter.
    ones = (hot[..., None] == torch.arange(height + width, device=q.device)).any(1).to(k.dtype)
    rest = total - channels - height - width
    q = F.pad(torch.cat([q * channels**-0.5, rel_h, rel_w], dim=-1), (0, rest))
    k = F.pad(torch.cat([k, ones.expand(*k.shape[:2], -1, -1)], dim=-1), (0, rest))
    # Flash kernels need values as long as queries and keys.
    v = F.pad(v, (0, total - channels))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :channels]


def _flex(q: Tensor, k: Tensor, v: Tensor, rel_pos: RelativePosition) -> Tensor:
    rel_h, rel_w = rel_pos
    width = rel_w.shape[-1]

    def add_bias(score: Tensor, n: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        bias = rel_h[n, head, query, key // width] + rel_w[n, head, query, key % width]
        return score + bias

    # Uncompiled it is slow and keeps all scores in memory.
    flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    return flex(q, k, v, score_mod=add_bias)


@functools.cache
def _compiled_flex() -> Callable:
    return torch.compile(flex_attention)


def _chunked(q: Tensor, k: Tensor, v: Tensor, rel_pos: RelativePosition) -> Tensor:
    return chunked_attention(q, k, v, *rel_pos, q.shape[-1] ** -0.5)


_FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, RelativePosition], Tensor]] = {
    "eager": _eager,
    "sdpa": _sdpa,
    "folded": _folded,
    "flex": _flex,
    "chunked": _chunked,
}


def _chunks(count: int, length: int, pairs_per_core: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the ``count`` matrices and of their ``length`` queries."""
    pairs = pairs_per_core * torch.get_num_threads()
    queries = min(length, max(16, pairs // length))
    matrices = max(1, pairs // (queries * length))
    for first in range(0, count, matrices):
        for query in range(0, length, queries):
            yield slice(first, first + matrices), slice(query, query + queries)


def _flat(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(N, M, L, X) as (B, L, X), contiguous: every chunk reads all keys and values."""
    return tuple(tensor.flatten(0, 1).contiguous() for tensor in tensors)


class _Scratch:
    """Memory for a value per pair, reused by one chunk after another."""

    def __init__(self, like: Tensor):
        self.memory = like.new_empty(0)

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """A contiguous, uninitialized tensor."""
        size = math.prod(shape)
        if size > self.memory.numel():  # the first chunk is the largest
            self.memory = self.memory.new_empty(size)
        return self.memory[:size].view(*shape)

    def bias(self, rel_h: Tensor, rel_w: Tensor) -> Tensor:
        """:func:`full_bias` in this memory: (b, l, H) and (b, l, W) -> (b, l, H * W)."""
        height, width = rel_h.shape[-1], rel_w.shape[-1]
        bias = self((*rel_h.shape[:2], height * width))
        torch.add(rel_h[..., :, None], rel_w[..., None, :], out=bias.unflatten(-1, (height, width)))
        return bias


@torch.library.custom_op("crossmae_det::chunked_attention", mutates_args=())
def chunked_attention(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float
) -> Tensor:
    """Attention with decomposed relative position on a CPU, some queries at a time.

    The bias of a chunk is made, used and overwritten by that of the next one while it is in the
    cache: the whole bias never exists. torch's fused attention does the rest of the forward pass,
    but has no gradient for a bias: the backward pass computes the weights again, in chunks as well.
    Autograd and the compiler see one operator.

    Args:
        q, k, v: (N, M, L, D), all tensors of one floating-point type and on the CPU.
        rel_h: (N, M, L, H), bias by row of the key, with H * W = L.
        rel_w: (N, M, L, W), bias by column of the key.
        scale: of the products of queries and keys; the bias is not scaled.

    Returns:
        (N, M, L, D), in memory as (N, L, M, D).
    """
    n, heads, length, _ = q.shape
    flat_q, flat_k, flat_v, flat_h, flat_w = _flat(q, k, v, rel_h, rel_w)
    flat_out = torch.empty_like(flat_q)
    scratch = _Scratch(q)
    with torch.autocast("cpu", enabled=False):  # compute in the type of the tensors
        for m, i in _chunks(n * heads, length, FORWARD_PAIRS_PER_CORE):
            # To the kernel, the matrices of a chunk are the heads of one image.
            bias = scratch.bias(flat_h[m, i], flat_w[m, i])
            flat_out[m, i] = F.scaled_dot_product_attention(
                flat_q[None, m, i], flat_k[None, m], flat_v[None, m], bias[None], scale=scale
            )[0]
    return _empty_like_tokens(q).copy_(flat_out.view_as(q))


def _empty_like_tokens(q: Tensor) -> Tensor:
    n, heads, length, channels = q.shape
    return q.new_empty(n, length, heads, channels).transpose(1, 2)


@chunked_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float) -> Tensor:
    return _empty_like_tokens(q)


@torch.library.custom_op("crossmae_det::chunked_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, heads, length, _ = q.shape
    grad, q, k, v, rel_h, rel_w = _flat(grad, q, k, v, rel_h, rel_w)
    grad_q, grad_h, grad_w = (torch.empty_like(x) for x in (q, rel_h, rel_w))
    grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
    first, second = _Scratch(q), _Scratch(q)
    # Autocast does not apply to functions with `out` and to in-place methods.
    for m, i in _chunks(n * heads, length, BACKWARD_PAIRS_PER_CORE):
        scores = first.bias(rel_h[m, i], rel_w[m, i])
        scores.baddbmm_(q[m, i], k[m].transpose(1, 2), alpha=scale)
        weights = torch.softmax(scores, -1, out=scores)
        grad_v[m].baddbmm_(weights.transpose(1, 2), grad[m, i])
        grads = torch.bmm(grad[m, i], v[m].transpose(1, 2), out=second(weights.shape))
        grads.mul_(weights)
        # The gradient of a softmax w: (g - sum of g w) w, with g w in `grads`.
        grads.sub_(weights.mul_(grads.sum(-1, keepdim=True)))
        grad_q[m, i].baddbmm_(grads, k[m], beta=0, alpha=scale)
        grad_k[m].baddbmm_(grads.transpose(1, 2), q[m, i], alpha=scale)
        by_axis = grads.unflatten(-1, (rel_h.shape[-1], rel_w.shape[-1]))
        torch.sum(by_axis, -1, out=grad_h[m, i])
        torch.sum(by_axis, -2, out=grad_w[m, i])
    gradients = grad_q, grad_k, grad_v, grad_h, grad_w
    return tuple(x.unflatten(0, (n, heads)) for x in gradients)


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, rel_h, rel_w))


def _save_inputs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    return *_backward(grad, *ctx.saved_tensors, ctx.scale), None


chunked_attention.register_autograd(_gradient, setup_context=_save_inputs)
