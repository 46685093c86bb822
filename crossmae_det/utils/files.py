"""Writing files that are never half-written.

Writing files so that a reader never sees half of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name when the block ends without an error.

    Whoever reads ``path`` sees the old file or the new one, whole, also after a kill or on a full
    disk. After an error the temporary file is removed.

    Args:
        path: the file to write; its folder is made when it is missing.

    Yields:
        The path to write to, with the suffix of ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        # On disk before it takes the name: a crash of the machine must not leave an empty file.
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(data: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint with ``torch.save`` under a temporary name, then rename it.

    Raises:
        OSError: the file cannot be written; an older file of that name is intact.
    """
    with atomic_path(path) as temporary:
        try:
            torch.save(data, temporary)
        except RuntimeError as error:
            # torch's zip writer hides the system's reason (a full disk, say) behind its own.
            raise OSError(f"cannot write the checkpoint {path}: {error}") from error


def write_json(
    path: str | os.PathLike[str],
    content: Any,
    *,
    indent: int | None = None,
    default: Callable[[Any], Any] | None = None,
) -> None:
    """Writes ``content`` as JSON, atomically.

    Args:
        path: the file to write.
        content: anything ``json`` can write. NaN and infinities are not JSON and are refused.
        indent: as in ``json.dump``.
        default: as in ``json.dump``; without one, numpy scalars are written as numbers.

    Raises:
        ValueError: ``content`` holds a NaN or an infinity; ``path`` is left as it was.
        OSError: ``path`` cannot be written.
    """
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=indent, default=default or _numpy_scalar, allow_nan=False)
        file.write("\n")


def write_image(path: str | os.PathLike[str], image_bgr: np.ndarray) -> None:
    """Writes an image with OpenCV, atomically, in the format of the suffix.

    Args:
        path: the file to write; its suffix is one that OpenCV can encode (``.png``, ``.jpg``, ...).
        image_bgr: (H, W, 3) uint8, BGR.

    Raises:
        ValueError: OpenCV has no encoder for the suffix.
        OSError: ``path`` cannot be written.
    """
    suffix = Path(path).suffix
    if not suffix or not cv2.haveImageWriter(f"image{suffix}"):
        raise ValueError(f"{path}: no image format has the suffix '{suffix}'; use .png or .jpg")
    with atomic_path(path) as temporary:
        if not cv2.imwrite(str(temporary), image_bgr):
            raise OSError(f"{path}: the image could not be written; is the disk full?")


def _numpy_scalar(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
