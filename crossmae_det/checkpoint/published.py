"""Key maps between published pretraining files and this project's pretraining models.

Only names change: a tensor is handed on as it is, so a round trip is exact.
"""

from collections.abc import Mapping

from torch import Tensor

# Published name -> native name. A name that ends in a dot stands for everything below it.
TRUNK = {
    "cls_token": "encoder.cls_token",
    "pos_embed": "encoder.pos_embed",
    "patch_embed.": "encoder.patch_embed.",
    "blocks.": "encoder.blocks.",
}
DECODER = {
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.pos_embed",
    # Below it both have the same names: norm1, cross_attn.q|kv|proj (CrossMAE) or attn.qkv|proj
    # (MAE), norm2, mlp.fc1|fc2; the ablation's self_norm and self_attn are passed on likewise.
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.pred.",
}
FORMATS = {
    "crossmae": {
        **TRUNK,
        **DECODER,
        "dec_norms.": "decoder.feature_norms.",
        "wfm.linear.weight": "decoder.feature_weights",
    },
    "mae": {
        **TRUNK,
        **DECODER,
        # The final norm of MAE's encoder: the trunk has none.
        "norm.": "decoder.encoder_norm.",
        "decoder_embed.": "decoder.embed.",
    },
}


def to_native(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a published file to the keys of CrossMAE and MAE here.

    The format is recognised from the keys: CrossMAE's, or MAE's; of either also the encoder alone.

    Args:
        state_dict: published weights: what such a file holds under "model".

    Returns:
        The same tensors as ``encoder.*`` and ``decoder.*``.

    Raises:
        ValueError: the keys are those of no known format.
    """
    if "patch_embed.proj.weight" not in state_dict:
        raise ValueError(
            f"no published {' or '.join(FORMATS)} checkpoint: it has no patch embedding"
        )
    strangers = []
    for names in FORMATS.values():
        renamed = {key: _rename(key, names) for key in state_dict}
        unknown = [key for key, new in renamed.items() if new is None]
        if not unknown:
            return {new: state_dict[key] for key, new in renamed.items() if new is not None}
        strangers.append(unknown)
    # The format that comes nearest tells best what is wrong.
    stranger = min(strangers, key=len)[0]
    raise ValueError(
        f"no published {' or '.join(FORMATS)} checkpoint: neither has a place for '{stranger}'"
    )


def to_published(state_dict: Mapping[str, Tensor], format: str) -> dict[str, Tensor]:
    """Rename the weights of a CrossMAE or MAE model to the keys of the published files.

    Args:
        state_dict: weights of a pretraining model: ``encoder.*``, with or without ``decoder.*``.
        format: "crossmae" or "mae".

    Returns:
        The same tensors under published keys: what such a file holds under "model".

    Raises:
        ValueError: there is no such format, or it has no place for a key.
    """
    if format not in FORMATS:
        raise ValueError(f"there is no checkpoint format '{format}'; take {' or '.join(FORMATS)}")
    names = {native: published for published, native in FORMATS[format].items()}
    result = {}
    for key, tensor in state_dict.items():
        new = _rename(key, names)
        if new is None:
            raise ValueError(f"the format {format} has no place for '{key}'")
        result[new] = tensor
    return result


def _rename(key: str, names: Mapping[str, str]) -> str | None:
    """The new name of a key, None when it has none."""
    for old, new in names.items():
        if key == old or (old.endswith(".") and key.startswith(old)):
            return new + key.removeprefix(old)
    return None
