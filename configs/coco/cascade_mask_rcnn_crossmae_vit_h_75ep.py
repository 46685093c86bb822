from .cascade_mask_rcnn_crossmae_vit_b_100ep import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.backbone.net.update(size="huge", drop_path_rate=0.5)
optimizer.params.lr_decay = 0.9
train.epochs = 75
