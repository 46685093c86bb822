"""Checkpoints: safe reading, layouts, strict loading, conversion."""

from crossmae_det.checkpoint.conversion import CheckpointInfo, convert, inspect
from crossmae_det.checkpoint.layouts import recognize, to_native, to_published
from crossmae_det.checkpoint.loading import Report, load
from crossmae_det.checkpoint.reading import extract_state_dict, read_checkpoint

__all__ = [
    "CheckpointInfo",
    "Report",
    "convert",
    "extract_state_dict",
    "inspect",
    "load",
    "read_checkpoint",
    "recognize",
    "to_native",
    "to_published",
]
