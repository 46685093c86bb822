from .crossmae_vit_b_800ep import dataloader, lr_multiplier, model, optimizer, train

model.encoder.size = "huge"  # patch 14
