"""What layouts of checkpoints do to tensors beside naming them. Numbers are never changed.

Legend: L patches, C channels, D blocks of a decoder.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Hugging Face's attention keeps apart what is one tensor everywhere else: names of published files,
# and of transformers 5 in memory.
QUERY_KEY_VALUE = ("query", "key", "value")
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
APART = re.compile(
    r"(?P<stem>.+\.attention)\.(?P<name>query|key|value|[qkv]_proj)\.(?P<last>weight|bias)"
)

# Of what is computed with, by the end of its native name.
DIMENSIONS = {
    "patch_embed.proj.weight": 4,
    "pos_embed": 3,
    "cls_token": 3,
    "mask_token": 3,
    "rel_pos_h": 2,
    "rel_pos_w": 2,
    "attn.qkv.weight": 2,
    "attn.qkv.bias": 1,
    "mlp.fc1.weight": 2,
    "decoder.feature_weights": 2,
    "encoder_norm.weight": 1,
    "encoder_norm.bias": 1,
}


def join_queries(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value as one tensor; names of a model without its decoder as with it.

    Raises:
        ValueError: one of three is missing, or of another shape.
    """
    if "embeddings.cls_token" in state or "embeddings.position_embeddings" in state:
        state = {f"vit.{key}": tensor for key, tensor in state.items()}
    result = {}
    for key, tensor in state.items():
        match = APART.fullmatch(key)
        if match is None:
            result[key] = tensor
            continue
        three = PROJECTIONS if match["name"] in PROJECTIONS else QUERY_KEY_VALUE
        names = [f"{match['stem']}.{name}.{match['last']}" for name in three]
        for name in names:
            if name not in state:
                raise ValueError(f"it has '{key}' but no '{name}'")
            other = state[name]
            if (other.shape, other.dtype) != (tensor.shape, tensor.dtype) or not tensor.ndim:
                raise ValueError(
                    f"'{key}' is {tuple(tensor.shape)} of {tensor.dtype} and '{name}'"
                    f" {tuple(other.shape)} of {other.dtype}"
                )
        if key == names[0]:
            joined = torch.cat([state[name] for name in names])
            result[f"{match['stem']}.qkv.{match['last']}"] = joined
    return result


def split_queries(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`join_queries`."""
    result = {}
    for key, tensor in state.items():
        stem, joined, last = key.partition(".attention.attention.qkv.")
        if not joined:
            result[key] = tensor
            continue
        for name, part in zip(QUERY_KEY_VALUE, tensor.chunk(3), strict=True):
            result[f"{stem}.attention.attention.{name}.{last}"] = part
    return result


def spread_final_norm(tensors: dict[str, Tensor], sources: dict[str, str]) -> None:
    """CrossMAE without weights between blocks, as one with them: each block reads the last feature.

    The one norm becomes that of every block, and every weight is 1.

    Args:
        tensors: weights by native name, changed in place.
        sources: native name -> name in the file, changed likewise.

    Raises:
        ValueError: the norm has no bias.
    """
    if "decoder.feature_weights" in tensors or "decoder.encoder_norm.weight" not in tensors:
        return
    matches = (re.match(r"decoder\.blocks\.(\d{1,4})\.", key) for key in tensors)
    blocks = {int(match[1]) for match in matches if match}
    depth = len(blocks)
    if blocks != set(range(depth)):
        raise ValueError(f"the blocks of its decoder are not numbered from 0: {sorted(blocks)[:5]}")
    tensors["decoder.feature_weights"] = torch.ones(depth, 1)
    sources["decoder.feature_weights"] = "decoder_blocks"
    for last in ("weight", "bias"):
        norm = f"decoder.encoder_norm.{last}"
        if norm not in tensors:
            raise ValueError(f"it has 'norm.weight' but no 'norm.{last}'")
        for block in range(depth):
            tensors[f"decoder.feature_norms.{block}.{last}"] = tensors[norm]
            sources[f"decoder.feature_norms.{block}.{last}"] = sources[norm]
        del tensors[norm], sources[norm]


def gather_final_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`spread_final_norm`, where that is what a state dict comes from."""
    weights = state.get("decoder.feature_weights")
    if weights is None or weights.shape[1:] != (1,) or not (weights == 1).all():
        return state
    norms = {key: tensor for key, tensor in state.items() if ".feature_norms." in key}
    one = {key.rpartition(".")[2]: tensor for key, tensor in norms.items()}
    if not all(torch.equal(tensor, one[key.rpartition(".")[2]]) for key, tensor in norms.items()):
        return state
    result = {key: tensor for key, tensor in state.items() if key not in norms}
    del result["decoder.feature_weights"]
    return result | {f"decoder.encoder_norm.{last}": tensor for last, tensor in one.items()}


def square_side(position: Tensor) -> int | None:
    """The side of the grid of a position embedding (1, 1 + L, C); None where it is no square."""
    side = math.isqrt(max(0, position.shape[1] - 1))
    return side if side and side * side == position.shape[1] - 1 else None


def with_class_row(position: Tensor) -> Tensor:
    """A position embedding (1, 1 + L, C) from one of (1, L, C): the class token's row is zeros."""
    return torch.cat([torch.zeros_like(position[:, :1]), position], dim=1)


def check_shapes(trunk: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Refuse tensors that are not what their names say, before anything is computed with them.

    Args:
        trunk: weights by native name.
        names: native name -> name in the file.

    Raises:
        ValueError: another number of dimensions, or a side of 0.
    """
    for name, tensor in trunk.items():
        for ending, dimensions in DIMENSIONS.items():
            if name.endswith(ending) and (tensor.ndim != dimensions or 0 in tensor.shape):
                raise ValueError(
                    f"'{names[name]}' is {tuple(tensor.shape)}, where {dimensions} dimensions are"
                    " usual"
                )
