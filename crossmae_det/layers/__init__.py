"""Building blocks in pure torch (and timm.layers where it has the part)."""
