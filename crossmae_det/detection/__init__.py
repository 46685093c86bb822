"""Detection and instance segmentation: the ViT as a detectron2 backbone, COCO data, evaluation."""

from crossmae_det.detection import shapes
from crossmae_det.detection.backbone import SimpleFeaturePyramid, ViTBackbone, vit_backbone
from crossmae_det.detection.coco import DatasetInfo, describe, get_dataset_dicts, resolve_name
from crossmae_det.detection.coco_records import category_indices
from crossmae_det.detection.evaluation_results import format_table, write_results
from crossmae_det.detection.evaluator import COCOEvaluator
from crossmae_det.detection.lr_decay import layer_decay_param_groups
from crossmae_det.detection.mapper import DetectionMapper, ResizeToFit, TrainLoader
from crossmae_det.detection.mask_head import PartiallySupervisedMaskHead
from crossmae_det.detection.yaml_config import add_crossmae_config

__all__ = [
    "COCOEvaluator",
    "DatasetInfo",
    "DetectionMapper",
    "PartiallySupervisedMaskHead",
    "ResizeToFit",
    "SimpleFeaturePyramid",
    "TrainLoader",
    "ViTBackbone",
    "add_crossmae_config",
    "category_indices",
    "describe",
    "format_table",
    "get_dataset_dicts",
    "layer_decay_param_groups",
    "resolve_name",
    "vit_backbone",
    "write_results",
]

# Registered on import, as detectron2's datasets; the images are written on first use.
shapes.register()
