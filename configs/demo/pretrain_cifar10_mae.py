"""The MAE baseline of demo/pretrain_cifar10.py, with fewer epochs for about the same time."""

from ..common.models.mae_vit import model
from .pretrain_cifar10 import dataloader, lr_multiplier, optimizer, train
from .pretrain_cifar10 import model as _crossmae

model.encoder = _crossmae.encoder
model.update(decoder_dim=128, decoder_depth=4, decoder_num_heads=4)

train.epochs = 4
