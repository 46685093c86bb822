"""Building blocks of the ViT, in pure torch (timm.layers where it has the part)."""
