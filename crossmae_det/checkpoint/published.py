"""Checkpoints of others under the names here, and ours under theirs.

The native layout is ``encoder.*`` and ``decoder.*`` for pretraining models and for trunks, and
``backbone.*`` and the parts of detectron2 for detectors. The final norm of a ViT, which the trunk
has not, is ``decoder.encoder_norm`` as in MAE; a classifier's ``fc_norm`` and ``head`` keep their
names. Numbers are never changed, so a round trip is exact.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from crossmae_det.checkpoint.names import (
    FORMATS,
    HUGGINGFACE_BLOCK,
    OTHER_KINDS,
    RELATIVE_POSITION,
    TITLES,
    TRUNK,
    TRUNK_PREFIXES,
    rename,
    rename_block,
    rename_self_norm,
)
from crossmae_det.checkpoint.structure import (
    check_shapes,
    gather_final_norm,
    join_queries,
    split_queries,
    spread_final_norm,
    square_side,
    with_class_row,
)

Allowed = Callable[[str], bool]


@dataclass
class Native:
    """Weights under native names.

    Attributes:
        layout: the layout that the names were recognised as, a key of :data:`TITLES`.
        tensors: by native name.
        sources: native name -> name in the file.
        unexpected: names in the file that have no place, and were allowed to.
    """

    layout: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)

    @property
    def trunk(self) -> str:
        """The prefix of the trunk's names."""
        return trunk_prefix(self.tensors)


def trunk_prefix(native: Mapping[str, Tensor]) -> str:
    """The native prefix of the trunk's names.

    Raises:
        ValueError: there is no trunk.
    """
    for prefix in TRUNK_PREFIXES:
        if f"{prefix}patch_embed.proj.weight" in native:
            return prefix
    raise ValueError("it has no patch embedding")


def recognise(state_dict: Mapping[str, Tensor]) -> str:
    """The layout of a checkpoint, from its keys: a key of :data:`TITLES`.

    Raises:
        ValueError: it is none that is known.
    """
    if any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in state_dict):
        return "huggingface"
    if "encoder.patch_embed.proj.weight" in state_dict:
        return "native"
    if any(f"{prefix}patch_embed.proj.weight" in state_dict for prefix in TRUNK_PREFIXES):
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
    native = Native(recognise(state_dict))
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
        # timm's position embedding has no row for it, then. That of detectron2's trunks and ours
        # has: they are a trunk and nothing else, without a norm or a head.
        position = native.tensors.get("encoder.pos_embed")
        is_trunk = all(name.startswith("encoder.") for name in native.tensors)
        if position is not None and not is_trunk:
            native.tensors["encoder.pos_embed"] = with_class_row(position)
    if native.layout == "huggingface":
        # As the file has them, where it is of a model without a decoder.
        bare = {name: key.removeprefix("vit.") for name, key in native.sources.items()}
        native.sources |= {name: key for name, key in bare.items() if key in state_dict}
    return native


def to_published(state_dict: Mapping[str, Tensor], format: str) -> dict[str, Tensor]:
    """Rename the weights of a native model to the keys of others.

    Args:
        state_dict: weights under native keys: of a pretraining model, a trunk or a detector.
        format: "crossmae", "mae", "timm", "huggingface" or "vitdet".

    Returns:
        The same numbers under the keys of that layout. What it has no place for by its nature is
        left out: a decoder from timm's, what is beside the trunk from a detector.

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
    prefix = trunk_prefix(state_dict)
    if format == "native" or (format == "vitdet" and prefix != "encoder."):
        return dict(state_dict), []
    state, dropped = _trunk_and_decoder(state_dict, prefix)
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
        trunk = {
            native: f"backbone.net.{name}" for name, native in TRUNK.items() if name != "cls_token"
        }
        return lambda key: rename(key, trunk)
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


def _trunk_and_decoder(
    state_dict: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The parts of a pretraining model or a classifier; of a detector, its trunk."""
    if prefix == "encoder.":
        return dict(state_dict), []
    trunk = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
    # A bare backbone has its pyramid below the same prefix.
    inside = {f"encoder.{key.removeprefix(prefix)}": value for key, value in trunk.items()}
    kept = {key: value for key, value in inside.items() if not key.startswith("encoder.simfp_")}
    return kept, [key for key in state_dict if key not in trunk]


def _left_out(format: str, state: Mapping[str, Tensor], key: str) -> bool:
    """Whether a key is left out of a format as a matter of course."""
    if format == "vitdet":
        return not key.startswith("encoder.") or key == "encoder.cls_token"
    is_crossmae = "decoder.feature_weights" in state
    has_none = format == "timm" or (format == "huggingface" and is_crossmae)
    is_norm = key.startswith("decoder.encoder_norm.")
    return has_none and key.startswith("decoder.") and not is_norm
