"""CrossMAE, ViT-B, 800 epochs: the recipe that the other configs here are diffs of."""

from ..common.models.crossmae_vit import model
from ..common.pretraining import dataloader, lr_multiplier, optimizer, train
