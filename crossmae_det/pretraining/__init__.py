"""Masked pretraining of the trunk on unlabelled images: CrossMAE, and MAE beside it."""

from crossmae_det.pretraining.crossmae import CrossMAE
from crossmae_det.pretraining.data import build_pretraining_loader
from crossmae_det.pretraining.images import find_images
from crossmae_det.pretraining.mae import MAE
from crossmae_det.pretraining.param_groups import weight_decay_param_groups
from crossmae_det.pretraining.reconstruction import Reconstruction

__all__ = [
    "MAE",
    "CrossMAE",
    "Reconstruction",
    "build_pretraining_loader",
    "find_images",
    "weight_decay_param_groups",
]
