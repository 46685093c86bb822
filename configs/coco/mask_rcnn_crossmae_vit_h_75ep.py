from .mask_rcnn_crossmae_vit_h_100ep import dataloader, lr_multiplier, model, optimizer, train

# The published ViT-H schedule.
train.epochs = 75
