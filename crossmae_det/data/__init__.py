"""What the loaders of every task share."""

from crossmae_det.data.loader import ResumableLoader

__all__ = ["ResumableLoader"]
