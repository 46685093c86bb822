from .mask_rcnn_crossmae_vit_l_100ep import dataloader, lr_multiplier, model, optimizer, train

train.epochs = 50
