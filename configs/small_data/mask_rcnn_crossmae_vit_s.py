from .mask_rcnn_crossmae_vit_b import dataloader, lr_multiplier, model, optimizer, train

model.backbone.net.size = "small"
# Half the width of ViT-B, twice its rate: Adam's best rate is about proportional to 1 / width.
optimizer.lr = 2e-4
