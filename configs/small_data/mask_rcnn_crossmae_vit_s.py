from .mask_rcnn_crossmae_vit_b import dataloader, lr_multiplier, model, optimizer, train

model.backbone.net.size = "small"
