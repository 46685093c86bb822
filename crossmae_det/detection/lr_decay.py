"""Layer-wise learning-rate decay for a model that contains the backbone."""

import re
from typing import Any

from detectron2.layers.batch_norm import LayerNorm as ChannelLayerNorm
from torch import nn

from crossmae_det.modeling import ViT

# Norms that detectron2's `get_default_optimizer_params` knows. Its own `LayerNorm` over channels,
# in pyramids and heads, is none of them.
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def find_backbone(model: nn.Module) -> tuple[str, ViT]:
    """The name and the module of the one ViT inside ``model``.

    Raises:
        ValueError: there is none, or more than one.
    """
    backbones = [
        (name, module) for name, module in model.named_modules() if isinstance(module, ViT)
    ]
    if len(backbones) != 1:
        raise ValueError(
            f"expected one ViT backbone in {type(model).__name__}, found {len(backbones)}"
        )
    return backbones[0]


def layer_index(name: str, backbone_name: str, depth: int) -> int:
    """Layer of a parameter: 0 for the embeddings, 1 to ``depth`` for the blocks, then the rest.

    Args:
        name: full name of the parameter in the model.
        backbone_name: name of the backbone in the model, "" when it is the model itself.
        depth: number of blocks of the backbone.
    """
    prefix = f"{backbone_name}." if backbone_name else ""
    if name.startswith(prefix):
        inside = name[len(prefix) :]
        if block := re.match(r"blocks\.(\d+)\.", inside):
            return int(block[1]) + 1
        if inside.startswith(("patch_embed.", "pos_embed", "cls_token")):
            return 0
    return depth + 1


def layer_decay_param_groups(
    model: nn.Module,
    base_lr: float,
    lr_decay: float = 1.0,
    backbone_lr_factor: float = 1.0,
    weight_decay_norm: float | None = 0.0,
    weight_decay_channel_norm: float | None = None,
    weight_decay_pos_embed: float | None = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups with a learning rate that shrinks towards the input (ViTDet, appendix A.1).

    The layer at distance d from the heads gets ``base_lr * backbone_lr_factor * lr_decay ** d``;
    the heads and the pyramid get ``base_lr``. The depth is the model's own.

    The defaults are ViTDet's published recipe for ViT-B and ViT-L, which decays everything but the
    backbone's norms and its position embedding; that for ViT-H decays these as well.

    Args:
        model: any module with one ViT inside.
        base_lr: learning rate of the heads.
        lr_decay: factor from one layer to the one below, in (0, 1].
        backbone_lr_factor: learning rate of the backbone over that of the heads, before the decay.
        weight_decay_norm: weight decay of torch's norms, of which a ViTDet has them in its ViT
            only; None for the optimizer's, as all other weights.
        weight_decay_channel_norm: likewise of detectron2's ``LayerNorm`` over channels ("LN"), in
            the pyramid and the heads.
        weight_decay_pos_embed: likewise of the position embedding.

    Returns:
        Groups for a torch optimizer, from the embeddings to the heads. Each has a ``name``
        ("layer_00", "heads") for the log, with "_no_decay" or "_decay_VALUE" behind it where it has
        a weight decay of its own.

    Raises:
        ValueError: ``lr_decay`` out of range, or not exactly one backbone in the model.
    """
    if not 0 < lr_decay <= 1:
        raise ValueError(f"lr_decay must lie in (0, 1], got {lr_decay}")
    backbone_name, backbone = find_backbone(model)
    depth = len(backbone.blocks)
    own_decay: dict[int, float | None] = {id(backbone.pos_embed): weight_decay_pos_embed}
    for module in model.modules():
        for kind, decay in (
            (NORMS, weight_decay_norm),
            (ChannelLayerNorm, weight_decay_channel_norm),
        ):
            if isinstance(module, kind):
                own_decay |= {id(p): decay for p in module.parameters(recurse=False)}
    groups: dict[tuple[int, bool, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_index(name, backbone_name, depth)
        decay = own_decay.get(id(parameter))
        key = (layer, decay is not None, decay or 0.0)
        if key not in groups:
            in_backbone = layer <= depth
            lr = base_lr * (
                backbone_lr_factor * lr_decay ** (depth + 1 - layer) if in_backbone else 1
            )
            group_name = f"layer_{layer:02d}" if in_backbone else "heads"
            group: dict[str, Any] = {"params": [], "lr": lr, "name": group_name}
            if decay is not None:
                suffix = f"decay_{decay:g}" if decay else "no_decay"
                group |= {"weight_decay": decay, "name": f"{group_name}_{suffix}"}
            groups[key] = group
        groups[key]["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
