"""Masked pretraining of the ViT on unlabeled images: CrossMAE and MAE."""

from crossmae_det.pretraining.crops import (
    build_pretraining_loader,
    build_validation_loader,
    load_images,
)
from crossmae_det.pretraining.crossmae import CrossMAE
from crossmae_det.pretraining.image_datasets import find_images
from crossmae_det.pretraining.mae import MAE
from crossmae_det.pretraining.masked_image_model import Panels, Reconstruction

__all__ = [
    "CrossMAE",
    "MAE",
    "Panels",
    "Reconstruction",
    "build_pretraining_loader",
    "build_validation_loader",
    "find_images",
    "load_images",
]
