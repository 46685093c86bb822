from .mask_rcnn_crossmae_vit_b_100ep import dataloader, lr_multiplier, model, optimizer, train

# Ours: ViTDet has no ViT-S. It keeps the regularisation of ViT-B.
model.backbone.net.size = "small"
