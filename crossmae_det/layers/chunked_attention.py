"""Attention with decomposed relative position on a CPU, a cacheful of it at a time.

Legend: N images or windows, M heads, B = N * M, H x W keys = queries, L = H * W, D channels per
head.

The bias of some queries is made, used and overwritten by that of the next ones, while it is in the
cache: all of it never exists, nor does it travel to memory and back. torch's fused attention does
the rest of the forward pass. It knows no gradient of a bias: the backward pass makes the weights
again, from queries, keys and relative positions, some queries at a time as well. To autograd and
to the compiler all of it is one operator.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Pairs of a query and a key for each core. Forward: the fused kernel shares out 256 queries at a
# time, and these are two such shares for 4096 keys; ten times as many would leave the last level of
# cache. Backward: 2 MB of weights in float32; half of it or twice as many take 10 % longer, on
# cores with 0.5 MB of cache each and 32 MB for all.
FORWARD_PAIRS_PER_CORE = 2**21
BACKWARD_PAIRS_PER_CORE = 2**19


def _chunks(count: int, length: int, pairs_per_core: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the ``count`` matrices and of their ``length`` queries, for so many pairs."""
    pairs = pairs_per_core * torch.get_num_threads()
    queries = min(length, max(16, pairs // length))
    matrices = max(1, pairs // (queries * length))
    for first in range(0, count, matrices):
        for query in range(0, length, queries):
            yield slice(first, first + matrices), slice(query, query + queries)


def _flat(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(N, M, L, X) as (B, L, X), contiguous: every chunk reads all keys and values."""
    return tuple(tensor.flatten(0, 1).contiguous() for tensor in tensors)


class _Pairs:
    """Memory for what a chunk has for each pair, used again for the next one."""

    def __init__(self, like: Tensor):
        self.memory = like.new_empty(0)

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """A contiguous tensor of any values."""
        size = math.prod(shape)
        if size > self.memory.numel():  # the first chunk is the largest
            self.memory = self.memory.new_empty(size)
        return self.memory[:size].view(*shape)


def _bias(rel_h: Tensor, rel_w: Tensor, memory: _Pairs) -> Tensor:
    """(b, l, H), (b, l, W) -> (b, l, H * W)."""
    height, width = rel_h.shape[-1], rel_w.shape[-1]
    bias = memory((*rel_h.shape[:2], height * width))
    torch.add(rel_h[..., :, None], rel_w[..., None, :], out=bias.unflatten(-1, (height, width)))
    return bias


@torch.library.custom_op("crossmae_det::chunked_attention", mutates_args=())
def chunked_attention(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float
) -> Tensor:
    """Attention with decomposed relative position.

    Args:
        q, k, v: (N, M, L, D), all tensors of one floating-point type and on the CPU.
        rel_h: (N, M, L, H), bias by row of the key, with H * W = L.
        rel_w: (N, M, L, W), bias by column of the key.
        scale: of the products of queries and keys; the bias is not scaled.

    Returns:
        (N, M, L, D), in memory as (N, L, M, D).
    """
    out = _empty_like_tokens(q)
    n, heads, length, _ = q.shape
    flat_q, flat_k, flat_v, flat_h, flat_w = _flat(q, k, v, rel_h, rel_w)
    flat_out = torch.empty_like(flat_q)
    memory = _Pairs(q)
    with torch.autocast("cpu", enabled=False):  # in the type of the tensors, whoever calls
        for m, i in _chunks(n * heads, length, FORWARD_PAIRS_PER_CORE):
            # The matrices of a chunk are the heads of one image to the kernel.
            bias = _bias(flat_h[m, i], flat_w[m, i], memory)
            flat_out[m, i] = F.scaled_dot_product_attention(
                flat_q[None, m, i], flat_k[None, m], flat_v[None, m], bias[None], scale=scale
            )[0]
    return out.copy_(flat_out.view_as(q))


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
    memory, more_memory = _Pairs(q), _Pairs(q)
    # The functions with `out` and the methods that end in `_` are not subject to autocast.
    for m, i in _chunks(n * heads, length, BACKWARD_PAIRS_PER_CORE):
        scores = _bias(rel_h[m, i], rel_w[m, i], memory)
        scores.baddbmm_(q[m, i], k[m].transpose(1, 2), alpha=scale)
        weights = torch.softmax(scores, -1, out=scores)
        grad_v[m].baddbmm_(weights.transpose(1, 2), grad[m, i])
        grads = torch.bmm(grad[m, i], v[m].transpose(1, 2), out=more_memory(weights.shape))
        grads.mul_(weights)
        # The gradient of a softmax w: (g - sum of g w) w, with g w in `grads`.
        grads.sub_(weights.mul_(grads.sum(-1, keepdim=True)))
        grad_q[m, i].baddbmm_(grads, k[m], beta=0, alpha=scale)
        grad_k[m].baddbmm_(grads.transpose(1, 2), q[m, i], alpha=scale)
        by_axis = grads.unflatten(-1, (rel_h.shape[-1], rel_w.shape[-1]))
        torch.sum(by_axis, -1, out=grad_h[m, i])
        torch.sum(by_axis, -2, out=grad_w[m, i])
    shape = (n, heads)
    return (
        *(grad_q.unflatten(0, shape), grad_k.unflatten(0, shape), grad_v.unflatten(0, shape)),
        *(grad_h.unflatten(0, shape), grad_w.unflatten(0, shape)),
    )


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, rel_h, rel_w))


def _keep_inputs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    return *_backward(grad, *ctx.saved_tensors, ctx.scale), None


chunked_attention.register_autograd(_gradient, setup_context=_keep_inputs)
