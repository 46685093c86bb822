"""Checkpoints: safe reading, recognising, strict loading, conversion, atomic writing."""

from crossmae_det.checkpoint.conversion import convert
from crossmae_det.checkpoint.files import atomic_path, save_checkpoint
from crossmae_det.checkpoint.inspection import format_facts, inspect
from crossmae_det.checkpoint.loading import load
from crossmae_det.checkpoint.published import recognise, to_native, to_published
from crossmae_det.checkpoint.reading import extract_state_dict, read_checkpoint
from crossmae_det.checkpoint.report import Report

__all__ = [
    "Report",
    "atomic_path",
    "convert",
    "extract_state_dict",
    "format_facts",
    "inspect",
    "load",
    "read_checkpoint",
    "recognise",
    "save_checkpoint",
    "to_native",
    "to_published",
]
