from .mask_rcnn_crossmae_vit_b_100ep import dataloader, lr_multiplier, model, optimizer, train

# ViTDet has no ViT-S: regularization as for ViT-B.
model.backbone.net.size = "small"
