"""Atomic writes: a reader never sees a half-written file."""

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
    """Write to a temporary path beside ``path`` that is renamed if the block raises no error.

    A reader sees the old file or the new one, also after a kill or on a full disk. After an error
    the temporary file is removed.

    Args:
        path: the file to write; its folder is created if it is missing.

    Yields:
        The path to write to, with the suffix of ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        # Flush before renaming: a crash of the machine must not leave an empty file.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(data: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint with ``torch.save``, atomically.

    Raises:
        OSError: the file cannot be written; an older file is intact.
    """
    with atomic_path(path) as temporary:
        try:
            torch.save(data, temporary)
        except RuntimeError as error:
            # torch's zip writer hides the system's reason, such as a full disk.
            raise OSError(f"cannot write the checkpoint {path}: {error}") from error


def write_json(
    path: str | os.PathLike[str],
    content: Any,
    *,
    indent: int | None = None,
    default: Callable[[Any], Any] | None = None,
) -> None:
    """Write JSON, atomically.

    Args:
        path: the file to write.
        content: anything that ``json`` can write, except for NaN and infinities.
        indent: as in ``json.dump``.
        default: as in ``json.dump``; None writes numpy scalars as numbers.

    Raises:
        ValueError: ``content`` has a NaN or an infinity; an older file is intact.
        OSError: the file cannot be written.
    """
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=indent, default=default or _numpy_scalar, allow_nan=False)
        file.write("\n")


def _numpy_scalar(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def write_image(path: str | os.PathLike[str], image_bgr: np.ndarray) -> None:
    """Write an image with OpenCV, atomically, in the format of the suffix.

    Args:
        path: the file to write.
        image_bgr: (H, W, 3) uint8, BGR.

    Raises:
        ValueError: OpenCV has no encoder for the suffix.
        OSError: the file cannot be written.
    """
    suffix = Path(path).suffix
    if not suffix or not cv2.haveImageWriter(f"image{suffix}"):
        raise ValueError(f"{path}: cannot write an image with suffix '{suffix}': use .png or .jpg")
    with atomic_path(path) as temporary:
        if not cv2.imwrite(str(temporary), image_bgr):
            raise OSError(f"{path}: cannot write the image: is the disk full?")
