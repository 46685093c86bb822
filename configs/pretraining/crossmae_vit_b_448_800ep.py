from .crossmae_vit_b_800ep import dataloader, lr_multiplier, model, optimizer, train

dataloader.image_size = 448
