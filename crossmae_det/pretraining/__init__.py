"""Masked pretraining of the trunk: CrossMAE, and MAE beside it."""

from crossmae_det.pretraining.crossmae import CrossMAE
from crossmae_det.pretraining.mae import MAE
from crossmae_det.pretraining.reconstruction import Reconstruction

__all__ = ["MAE", "CrossMAE", "Reconstruction"]
