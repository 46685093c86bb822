"""Writing files that are never half-written."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
