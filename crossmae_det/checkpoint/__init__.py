"""Checkpoint files: safe reading, strict loading, atomic writing, published key names."""

from crossmae_det.checkpoint.files import atomic_path, read_checkpoint, save_checkpoint
from crossmae_det.checkpoint.loading import load
from crossmae_det.checkpoint.published import to_native, to_published
from crossmae_det.checkpoint.report import Report

__all__ = [
    "Report",
    "atomic_path",
    "load",
    "read_checkpoint",
    "save_checkpoint",
    "to_native",
    "to_published",
]
