"""Finding image files, and saying what was found."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from PIL import Image

from crossmae_det.utils.errors import UndecodableImageError
from crossmae_det.utils.image_reading import image_size

_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
# Suffixes of image files, in lower case: those of the list that this Pillow decodes.
IMAGE_SUFFIXES = tuple(
    suffix for suffix in _SUFFIXES if Image.registered_extensions().get(suffix) in Image.OPEN
)

# How many headers a summary reads, and for how many seconds at most.
SAMPLED_HEADERS = 256
SAMPLING_SECONDS = 5.0


def is_image_file(path: str | os.PathLike[str], suffixes: Sequence[str] = IMAGE_SUFFIXES) -> bool:
    """Whether a file is an image by its name; hidden files are none.

    macOS puts ``._photo.jpg`` beside ``photo.jpg``.
    """
    name = os.path.basename(os.fspath(path))
    return name.lower().endswith(tuple(suffixes)) and not name.startswith(".")


def walk_images(folder: str, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> Iterator[str]:
    """Find the images under a folder, at any depth, also behind links; hidden ones are left out.

    Args:
        folder: where to look.
        suffixes: of the files to find, in lower case.

    Yields:
        Paths relative to the folder, sorted within each folder.
    """
    visited = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prefix = os.path.relpath(parent, folder)
        for name in sorted(files):
            if is_image_file(name, suffixes):
                yield name if prefix == os.curdir else os.path.join(prefix, name)


def suffix_counts(names: Iterable[str]) -> str:
    """How many files have which suffix, as in "78 jpg, 2 png"."""
    counts = Counter(os.path.splitext(name)[1].lower().lstrip(".") or "none" for name in names)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())


def sampled_sizes(read_size: Callable[[int], tuple[int, int]], count: int) -> str:
    """Read the headers of a sample of images, evenly spread, and say what sizes they have.

    Args:
        read_size: index of an image -> its (height, width); raises UndecodableImageError.
        count: number of images, at least one.

    Returns:
        One line: how many headers were read, the least, median and greatest size, and how many
        images, of which names one, cannot be read. It takes a few seconds at most.
    """
    sizes, bad = [], []
    chosen = np.linspace(0, count - 1, min(count, SAMPLED_HEADERS)).round().astype(int)
    # Were the time to run out, those that were looked at would still be from everywhere.
    chosen = np.random.default_rng(0).permutation(chosen)
    end = time.monotonic() + SAMPLING_SECONDS
    for index in chosen.tolist():
        try:
            sizes.append(read_size(index))
        except UndecodableImageError as error:
            bad.append(error)
        if time.monotonic() > end:
            break
    texts = []
    if sizes:
        sizes.sort(key=lambda size: (size[0] * size[1], size))
        least, median, greatest = (
            f"{width}x{height}" for height, width in (sizes[0], sizes[len(sizes) // 2], sizes[-1])
        )
        sides = f"{least} to {greatest} pixels, median {median}"
        texts.append(f"sizes of {len(sizes)} of them: {sides if least != greatest else least}")
    if bad:
        texts.append(f"{len(bad)} of {len(bad) + len(sizes)} looked at cannot be read: {bad[0]}")
    return "; ".join(texts)


def file_sizes(paths: Sequence[str]) -> str:
    """:func:`sampled_sizes` of image files."""
    return sampled_sizes(lambda index: image_size(paths[index]), len(paths))
