"""The plain ViT."""

from crossmae_det.modeling.vit import SIZES, Size, ViT, build_vit, size_arguments

__all__ = ["SIZES", "Size", "ViT", "build_vit", "size_arguments"]
