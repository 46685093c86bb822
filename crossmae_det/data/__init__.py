"""What the loaders of every task share."""

from crossmae_det.data.loader import ResumableLoader, process_rank

__all__ = ["ResumableLoader", "process_rank"]
