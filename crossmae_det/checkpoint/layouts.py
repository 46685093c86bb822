"""Checkpoint layouts of a plain ViT: the tensor keys of each, and the mapping between them.

The native layout is ``encoder.*`` and ``decoder.*`` for pretraining models and backbones, and
``backbone.*`` with detectron2's other parts for detectors. The final norm of a ViT, which is not
part of the backbone, is ``decoder.encoder_norm`` as in MAE; a classifier's ``fc_norm`` and ``head``
keep their names. Values are never changed, so round trips are exact.

Legend: L patches, C channels, D blocks of a decoder.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crossmae_det.modeling import SIZES


@dataclass(frozen=True)
class Layout:
    """The keys of a layout in terms of the native ones.

    Attributes:
        title: for reports and messages.
        keys: key of the layout -> native key. A key that ends in a dot stands for all keys that
            start with it, and "" for all others. Of keys with the same native key, the last is
            written.
        block: the same for the part of a key after the block number; None if nothing differs.
    """

    title: str
    keys: Mapping[str, str]
    block: Mapping[str, str] | None = None

    def to_native(self, key: str) -> str | None:
        """The native key of a key of this layout, None if there is none."""
        return _rename(key, self.keys, self.block)

    def from_native(self, key: str) -> str | None:
        """The key of a native key in this layout, None if there is none."""
        block = None if self.block is None else {new: old for old, new in self.block.items()}
        return _rename(key, {new: old for old, new in self.keys.items()}, block)


def _rename(key: str, keys: Mapping[str, str], block: Mapping[str, str] | None) -> str | None:
    for old, new in keys.items():
        if key == old or (old[-1:] in (".", "") and key.startswith(old)):
            renamed = new + key.removeprefix(old)
            break
    else:
        return None
    if block is None or not (match := re.fullmatch(r"(.*(?:blocks|layers?)\.\d+\.)(.+)", renamed)):
        return renamed
    inside = _rename(match[2], block, None)
    return None if inside is None else match[1] + inside


BACKBONE = {
    "cls_token": "encoder.cls_token",
    "pos_embed": "encoder.pos_embed",
    "patch_embed.": "encoder.patch_embed.",
    "blocks.": "encoder.blocks.",
}
FINAL_NORM = {"norm.": "decoder.encoder_norm."}
DECODER = {
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.pos_embed",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.pred.",
}

LAYOUTS = {
    "crossmae": Layout(
        "published CrossMAE",
        {
            **BACKBONE,
            **DECODER,
            # Without weights between blocks, all decoder blocks read this norm of the last feature.
            **FINAL_NORM,
            "dec_norms.": "decoder.feature_norms.",
            "wfm.linear.weight": "decoder.feature_weights",
        },
        {"norm0.": "self_norm.", "": ""},
    ),
    "mae": Layout(
        "published MAE",
        {**BACKBONE, **DECODER, **FINAL_NORM, "decoder_embed.": "decoder.embed."},
    ),
    "timm": Layout(
        "timm ViT (as are MAE's encoder and its classifiers)",
        {**BACKBONE, **FINAL_NORM, **{f"{k}.": f"{k}." for k in ("fc_norm", "head", "attn_pool")}},
    ),
    "huggingface": Layout(
        "Hugging Face ViT or ViTMAE",
        {
            "vit.embeddings.cls_token": "encoder.cls_token",
            "vit.embeddings.position_embeddings": "encoder.pos_embed",
            "vit.embeddings.patch_embeddings.projection.": "encoder.patch_embed.proj.",
            "vit.layers.": "encoder.blocks.",
            "vit.encoder.layer.": "encoder.blocks.",
            "vit.layernorm.": "decoder.encoder_norm.",
            "vit.pooler.": "pooler.",
            "classifier.": "head.",
            "decoder.mask_token": "decoder.mask_token",
            "decoder.decoder_pos_embed": "decoder.pos_embed",
            "decoder.decoder_embed.": "decoder.embed.",
            # As transformers 5.24 writes it, then as in published files.
            "decoder.decoder_encoder.layer.": "decoder.blocks.",
            "decoder.decoder_layers.": "decoder.blocks.",
            "decoder.decoder_norm.": "decoder.norm.",
            "decoder.decoder_pred.": "decoder.pred.",
        },
        # With query, key and value joined: as transformers 5 has them in memory, then as in files.
        {
            "attention.qkv.": "attn.qkv.",
            "attention.o_proj.": "attn.proj.",
            "mlp.fc1.": "mlp.fc1.",
            "mlp.fc2.": "mlp.fc2.",
            "layernorm_before.": "norm1.",
            "attention.attention.qkv.": "attn.qkv.",
            "attention.output.dense.": "attn.proj.",
            "layernorm_after.": "norm2.",
            "intermediate.dense.": "mlp.fc1.",
            "output.dense.": "mlp.fc2.",
        },
    ),
    # Detectors have these keys here as well. The feature-map path has no class token.
    "vitdet": Layout(
        "detectron2 ViTDet, as are detectors here",
        {f"backbone.net.{k}": native for k, native in BACKBONE.items() if k != "cls_token"},
    ),
    "native": Layout("pretraining model of crossmae_det", {}),
}

# Native prefixes of a backbone.
BACKBONE_PREFIXES = ("encoder.", "backbone.net.", "backbone.")

# Keys of ViTs with another architecture than the backbone -> what they have in addition.
OTHER_NETWORKS = {
    r"reg_token$": "register tokens",
    r"(dist_token$|head_dist\.)": "a distillation token",
    r"norm_pre\.": "a norm before the first block",
    r"blocks\.\d+\.(ls[12]\.gamma|gamma_[12])$": "LayerScale",
    r"blocks\.\d+\.attn\.([qk]_norm\.|norm\.)": "norms inside the attention",
    r"blocks\.\d+\.mlp\.(norm\.|w12\.|fc1_[gx]\.)": "another MLP",
    r".*(relative_position|rel_pos_bias)": "BEiT's relative position",
}

RELATIVE_POSITION = re.compile(r"blocks\.\d+\.attn\.rel_pos_[hw]$")

# Number of dimensions of tensors that are used in computations, by the end of their native key.
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

# Hugging Face's separate tensors: in published files, and in the memory of transformers 5.
QUERY_KEY_VALUE = ("query", "key", "value")
PROJECTIONS = ("q_proj", "k_proj", "v_proj")

Predicate = Callable[[str], bool]


@dataclass
class Native:
    """Weights under native keys.

    Attributes:
        layout: the layout that the keys were recognized as, a key of :data:`LAYOUTS`.
        tensors: by native key.
        sources: native key -> source key, the key in the file.
        unexpected: source keys without a native key that the caller allowed.
    """

    layout: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)

    @property
    def backbone(self) -> str:
        """The prefix of the backbone's keys."""
        return backbone_prefix(self.tensors)


def backbone_prefix(native: Mapping[str, Tensor]) -> str:
    """The native prefix of the backbone's keys.

    Raises:
        ValueError: there is no backbone.
    """
    for prefix in BACKBONE_PREFIXES:
        if f"{prefix}patch_embed.proj.weight" in native:
            return prefix
    raise ValueError("there is no patch embedding")


def recognize(state_dict: Mapping[str, Tensor]) -> str:
    """The layout of a checkpoint, a key of :data:`LAYOUTS`, from its keys.

    Raises:
        ValueError: the layout is unknown.
    """
    if any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in state_dict):
        return "huggingface"
    if "encoder.patch_embed.proj.weight" in state_dict:
        return "native"
    if any(f"{prefix}patch_embed.proj.weight" in state_dict for prefix in BACKBONE_PREFIXES):
        return "vitdet"
    if "patch_embed.proj.weight" in state_dict:
        if any(key.startswith("decoder_blocks.") for key in state_dict):
            return "crossmae" if any(".cross_attn." in key for key in state_dict) else "mae"
        return "timm"
    known = ", ".join(layout.title for layout in LAYOUTS.values())
    raise ValueError(
        f"not a plain ViT: no patch embedding found (first key: '{next(iter(state_dict), '')}'):"
        f" known layouts are {known}"
    )


def to_native(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights to the native keys.

    Args:
        state_dict: weights in any layout of :data:`LAYOUTS`.

    Returns:
        The same values under native keys. Query, key and value become one tensor. A position
        embedding without a row for the class token gets a row of zeros.

    Raises:
        ValueError: the layout is unknown, or has no such key.
    """
    return translate(state_dict).tensors


def translate(state_dict: Mapping[str, Tensor], allowed: Predicate = lambda key: False) -> Native:
    """:func:`to_native`, with the source keys.

    Args:
        state_dict: weights in any layout of :data:`LAYOUTS`.
        allowed: whether a source key without a native key is left out instead of an error.

    Raises:
        ValueError: see :func:`to_native`.
    """
    native = Native(recognize(state_dict))
    layout = LAYOUTS[native.layout]
    is_foreign = native.layout not in ("native", "vitdet")
    tensors, prefix = dict(state_dict), ""
    if native.layout == "huggingface":
        tensors = _join_queries(state_dict)
        if any(key.startswith("embeddings.") for key in tensors):  # a ViT without a head or decoder
            prefix = "vit."
    for key, tensor in tensors.items():
        if is_foreign:
            new = layout.to_native(prefix + key)
            for pattern, feature in OTHER_NETWORKS.items():
                if re.match(pattern, key):
                    raise ValueError(
                        f"'{key}' {tuple(tensor.shape)} belongs to a ViT with {feature}, which is"
                        " another architecture: use a plain ViT"
                    )
        else:
            # Frameworks that call a ViT "backbone", as DINO does, have its final norm there.
            new = re.sub(r"^backbone\.norm\.", "decoder.encoder_norm.", key)
        if new in native.tensors:
            raise ValueError(f"'{key}' and '{native.sources[new]}' are the same tensor")
        if new is not None:
            native.tensors[new], native.sources[new] = tensor, key
        elif allowed(key):
            native.unexpected.append(key)
        else:
            raise ValueError(
                f"unexpected key '{key}' {tuple(tensor.shape)} for the layout {layout.title}:"
                f" --allow-unexpected '{key}' leaves it out"
            )
    _check_shapes(native)
    if native.layout == "crossmae":
        _spread_final_norm(native)
    position = native.tensors.get("encoder.pos_embed")
    if native.layout == "timm" and "encoder.cls_token" not in native.tensors:
        # Without a class token, timm's position embedding has no row for it. A backbone without a
        # norm or a head comes from detectron2 or the feature-map path, and has that row.
        is_backbone = all(key.startswith("encoder.") for key in native.tensors)
        if position is not None and not is_backbone:
            native.tensors["encoder.pos_embed"] = with_class_row(position)
    return native


def to_published(state_dict: Mapping[str, Tensor], format: str) -> dict[str, Tensor]:
    """Rename native weights to the keys of another layout.

    Args:
        state_dict: weights under native keys: of a pretraining model, a backbone or a detector.
        format: "crossmae", "mae", "timm", "huggingface" or "vitdet".

    Returns:
        The same values under the keys of that layout. Parts that it cannot represent are left out:
        the decoder for timm, everything but the backbone of a detector.

    Raises:
        ValueError: the layout is unknown, or has no such key.
    """
    return export(state_dict, format)[0]


def export(
    state_dict: Mapping[str, Tensor],
    format: str,
    allowed: Predicate = lambda key: False,
    may_lack: Predicate = lambda key: False,
) -> tuple[dict[str, Tensor], list[str]]:
    """:func:`to_published`, with the native keys of what was left out.

    Args:
        state_dict: weights under native keys.
        format: as in :func:`to_published`; "published" selects "crossmae" or "mae" by the decoder,
            or "timm" for a classifier, as MAE does; "native" changes nothing.
        allowed: whether a native key that the layout lacks is left out instead of an error.
        may_lack: whether a native key that the layout needs may be missing.
    """
    is_crossmae = "decoder.feature_weights" in state_dict
    if format == "published":
        is_classifier = any(key.startswith("head.") for key in state_dict)
        format = "crossmae" if is_crossmae else "timm" if is_classifier else "mae"
    if format not in LAYOUTS:
        raise ValueError(f"unknown layout '{format}': use {', '.join([*LAYOUTS, 'published'])}")
    prefix = backbone_prefix(state_dict)
    if format == "native" or (format == "vitdet" and prefix != "encoder."):
        return dict(state_dict), []
    state, dropped = dict(state_dict), []
    if prefix != "encoder.":
        # Only the backbone of a detector; the pyramid may have the same prefix.
        dropped = [key for key in state if not key.startswith(prefix)]
        backbone = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        state = {f"encoder.{k}": v for k, v in backbone.items() if not k.startswith("simfp_")}
    token, position = "encoder.cls_token", state.get("encoder.pos_embed")
    if format in ("crossmae", "mae", "huggingface") and not (token in state or may_lack(token)):
        raise ValueError(
            f"the layout {format} needs '{token}', which is missing: use timm, or leave it out with"
            f" --allow-missing '{token}'"
        )
    if position is not None and prefix != "encoder." and square_side(position) is None:
        raise ValueError(
            f"'{prefix}pos_embed' has {position.shape[1]} rows, not those of a square grid and a"
            " class token: convert it to native or vitdet"
        )
    if format == "timm" and token not in state and position is not None:
        state["encoder.pos_embed"] = position[:, 1:]
    if format == "crossmae":
        state = _gather_final_norm(state)
    has_decoder = format in ("crossmae", "mae") or (format == "huggingface" and not is_crossmae)
    result = {}
    for key, tensor in state.items():
        if format == "vitdet":
            left_out = not key.startswith("encoder.") or key == token
        else:
            left_out = not has_decoder and re.match(r"decoder\.(?!encoder_norm\.)", key) is not None
        new = None if left_out else LAYOUTS[format].from_native(key)
        if format != "vitdet" and RELATIVE_POSITION.search(key):
            new = None
        if new is not None:
            result[new] = tensor
        elif left_out or allowed(key):
            dropped.append(key)
        else:
            raise ValueError(
                f"the layout {format} has no key for '{key}' {tuple(tensor.shape)}:"
                f" --allow-unexpected '{key}' leaves it out"
            )
    return _split_queries(result) if format == "huggingface" else result, dropped


# Changes to tensors, beyond their keys


def _join_queries(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join query, key and value."""
    apart = re.compile(r"(.+\.attention)\.(query|key|value|[qkv]_proj)\.(weight|bias)")
    result = {}
    for key, tensor in state.items():
        match = apart.fullmatch(key)
        if match is None:
            result[key] = tensor
            continue
        stem, name, last = match.groups()
        names = PROJECTIONS if name in PROJECTIONS else QUERY_KEY_VALUE
        keys = [f"{stem}.{name}.{last}" for name in names]
        for other in keys:
            if other not in state:
                raise ValueError(f"'{key}' is present but '{other}' is missing")
            same = (state[other].shape, state[other].dtype) == (tensor.shape, tensor.dtype)
            if not same or not tensor.ndim:
                raise ValueError(
                    f"'{key}' {tuple(tensor.shape)} {tensor.dtype} does not match '{other}'"
                    f" {tuple(state[other].shape)} {state[other].dtype}"
                )
        if key == keys[0]:
            result[f"{stem}.qkv.{last}"] = torch.cat([state[other] for other in keys])
    return result


def _split_queries(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`_join_queries`."""
    result = {}
    for key, tensor in state.items():
        stem, joined, last = key.partition(".attention.attention.qkv.")
        if not joined:
            result[key] = tensor
            continue
        for name, part in zip(QUERY_KEY_VALUE, tensor.chunk(3), strict=True):
            result[f"{stem}.attention.attention.{name}.{last}"] = part
    return result


def _spread_final_norm(native: Native) -> None:
    """Give weights to a CrossMAE without any, whose decoder blocks all read the last feature.

    The weights are ones (D, 1), and the final norm becomes that of every decoder block.
    """
    tensors, sources = native.tensors, native.sources
    if "decoder.feature_weights" in tensors or "decoder.encoder_norm.weight" not in tensors:
        return
    matches = (re.match(r"decoder\.blocks\.(\d{1,4})\.", key) for key in tensors)
    blocks = {int(match[1]) for match in matches if match}
    depth = len(blocks)
    if blocks != set(range(depth)):
        raise ValueError(f"the decoder blocks are not numbered from 0: {sorted(blocks)[:5]}")
    tensors["decoder.feature_weights"] = torch.ones(depth, 1)
    sources["decoder.feature_weights"] = "decoder_blocks"
    for last in ("weight", "bias"):
        norm = f"decoder.encoder_norm.{last}"
        if norm not in tensors:
            raise ValueError(f"'norm.weight' is present but 'norm.{last}' is missing")
        tensor, source = tensors.pop(norm), sources.pop(norm)
        for block in range(depth):
            key = f"decoder.feature_norms.{block}.{last}"
            tensors[key], sources[key] = tensor, source


def _gather_final_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`_spread_final_norm`, if the weights have that form."""
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


def _check_shapes(native: Native) -> None:
    """Reject tensors whose dimensions do not fit their keys, before computing with them."""
    for key, tensor in native.tensors.items():
        for ending, dimensions in DIMENSIONS.items():
            if key.endswith(ending) and (tensor.ndim != dimensions or 0 in tensor.shape):
                raise ValueError(
                    f"'{native.sources[key]}' is {tuple(tensor.shape)}: expected {dimensions}"
                    " dimensions, none of them 0"
                )


# Sizes


def square_side(position: Tensor) -> int | None:
    """The side of the grid of a position embedding (1, 1 + L, C), None if it is not square."""
    side = math.isqrt(max(0, position.shape[1] - 1))
    return side if side and side * side == position.shape[1] - 1 else None


def with_class_row(position: Tensor) -> Tensor:
    """Prepend a row of zeros for the class token to a position embedding (1, L, C)."""
    return torch.cat([torch.zeros_like(position[:, :1]), position], dim=1)


def depth_of(keys: Iterable[str], stem: str) -> int:
    """The number of blocks below ``stem``."""
    pattern = re.compile(rf"{re.escape(stem)}\.(\d+)\.")
    return 1 + max((int(match[1]) for key in keys if (match := pattern.match(key))), default=-1)


def size_of(embed_dim: int, depth: int) -> str | None:
    """The name of the ViT size with this width and depth, None if there is none."""
    sizes = (n for n, size in SIZES.items() if (size.embed_dim, size.depth) == (embed_dim, depth))
    return next(sizes, None)


def describe_backbone(state: Mapping[str, Tensor], prefix: str = "") -> str:
    """The size of a backbone for a message; ``prefix`` is that of its native keys."""
    kernel = state.get(f"{prefix}patch_embed.proj.weight")
    width = len(kernel) if kernel is not None else 0
    depth = depth_of(state, f"{prefix}blocks")
    name = size_of(width, depth)
    return f"{f'ViT-{name[0].upper()}, ' if name else ''}{width} wide with {depth} blocks"
