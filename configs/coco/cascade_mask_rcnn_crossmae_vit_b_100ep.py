from ..common.models.cascade_mask_rcnn_vit import model
from .mask_rcnn_crossmae_vit_b_100ep import dataloader, lr_multiplier, optimizer, train
