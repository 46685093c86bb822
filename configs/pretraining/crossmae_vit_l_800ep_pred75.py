from .crossmae_vit_l_800ep import dataloader, lr_multiplier, model, optimizer, train

model.prediction_ratio = 0.75
