"""Names of the tensors of a plain ViT, in every layout of checkpoints."""

import re
from collections.abc import Mapping

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
        **TRUNK,
        **DECODER,
        # Without weights between blocks, every decoder block reads this norm of the last feature.
        **FINAL_NORM,
        "dec_norms.": "decoder.feature_norms.",
        "wfm.linear.weight": "decoder.feature_weights",
    },
    "mae": {**TRUNK, **DECODER, **FINAL_NORM, "decoder_embed.": "decoder.embed."},
    "timm": {**TRUNK, **FINAL_NORM, **CLASSIFIER},
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
# Native prefixes of a trunk.
TRUNK_PREFIXES = ("encoder.", "backbone.net.", "backbone.")
# What ViTs of other kinds have, for which the trunk has no place.
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
