"""The ViTDet recipe: AdamW with layer-wise learning-rate decay, and a step schedule."""

import torch
from detectron2.config import LazyCall as L

from crossmae_det.detection import layer_decay_param_groups
from crossmae_det.engine.hooks import step_schedule

optimizer = L(torch.optim.AdamW)(
    # `model` is passed when the optimizer is built.
    params=L(layer_decay_param_groups)(
        base_lr="${..lr}",
        lr_decay=0.7,
        backbone_lr_factor=1.0,
        # Weight decay of the ViT's norms, of the norms of pyramid and heads, and of the position
        # embedding; None: that of all other weights. As published for ViT-B and ViT-L.
        weight_decay_norm=0.0,
        weight_decay_channel_norm=None,
        weight_decay_pos_embed=0.0,
    ),
    # The published rate is for 64 images; other batches follow by the linear rule.
    lr="${crossmae.linear_lr:1e-4,${dataloader.train.total_batch_size},64}",
    betas=(0.9, 0.999),
    weight_decay=0.1,
)

# 184,375 iterations are 100 epochs of 118,000 images in batches of 64; the published milestones are
# 163,889 = 8/9 and 177,546 = 26/27 of them.
lr_multiplier = L(step_schedule)(
    max_iter="${train.max_iter}", milestones=[8 / 9, 26 / 27], gamma=0.1, warmup_iters=250
)
