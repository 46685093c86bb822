"""Detection data: data sets by one string, checked, and a loader that resumes exactly."""

from crossmae_det.data import shapes
from crossmae_det.data.augmentations import ResizeToFit
from crossmae_det.data.categories import category_indices
from crossmae_det.data.coco import DatasetInfo, describe, get_dataset_dicts, resolve_name
from crossmae_det.data.loader import TrainLoader
from crossmae_det.data.mapper import DetectionMapper
from crossmae_det.utils.errors import ImageError, UndecodableImageError

__all__ = [
    "DatasetInfo",
    "DetectionMapper",
    "ImageError",
    "ResizeToFit",
    "TrainLoader",
    "UndecodableImageError",
    "category_indices",
    "describe",
    "get_dataset_dicts",
    "resolve_name",
]

# The built-in data set has its names from the start, as detectron2's have; it is written on first
# use.
shapes.register()
