"""Attention with decomposed relative position: one definition, several ways to compute it.

Legend: N images or windows, M heads, H x W grid of the keys, L = H * W tokens, D channels per head.

========  =====================================================================================
eager     the definition: all scores in memory
sdpa      torch's fused attention; the relative position is a mask of all pairs
folded    torch's fused attention without a mask, for its flash kernels: see :func:`_folded`
flex      torch's FlexAttention, which adds the relative position inside the kernel; CUDA only
chunked   as sdpa, a cacheful of the mask at a time; CPU only: see :mod:`.chunked_attention`
auto      one of these, by device, type, size and whether gradients are wanted
========  =====================================================================================
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from crossmae_det.layers.chunked_attention import chunked_attention
from crossmae_det.layers.relative_position import full_bias

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "eager", "sdpa", "folded", "flex", "chunked")
# Where a backend runs, if not everywhere.
DEVICES = {"flex": "cuda", "chunked": "cpu"}
# Flash kernels take no more channels per head, and only multiples of 8.
FLASH_CHANNELS = 256
# Pairs of a query and a key, over all matrices, up to which a CPU is faster with all at once: 16 MB
# of scores in float32.
FEW_PAIRS = 2**22
# FlexAttention is compiled with it.
HAS_TRITON = importlib.util.find_spec("triton") is not None
# What "auto" stood for so far.
_logged: set[tuple[str, ...]] = set()

RelativePosition = tuple[Tensor, Tensor]


def check_backend(name: str) -> None:
    """Refuse a name that is not one of ``BACKENDS``.

    Raises:
        ValueError: it is not.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend '{name}'; backends are {', '.join(BACKENDS)}")


def attend(
    q: Tensor, k: Tensor, v: Tensor, rel_pos: RelativePosition | None = None, backend: str = "auto"
) -> Tensor:
    """Attend from every query to every key: softmax(q k' / sqrt(D) + bias) v.

    Args:
        q, k, v: (N, M, L, D), of one type.
        rel_pos: (N, M, L, H) and (N, M, L, W) from :func:`.relative_position.axis_scores`, whose
            sum is the bias, or None for none. Then all backends but "eager" are torch's own.
        backend: one of ``BACKENDS``.

    Returns:
        (N, M, L, D).

    Raises:
        ValueError: an unknown backend, or one that does not run on the device of ``q``.
    """
    check_backend(backend)
    if rel_pos is None:
        if backend == "eager":
            return _eager(q, k, v)
        return F.scaled_dot_product_attention(q, k, v)
    device = q.device.type
    if device == "meta":
        # Only shapes and FLOPs are wanted, which are those of the two products.
        return _sdpa(q, k, v, rel_pos)
    if backend == "auto":
        backend = choose_backend(device, q.dtype, q.shape[-1], rel_pos, torch.is_grad_enabled())
        _log_choice(device, str(q.dtype).removeprefix("torch."), backend)
    elif device != DEVICES.get(backend, device):
        others = [name for name in BACKENDS if DEVICES.get(name, device) == device]
        raise ValueError(
            f"attention backend '{backend}' runs on {DEVICES[backend]} only, and this is {device};"
            f" here are {', '.join(others)}"
        )
    if q.shape[0] == 0:
        # torch's fused attention gives the mask of an empty batch no gradient, not one of zeros.
        return _eager(q, k, v, rel_pos)
    return _FUNCTIONS[backend](q, k, v, rel_pos)


def choose_backend(
    device: str, dtype: torch.dtype, channels: int, rel_pos: RelativePosition, grad: bool
) -> str:
    """What "auto" stands for.

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
        # torch's fused kernel knows no gradient of a mask; the slow form of it would be taken.
        return "eager" if grad else "sdpa"
    if device != "cuda":
        return "sdpa"
    # Beyond what a flash kernel takes, the folded form is computed by a slower one.
    flash = _folded_channels(channels, rel_pos) <= FLASH_CHANNELS
    if not flash and dtype != torch.float32 and HAS_TRITON:
        return "flex"
    return "folded"


@torch.compiler.assume_constant_result
def _log_choice(*choice: str) -> None:
    """Log (device, dtype, backend) once in a process.

    To the compiler this is a constant, for which it runs it once: the graph is not broken.
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
    """D + H + W, and zeros up to a multiple of 8."""
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
    place = torch.cat([token[:, None] // width, token[:, None] % width + height], dim=1)
    # (L, H + W), by comparison: in a compiled graph, with symbolic sizes, there is no scatter.
    ones = (place[..., None] == torch.arange(height + width, device=q.device)).any(1).to(k.dtype)
    rest = total - channels - height - width
    q = F.pad(torch.cat([q * channels**-0.5, rel_h, rel_w], dim=-1), (0, rest))
    k = F.pad(torch.cat([k, ones.expand(*k.shape[:2], -1, -1)], dim=-1), (0, rest))
    # Flash kernels want values as long as queries and keys.
    v = F.pad(v, (0, total - channels))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :channels]


def _flex(q: Tensor, k: Tensor, v: Tensor, rel_pos: RelativePosition) -> Tensor:
    rel_h, rel_w = rel_pos
    width = rel_w.shape[-1]

    def add_bias(score: Tensor, n: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        bias = rel_h[n, head, query, key // width] + rel_w[n, head, query, key % width]
        return score + bias

    if torch.compiler.is_compiling():
        return flex_attention(q, k, v, score_mod=add_bias)
    # Uncompiled it would be slow, and have all scores in memory.
    return _compiled_flex()(q, k, v, score_mod=add_bias)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
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
