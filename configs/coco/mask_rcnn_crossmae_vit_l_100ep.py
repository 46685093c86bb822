from .mask_rcnn_crossmae_vit_b_100ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.net.update(size="large", drop_path_rate=0.4)
optimizer.params.lr_decay = 0.8
