from .mae_vit_b_1600ep import dataloader, lr_multiplier, model, optimizer, train

model.encoder.size = "huge"  # patch 14
