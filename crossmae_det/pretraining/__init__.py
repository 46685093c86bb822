"""Masked pretraining of the trunk on unlabelled images: CrossMAE, and MAE beside it."""

from crossmae_det.pretraining.crossmae import CrossMAE
from crossmae_det.pretraining.data import build_pretraining_loader, load_images
from crossmae_det.pretraining.images import find_images
from crossmae_det.pretraining.mae import MAE
from crossmae_det.pretraining.param_groups import weight_decay_param_groups
from crossmae_det.pretraining.reconstruction import Panels, Reconstruction
from crossmae_det.pretraining.validation_loader import build_validation_loader

__all__ = [
    "MAE",
    "CrossMAE",
    "Panels",
    "Reconstruction",
    "build_pretraining_loader",
    "build_validation_loader",
    "find_images",
    "load_images",
    "weight_decay_param_groups",
]
