"""Layer-wise learning-rate decay for models with a ViT backbone."""

import math
from typing import Any

from detectron2.layers.batch_norm import LayerNorm as ChannelLayerNorm
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver.build import get_default_optimizer_params, reduce_param_groups
from torch import nn

from crossmae_det.modeling import ViT


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
    the heads and the pyramid get ``base_lr``. The depth is read from the model.

    The defaults are ViTDet's published recipe for ViT-B and ViT-L, which exempts only the
    backbone's norms and position embedding from weight decay; the ViT-H recipe exempts nothing.

    Args:
        model: any module that contains one ViT.
        base_lr: learning rate of the heads.
        lr_decay: factor from one layer to the one below, in (0, 1].
        backbone_lr_factor: learning rate of the backbone relative to the heads, before the decay.
        weight_decay_norm: weight decay of torch's norms, which a ViTDet has in its ViT only; None
            for the optimizer's weight decay.
        weight_decay_channel_norm: likewise for detectron2's channel ``LayerNorm`` ("LN") of the
            pyramid and the heads.
        weight_decay_pos_embed: likewise for the position embedding.

    Returns:
        Groups for a torch optimizer, from the embeddings to the heads. Each has a ``name`` for the
        log ("layer_00", "heads"), which ends in "_no_decay" or "_decay_VALUE" if the group has its
        own weight decay.

    Raises:
        ValueError: ``lr_decay`` out of range, or not exactly one ViT in the model.
    """
    if not 0 < lr_decay <= 1:
        raise ValueError(f"lr_decay must lie in (0, 1], got {lr_decay}")
    vits = [(name, module) for name, module in model.named_modules() if isinstance(module, ViT)]
    if len(vits) != 1:
        raise ValueError(f"expected one ViT backbone in {type(model).__name__}, found {len(vits)}")
    ((vit_name, vit),) = vits
    prefix, depth = vit_name and f"{vit_name}.", len(vit.blocks)

    def distance(name: str) -> int:
        """Layers between a parameter and the heads: 0 for the heads, depth + 1 for embeddings."""
        if not name.startswith(prefix):
            return 0
        # detectron2's rule, with a decay of 2 to read the exponent. It knows no class token.
        name = name.removeprefix(prefix).replace("cls_token", "pos_embed").lstrip(".")
        return round(math.log2(get_vit_lr_decay_rate(f"backbone.{name}", 2, num_layers=depth)))

    def factor(name: str) -> float:
        layers = distance(name)
        return backbone_lr_factor * lr_decay**layers if layers else 1

    pos_embed = {} if weight_decay_pos_embed is None else {"weight_decay": weight_decay_pos_embed}
    entries = get_default_optimizer_params(
        model,
        base_lr,
        weight_decay_norm=weight_decay_norm,
        lr_factor_func=factor,
        overrides={"pos_embed": pos_embed},
    )
    # `reduce_param_groups` merges what several entries say about a parameter.
    if weight_decay_channel_norm is not None:
        norms = [module for module in model.modules() if isinstance(module, ChannelLayerNorm)]
        params = [p for norm in norms for p in norm.parameters() if p.requires_grad]
        entries.append({"params": params, "weight_decay": weight_decay_channel_norm})
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = depth + 1 - distance(name)
            group = f"layer_{layer:02d}" if layer <= depth else "heads"
            entries.append({"params": [parameter], "name": group})
    groups = reduce_param_groups(entries)
    groups.sort(key=lambda g: (g["name"] == "heads", g["name"], g.get("weight_decay", -1)))
    for group in groups:
        if (decay := group.get("weight_decay")) is not None:
            group["name"] += f"_decay_{decay:g}" if decay else "_no_decay"
    return groups
