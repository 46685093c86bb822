from .cascade_mask_rcnn_crossmae_vit_b_100ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.backbone.net.size = "small"
