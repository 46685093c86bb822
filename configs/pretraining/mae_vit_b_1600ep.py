"""MAE, ViT-B, 1600 epochs: the schedule of the published weights, with 40 epochs of warm-up."""

from .mae_vit_b_800ep import dataloader, lr_multiplier, model, optimizer, train

train.epochs = 1600
lr_multiplier.warmup_length = 40 / 1600
