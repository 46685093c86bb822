"""Everything but the model, for yaml configs."""

from .coco_lsj import dataloader
from .optim import lr_multiplier, optimizer
from .train import train
