"""What yaml configs share with lazy configs: everything but the model."""

from .coco_lsj import dataloader
from .optim import lr_multiplier, optimizer
from .train import train
