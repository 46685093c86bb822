"""Names of the tensors of a plain ViT, in every layout of checkpoints.

What layouts of checkpoints do to tensors beside naming them. Numbers are never changed.

Legend: L patches, C channels, D blocks of a decoder.

Checkpoints of others under the names here, and ours under theirs.

The native layout is ``encoder.*`` and ``decoder.*`` for pretraining models and for backbones, and
``backbone.*`` and the parts of detectron2 for detectors. The final norm of a ViT, which the
backbone has not, is ``decoder.encoder_norm`` as in MAE; a classifier's ``fc_norm`` and ``head``
keep their names. Numbers are never changed, so a round trip is exact.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crossmae_det.modeling import SIZES

# Published name -> native name. A name that ends in a dot stands for everything below it.
BACKBONE = {
    "cls_token": "encoder.cls_token",
    "pos_embed": "encoder.pos_embed",
    "patch_embed.": "encoder.patch_embed.",
    "blocks.": "encoder.blocks.",
}

DECODER = {
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.pos_embed",
    # Below it both have the same names: norm1, cross_attn.q|kv|proj (CrossMAE) or attn.qkv|proj
    # (MAE), norm2, mlp.fc1|fc2, self_attn (CrossMAE's ablation), but for the norm before that one:
    # see `rename_self_norm`.
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.pred.",
}

FINAL_NORM = {"norm.": "decoder.encoder_norm."}

CLASSIFIER = {name: name for name in ("fc_norm.", "head.", "attn_pool.")}

FORMATS = {
    "crossmae": {
        **BACKBONE,
        **DECODER,
        # Without weights between blocks, every decoder block reads this norm of the last feature.
        **FINAL_NORM,
        "dec_norms.": "decoder.feature_norms.",
        "wfm.linear.weight": "decoder.feature_weights",
    },
    "mae": {**BACKBONE, **DECODER, **FINAL_NORM, "decoder_embed.": "decoder.embed."},
    "timm": {**BACKBONE, **FINAL_NORM, **CLASSIFIER},
    "huggingface": {
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
        # As transformers 5.24 writes it, and as published files have it.
        "decoder.decoder_encoder.layer.": "decoder.blocks.",
        "decoder.decoder_layers.": "decoder.blocks.",
        "decoder.decoder_norm.": "decoder.norm.",
        "decoder.decoder_pred.": "decoder.pred.",
    },
}

TITLES = {
    "crossmae": "published CrossMAE",
    "mae": "published MAE",
    "timm": "timm ViT (as are MAE's encoder and its classifiers)",
    "huggingface": "Hugging Face ViT or ViTMAE",
    "vitdet": "detectron2 ViTDet, as are detectors here",
    "native": "pretraining model of crossmae_det",
}

# Inside a block, Hugging Face's names, with query, key and value joined: those that transformers 5
# has in memory, then those of published files, which are also what is written.
HUGGINGFACE_BLOCK = {
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
}

# Native prefixes of a backbone.
BACKBONE_PREFIXES = ("encoder.", "backbone.net.", "backbone.")

# What ViTs of other kinds have, for which the backbone has no place.
OTHER_KINDS = {
    r"reg_token$": "register tokens",
    r"(dist_token$|head_dist\.)": "a distillation token",
    r"norm_pre\.": "a norm before the first block",
    r"blocks\.\d+\.(ls[12]\.gamma|gamma_[12])$": "LayerScale",
    r"blocks\.\d+\.attn\.([qk]_norm\.|norm\.)": "norms inside the attention",
    r"blocks\.\d+\.mlp\.(norm\.|w12\.|fc1_[gx]\.)": "another MLP",
    r".*(relative_position|rel_pos_bias)": "BEiT's relative position",
}

RELATIVE_POSITION = re.compile(r"blocks\.\d+\.attn\.rel_pos_[hw]$")

# Buffers that detectron2 no longer saves; nothing is learnt in them.
OLD_BUFFERS = re.compile(
    r"pixel_(mean|std)$|proposal_generator\.anchor_generator\.cell_anchors\.\d+$"
)


def rename(key: str, names: Mapping[str, str]) -> str | None:
    """The new name of a key, None when it has none."""
    for old, new in names.items():
        if key == old or (old.endswith(".") and key.startswith(old)):
            return new + key.removeprefix(old)
    return None


def rename_self_norm(key: str, old: str, new: str) -> str:
    """A key with the norm before a decoder block's self-attention called ``new``, not ``old``.

    It is "norm0" in published CrossMAE files and "self_norm" here.
    """
    return re.sub(rf"(decoder[._]blocks\.\d+)\.{old}\.", rf"\1.{new}.", key)


def rename_block(key: str, names: Mapping[str, str], inside: Mapping[str, str]) -> str | None:
    """As :func:`rename`, where what follows the number of a block has other names, too."""
    new = rename(key, names)
    match = re.fullmatch(r"(.*blocks\.\d+\.|.*layers?\.\d+\.)(.+)", new or "")
    if match is None:
        return new
    below = rename(match[2], inside)
    return None if below is None else match[1] + below


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


def check_shapes(backbone: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Refuse tensors that are not what their names say, before anything is computed with them.

    Args:
        backbone: weights by native name.
        names: native name -> name in the file.

    Raises:
        ValueError: another number of dimensions, or a side of 0.
    """
    for name, tensor in backbone.items():
        for ending, dimensions in DIMENSIONS.items():
            if name.endswith(ending) and (tensor.ndim != dimensions or 0 in tensor.shape):
                raise ValueError(
                    f"'{names[name]}' is {tuple(tensor.shape)}, where {dimensions} dimensions are"
                    " usual"
                )


Allowed = Callable[[str], bool]


@dataclass
class Native:
    """Weights under native names.

    Attributes:
        layout: the layout that the names were recognized as, a key of :data:`TITLES`.
        tensors: by native name.
        sources: native name -> name in the file.
        unexpected: names in the file that have no place, and were allowed to.
    """

    layout: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)

    @property
    def backbone(self) -> str:
        """The prefix of the backbone's names."""
        return backbone_prefix(self.tensors)


def backbone_prefix(native: Mapping[str, Tensor]) -> str:
    """The native prefix of the backbone's names.

    Raises:
        ValueError: there is no backbone.
    """
    for prefix in BACKBONE_PREFIXES:
        if f"{prefix}patch_embed.proj.weight" in native:
            return prefix
    raise ValueError("it has no patch embedding")


def recognize(state_dict: Mapping[str, Tensor]) -> str:
    """The layout of a checkpoint, from its keys: a key of :data:`TITLES`.

    Raises:
        ValueError: it is none that is known.
    """
    if any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in state_dict):
        return "huggingface"
    if "encoder.patch_embed.proj.weight" in state_dict:
        return "native"
    if any(f"{prefix}patch_embed.proj.weight" in state_dict for prefix in BACKBONE_PREFIXES):
        return "vitdet"
    if "patch_embed.proj.weight" in state_dict:
        if any(key.startswith("decoder_blocks.") for key in state_dict):
            cross = any(".cross_attn." in key for key in state_dict)
            return "crossmae" if cross else "mae"
        return "timm"
    first = next(iter(state_dict), "")
    raise ValueError(
        f"no checkpoint of a plain ViT: it has no patch embedding (its first name is '{first}');"
        f" known are {', '.join(TITLES.values())}"
    )


def to_native(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights to the native keys, whatever their layout.

    Args:
        state_dict: weights in any layout of :data:`TITLES`.

    Returns:
        The same numbers under native keys. Where a layout has three tensors for one, they are
        joined; a position embedding without a row for the class token gets one, of zeros.

    Raises:
        ValueError: the keys are those of no known layout, or one has no place here.
    """
    return translate(state_dict).tensors


def translate(state_dict: Mapping[str, Tensor], allowed: Allowed = lambda key: False) -> Native:
    """As :func:`to_native`, and with what became of every name.

    Args:
        state_dict: weights in any layout of :data:`TITLES`.
        allowed: tells of a name that it may be left out where it has no place.

    Raises:
        ValueError: see :func:`to_native`.
    """
    native = Native(recognize(state_dict))
    tensors = dict(state_dict)
    if native.layout == "huggingface":
        tensors = join_queries(tensors)
    for key, tensor in tensors.items():
        reason = None
        if native.layout in ("native", "vitdet"):
            # Frameworks that call a ViT "backbone", as DINO does, have its final norm there.
            new: str | None = re.sub(r"^backbone\.norm\.", "decoder.encoder_norm.", key)
        elif native.layout == "huggingface":
            new = rename_block(key, FORMATS["huggingface"], HUGGINGFACE_BLOCK)
        else:
            published = key
            if native.layout == "crossmae":
                published = rename_self_norm(key, "norm0", "self_norm")
            new = rename(published, FORMATS[native.layout])
            reason = next((kind for name, kind in OTHER_KINDS.items() if re.match(name, key)), None)
        if new in native.tensors:
            raise ValueError(f"'{key}' and '{native.sources[new]}' are the same tensor")
        if new is not None and reason is None:
            native.tensors[new] = tensor
            native.sources[new] = key
        elif reason is None and allowed(key):
            native.unexpected.append(key)
        else:
            advice = (
                f"it is a ViT with {reason}, another network: take a plain one"
                if reason
                else f"--allow-unexpected '{key}' leaves it out"
            )
            raise ValueError(
                f"taken for {TITLES[native.layout]}, which has no place for '{key}'"
                f" {tuple(tensor.shape)} here; {advice}"
            )
    check_shapes(native.tensors, native.sources)
    if native.layout == "crossmae":
        spread_final_norm(native.tensors, native.sources)
    if native.layout == "timm" and "encoder.cls_token" not in native.tensors:
        # timm's position embedding has no row for it, then. That of detectron2's backbones and ours
        # has: they are a backbone and nothing else, without a norm or a head.
        position = native.tensors.get("encoder.pos_embed")
        is_backbone = all(name.startswith("encoder.") for name in native.tensors)
        if position is not None and not is_backbone:
            native.tensors["encoder.pos_embed"] = with_class_row(position)
    if native.layout == "huggingface":
        # As the file has them, where it is of a model without a decoder.
        bare = {name: key.removeprefix("vit.") for name, key in native.sources.items()}
        native.sources |= {name: key for name, key in bare.items() if key in state_dict}
    return native


def to_published(state_dict: Mapping[str, Tensor], format: str) -> dict[str, Tensor]:
    """Rename the weights of a native model to the keys of others.

    Args:
        state_dict: weights under native keys: of a pretraining model, a backbone or a detector.
        format: "crossmae", "mae", "timm", "huggingface" or "vitdet".

    Returns:
        The same numbers under the keys of that layout. What it has no place for by its nature is
        left out: a decoder from timm's, what is beside the backbone from a detector.

    Raises:
        ValueError: there is no such format, or it has no place for a key.
    """
    return export(state_dict, format)[0]


def export(
    state_dict: Mapping[str, Tensor],
    format: str,
    allowed: Allowed = lambda key: False,
    may_lack: Allowed = lambda key: False,
) -> tuple[dict[str, Tensor], list[str]]:
    """As :func:`to_published`, and the native names of what was left out.

    Args:
        state_dict: weights under native keys.
        format: see :func:`to_published`; "published" is "crossmae" or "mae", by the decoder, and
            "timm", whose names MAE has for these, of a classifier; "native" leaves all as it is.
        allowed: tells of a native name that it may be left out where it has no place.
        may_lack: tells of a native name that the layout needs that it may be missing.
    """
    if format == "published":
        format = _published_format(state_dict)
    if format not in TITLES:
        raise ValueError(
            f"there is no checkpoint format '{format}'; take {', '.join([*TITLES, 'published'])}"
        )
    prefix = backbone_prefix(state_dict)
    if format == "native" or (format == "vitdet" and prefix != "encoder."):
        return dict(state_dict), []
    state, dropped = _backbone_and_decoder(state_dict, prefix)
    token = "encoder.cls_token"
    if format in ("crossmae", "mae", "huggingface") and not (token in state or may_lack(token)):
        raise ValueError(
            f"the format {format} needs '{token}', and there is none; take timm, or leave it out"
            f" with --allow-missing '{token}'"
        )
    position = state.get("encoder.pos_embed")
    if position is not None and prefix != "encoder." and square_side(position) is None:
        raise ValueError(
            f"its position embedding has {position.shape[1]} rows, which are no square grid and a"
            " class token's"
        )
    if format == "timm" and token not in state and position is not None:
        state["encoder.pos_embed"] = position[:, 1:]
    if format == "crossmae":
        state = gather_final_norm(state)
    new_name = _exporter(format)
    result = {}
    for key, tensor in state.items():
        left_out = _left_out(format, state, key)
        new = None if left_out else new_name(key)
        if new is not None:
            result[new] = tensor
        elif left_out or allowed(key):
            dropped.append(key)
        else:
            raise ValueError(
                f"the format {format} has no place for '{key}' {tuple(tensor.shape)};"
                f" --allow-unexpected '{key}' leaves it out"
            )
    return split_queries(result) if format == "huggingface" else result, dropped


def _exporter(format: str) -> Callable[[str], str | None]:
    """Native name -> name in a format, or None."""
    if format == "vitdet":
        # But for the class token, which map mode has not.
        backbone = {
            native: f"backbone.net.{name}"
            for name, native in BACKBONE.items()
            if name != "cls_token"
        }
        return lambda key: rename(key, backbone)
    names = {native: published for published, native in FORMATS[format].items()}
    inside = {native: published for published, native in HUGGINGFACE_BLOCK.items()}

    def new_name(key: str) -> str | None:
        if RELATIVE_POSITION.search(key):
            return None
        if format == "huggingface":
            return rename_block(key, names, inside)
        if format == "crossmae":
            key = rename_self_norm(key, "self_norm", "norm0")
        return rename(key, names)

    return new_name


def _published_format(state_dict: Mapping[str, Tensor]) -> str:
    if "decoder.feature_weights" in state_dict:
        return "crossmae"
    return "timm" if any(key.startswith("head.") for key in state_dict) else "mae"


def _backbone_and_decoder(
    state_dict: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The parts of a pretraining model or a classifier; of a detector, its backbone."""
    if prefix == "encoder.":
        return dict(state_dict), []
    backbone = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
    # A bare backbone has its pyramid below the same prefix.
    inside = {f"encoder.{key.removeprefix(prefix)}": value for key, value in backbone.items()}
    kept = {key: value for key, value in inside.items() if not key.startswith("encoder.simfp_")}
    return kept, [key for key in state_dict if key not in backbone]


def _left_out(format: str, state: Mapping[str, Tensor], key: str) -> bool:
    """Whether a key is left out of a format as a matter of course."""
    if format == "vitdet":
        return not key.startswith("encoder.") or key == "encoder.cls_token"
    is_crossmae = "decoder.feature_weights" in state
    has_none = format == "timm" or (format == "huggingface" and is_crossmae)
    is_norm = key.startswith("decoder.encoder_norm.")
    return has_none and key.startswith("decoder.") and not is_norm


def describe_backbone(state: Mapping[str, Tensor], prefix: str = "") -> str:
    """The sizes of a backbone in a few words.

    Args:
        state: weights under native keys.
        prefix: of the backbone's names.
    """
    kernel = state.get(f"{prefix}patch_embed.proj.weight")
    width = len(kernel) if kernel is not None else 0
    depth = depth_of(state, f"{prefix}blocks")
    name = size_of(width, depth)
    return f"{f'ViT-{name[0].upper()}, ' if name else ''}{width} wide with {depth} blocks"


def depth_of(names: Iterable[str], stem: str) -> int:
    pattern = re.compile(rf"{re.escape(stem)}\.(\d+)\.")
    return 1 + max((int(match[1]) for name in names if (match := pattern.match(name))), default=-1)


def size_of(width: int, depth: int) -> str | None:
    fitting = (n for n, size in SIZES.items() if (size.embed_dim, size.depth) == (width, depth))
    return next(fitting, None)
