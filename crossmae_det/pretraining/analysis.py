"""What a trained decoder attends to: the analysis behind CrossMAE (arXiv 2401.14391).

Of an MAE, how much of the mask tokens' self-attention goes to visible patches and how much to other
masked ones (the paper's introduction and figure 1). Of a CrossMAE, which features of the encoder
each decoder block reads (its section on inter-block attention).

Legend: N images, L patches of which V are visible and Q = L - V masked, T = 1 + L tokens of MAE's
decoder, M heads, D channels per head, K features of the encoder that CrossMAE's decoder reads,
depth blocks of a decoder.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from crossmae_det.layers.attention import Attention, by_head
from crossmae_det.pretraining.crossmae import CrossAttentionDecoder
from crossmae_det.pretraining.mae import SelfAttentionDecoder
from crossmae_det.pretraining.masked_image_model import MaskedImageModel, Masking

# What the mask tokens of an MAE attend to, in the order of the columns.
KEY_GROUPS = ("visible", "masked", "class token")

# The paper's measurements of an MAE (Table 6; its introduction gives the sums 1.42 and 0.39): mean
# attention of the mask tokens per key, summed over the heads, by decoder block. In every block 49
# visible patches times the first plus 147 masked ones times the second is 15.7 to 15.9; the class
# token gets the rest of the 16 heads.
PAPER_PER_KEY = {
    "visible": (0.196, 0.149, 0.181, 0.153, 0.193, 0.161, 0.207, 0.179),
    "masked": (0.042, 0.058, 0.047, 0.057, 0.043, 0.054, 0.038, 0.048),
}
PAPER_NUM_HEADS = 16
PAPER_KEYS = (49, 147, 1)

# Images that go through a model at a time, and attention weights that are held at a time (64 MB).
BATCH_SIZE = 8
MAX_WEIGHTS = 2**24


@dataclass(frozen=True)
class DecoderAttention:
    """Where the mask tokens of an MAE attend, by decoder block: see :func:`decoder_attention`.

    Attributes:
        mass: (depth, 3), probability that goes to each of ``KEY_GROUPS``; a row sums to 1.
        keys: tokens in each group: (V, Q, 1).
        num_heads: M.
        num_images: images averaged over.
    """

    mass: Tensor
    keys: tuple[int, int, int]
    num_heads: int
    num_images: int

    @property
    def relative(self) -> Tensor:
        """(depth, 3): the mass over that of uniform attention, which is V / T, Q / T and 1 / T.

        It is the mean weight of a key of the group, times T: 1 for a key that gets its even share.
        """
        keys = torch.tensor(self.keys)
        return self.mass * keys.sum() / keys

    @property
    def per_key(self) -> Tensor:
        """(depth, 3), in the paper's unit: attention per key of a group, summed over the heads.

        A row times ``keys`` sums to M. The paper's 1.42 and 0.39 are the first two columns summed
        over the 8 decoder blocks of its MAE. The unit grows with the heads and shrinks with the
        patches: compare it between models that agree in both, others by ``relative``.
        """
        return self.mass * self.num_heads / torch.tensor(self.keys)

    def table(self) -> str:
        """The measures by decoder block for the terminal: two tables.

        The first has mass and relative attention with their means; its last column is a visible
        patch's weight over that of a masked one. The second has the paper's unit with its sums,
        beside the paper's own figures.
        """
        both = torch.cat([self.mass, self.relative], dim=1)
        rows = [[str(index), *row] for index, row in enumerate(both.tolist())]
        rows.append(["mean", *both.mean(0).tolist()])
        headers = [
            "decoder\nblock",
            *(f"to\n{name}" for name in KEY_GROUPS),
            *(f"{name},\nx uniform" for name in KEY_GROUPS),
            "visible\n/ masked",
        ]
        visible, masked = 4, 5  # columns of relative attention
        for row in rows:
            row.append(row[visible] / max(row[masked], torch.finfo().tiny))
        relative = tabulate(rows, headers, floatfmt=".3f")

        measured = self.per_key[:, :2].tolist()
        paper = list(zip(*PAPER_PER_KEY.values(), strict=True))
        # The paper's MAE may have more decoder blocks than this one, or fewer.
        rows = [
            [index, *(here or (None, None)), *(there or (None, None))]
            for index, (here, there) in enumerate(zip_longest(measured, paper))
        ]
        sums = (sum(column) for table in (measured, paper) for column in zip(*table, strict=True))
        rows.append(["sum", *sums])
        columns = [f"{name},\n{whose}" for whose in ("here", "paper") for name in KEY_GROUPS[:2]]
        per_key = tabulate(rows, ["decoder\nblock", *columns], floatfmt=".3f")
        return (
            f"{relative}\n\nAttention per key, summed over {self.num_heads} heads:"
            f" {self.keys[0]} visible and {self.keys[1]} masked patches here;"
            f" the paper's MAE has {PAPER_NUM_HEADS} heads, {PAPER_KEYS[0]} and {PAPER_KEYS[1]}"
            f" patches\n{per_key}"
        )

    def as_dict(self) -> dict[str, Any]:
        """All measures, for JSON."""
        return {
            "method": "MAE",
            "num_images": self.num_images,
            "num_heads": self.num_heads,
            "keys": dict(zip(KEY_GROUPS, self.keys, strict=True)),
            "mass": _by_group(self.mass, "mean"),
            "relative_to_uniform": _by_group(self.relative, "mean"),
            "per_key_summed_over_heads": _by_group(self.per_key, "sum"),
            "paper_per_key_summed_over_heads": {
                "source": "arXiv 2401.14391, Table 6",
                "num_heads": PAPER_NUM_HEADS,
                "keys": dict(zip(KEY_GROUPS, PAPER_KEYS, strict=True)),
                **{
                    name: {"blocks": list(values), "sum": sum(values)}
                    for name, values in PAPER_PER_KEY.items()
                },
            },
        }


@dataclass(frozen=True)
class FeatureUsage:
    """What each decoder block of a CrossMAE reads: see :func:`feature_usage`.

    Attributes:
        weights: (depth, K), as learned, with their signs.
        deviation: (K,), of the features: what a weight is multiplied with.
        names: of the K features: "input" (of the encoder's first block), "block 0", ...
        num_images: images averaged over.
    """

    weights: Tensor
    deviation: Tensor
    names: Sequence[str]
    num_images: int

    @property
    def weight_share(self) -> Tensor:
        """(depth, K): magnitudes of the weights; a row sums to 1."""
        return F.normalize(self.weights, p=1, dim=1).abs()

    @property
    def contribution(self) -> Tensor:
        """(depth, K): magnitudes of the weights times the features' deviations; a row sums to 1."""
        return F.normalize(self.weights * self.deviation, p=1, dim=1).abs()

    def table(self) -> str:
        """Contributions in percent for the terminal: a row by feature, a column by block."""
        rows = (100 * self.contribution.T).tolist()
        return tabulate(
            [(name, *row) for name, row in zip(self.names, rows, strict=True)],
            headers=["% in decoder block", *map(str, range(len(self.weights)))],
            floatfmt=".1f",
        )

    def as_dict(self) -> dict[str, Any]:
        """All measures, for JSON."""
        return {
            "method": "CrossMAE",
            "num_images": self.num_images,
            "features": list(self.names),
            "deviation": self.deviation.tolist(),
            "weights": self.weights.tolist(),
            "weight_share": self.weight_share.tolist(),
            "contribution": self.contribution.tolist(),
        }


@torch.no_grad()
def decoder_attention(
    model: MaskedImageModel, images: Tensor, noise: Tensor | None = None
) -> DecoderAttention:
    """Measure where the mask tokens of an MAE's decoder attend.

    In each block, for each head, with each mask token as the query: the softmax of its scores with
    all T tokens, itself included, is summed over the visible patches, over the masked patches and
    over the class token. The three sums are averaged over queries, heads and images, which gives
    the mass; over the mass of uniform attention, it is relative.

    The paper reports 1.42 for visible and 0.39 for masked patches, on ImageNet's validation images:
    its unit is :attr:`DecoderAttention.per_key`, summed over the decoder blocks. As masses these
    are 0.54 and 0.44, and relative to uniform attention 2.18 and 0.60, in the mean over the blocks.

    Args:
        model: an MAE in evaluation mode.
        images: (N, B, H * P, W * P), N at least 1, as for :meth:`MaskedImageModel.predict`.
        noise: (N, L) on the model's device, decides the masking; None draws it uniformly, the same
            in every call.

    Returns:
        The measures, on the CPU.

    Raises:
        ValueError: the model is not an MAE, or the images or the noise do not fit it.
    """
    decoder = model.decoder
    if not isinstance(decoder, SelfAttentionDecoder):
        raise ValueError(
            "attention between mask tokens and visible tokens is measured in an MAE's decoder;"
            f" got a model of class {type(model).__name__}"
        )
    attentions = [module for module in decoder.blocks.modules() if isinstance(module, Attention)]
    masses = []
    for part, part_noise in _batches(model, images, noise):
        with _outputs([attention.qkv for attention in attentions]) as outputs:
            model.predict(part, part_noise)
        # A patch that is not visible is a mask token in the decoder, whether predicted or not.
        masking = model.mask(part, part_noise, model.mask_ratio)
        received = [
            _attention_received(qkv, attention.num_heads, 1 + masking.predicted)
            for attention, qkv in zip(attentions, outputs, strict=True)
        ]
        masses.append(torch.stack([_sum_by_group(weights, masking) for weights in received]))
    return DecoderAttention(
        mass=torch.cat(masses, dim=1).mean(dim=1).cpu(),
        keys=(masking.visible.shape[1], masking.predicted.shape[1], 1),
        num_heads=attentions[0].num_heads,
        num_images=len(images),
    )


@torch.no_grad()
def feature_usage(
    model: MaskedImageModel, images: Tensor, noise: Tensor | None = None
) -> FeatureUsage:
    """Measure which features of the encoder each decoder block of a CrossMAE reads.

    A decoder block attends to the LayerNorm of a weighted sum of the features. That norm subtracts
    each token's mean over the channels and divides by the deviation of the sum: of a block's
    weights only the ratios count, and of a feature only its deviation from the token's mean. So the
    contribution of a feature is its weight's magnitude times the root mean square of that deviation
    over images, tokens (visible ones and the class token) and channels, divided by the sum of this
    product over all features of the block.

    Features of neighboring blocks are alike, since each is the one before plus something: weights
    of opposite sign take the difference, which contributions, without signs, do not show. Look at
    both.

    Args:
        model: a CrossMAE in evaluation mode.
        images: (N, B, H * P, W * P), N at least 1, as for :meth:`MaskedImageModel.predict`.
        noise: (N, L) on the model's device, decides the masking; None draws it uniformly, the same
            in every call.

    Returns:
        The measures, on the CPU.

    Raises:
        ValueError: the model is not a CrossMAE, or the images or the noise do not fit it.
    """
    decoder = model.decoder
    if not isinstance(decoder, CrossAttentionDecoder):
        raise ValueError(
            "the features that decoder blocks read are weighted in a CrossMAE;"
            f" got a model of class {type(model).__name__}"
        )
    indices = decoder.feature_indices
    variances = []
    for part, part_noise in _batches(model, images, noise):
        visible = model.mask(part, part_noise).visible
        features = model.encoder.forward_tokens(model.normalize(part), visible)
        variances.append(
            torch.stack([features[i].var(dim=2, correction=0).mean(dim=1) for i in indices], dim=1)
        )
    return FeatureUsage(
        weights=decoder.feature_weights.detach().cpu(),
        deviation=torch.cat(variances).mean(dim=0).sqrt().cpu(),
        names=["input" if index == 0 else f"block {index - 1}" for index in indices],
        num_images=len(images),
    )


def _attention_received(qkv: Tensor, num_heads: int, queries: Tensor) -> Tensor:
    """How much attention each token gets, in the mean over heads and some queries.

    Args:
        qkv: (N, T, 3 * M * D), what :class:`Attention` projects its input to.
        num_heads: M.
        queries: (N, Q) int64 indices of the querying tokens.

    Returns:
        (N, T) probabilities; a row sums to 1.
    """
    q, k, _ = (by_head(part, num_heads) for part in qkv.chunk(3, dim=2))
    q = q.take_along_dim(queries[:, None, :, None], dim=2).flatten(0, 1)
    k = k.flatten(0, 1)
    # There are N M Q T weights: gigabytes for large images.
    size = max(1, MAX_WEIGHTS // (q.shape[1] * k.shape[1]))
    received = torch.cat(
        [
            (q_part @ k_part.mT / q.shape[2] ** 0.5).softmax(dim=2).mean(dim=1)
            for q_part, k_part in zip(q.split(size), k.split(size), strict=True)
        ]
    )
    return received.unflatten(0, (-1, num_heads)).mean(dim=1)


def _sum_by_group(weights: Tensor, masking: Masking) -> Tensor:
    """The attention that tokens get (N, T), summed by group: (N, 3), as in ``KEY_GROUPS``."""
    to_class, to_patches = weights[:, 0], weights[:, 1:]
    to_visible = to_patches.take_along_dim(masking.visible, dim=1).sum(dim=1)
    to_masked = to_patches.take_along_dim(masking.predicted, dim=1).sum(dim=1)
    return torch.stack([to_visible, to_masked, to_class], dim=1)


def _batches(
    model: MaskedImageModel, images: Tensor, noise: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of the images with their noise; without one, noise that is the same in every call."""
    if noise is None:
        noise = model.fixed_noise(images)
    return zip(images.split(BATCH_SIZE), noise.split(BATCH_SIZE), strict=True)


@contextmanager
def _outputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What the modules return while the context is open, in the order in which they run."""
    outputs: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        for module in modules
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _by_group(values: Tensor, summary: str) -> dict[str, Any]:
    """(depth, 3) as the values by decoder block and their "mean" or "sum", by group."""
    return {
        name: {"blocks": column.tolist(), summary: getattr(column, summary)().item()}
        for name, column in zip(KEY_GROUPS, values.T, strict=True)
    }
