"""The order of training batches, and the loader that keeps to it: for every task's data."""

from crossmae_det.sampling.loader import ResumableLoader

__all__ = ["ResumableLoader"]
