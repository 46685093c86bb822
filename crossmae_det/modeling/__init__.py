"""The trunk that every task shares."""

from crossmae_det.modeling.build import build_vit, size_arguments
from crossmae_det.modeling.sizes import SIZES, Size
from crossmae_det.modeling.vit import ViT

__all__ = ["SIZES", "Size", "ViT", "build_vit", "size_arguments"]
