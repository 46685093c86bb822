"""MAE, ViT-B, 800 epochs: all but the model is as for CrossMAE."""

from ..common.models.mae_vit import model
from ..common.pretraining import dataloader, lr_multiplier, optimizer, train
