"""The trunk as a detectron2 backbone. Importing this room registers it."""

from crossmae_det.detection.backbone import SimpleFeaturePyramid, ViTBackbone, vit_backbone
from crossmae_det.detection.config import add_crossmae_config
from crossmae_det.detection.lr_decay import layer_decay_param_groups
from crossmae_det.detection.mask_head import PartiallySupervisedMaskHead

__all__ = [
    "PartiallySupervisedMaskHead",
    "SimpleFeaturePyramid",
    "ViTBackbone",
    "add_crossmae_config",
    "layer_decay_param_groups",
    "vit_backbone",
]
