"""Finding image files: in folders, and by the paths in an annotation file; summaries of them."""

import logging
import os
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from urllib.parse import unquote

import numpy as np
from PIL import Image

from crossmae_det.utils.image_reading import UndecodableImageError, image_size

logger = logging.getLogger(__name__)

_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)

# Suffixes of image files, in lower case, that this Pillow decodes.
IMAGE_SUFFIXES = tuple(
    suffix for suffix in _SUFFIXES if Image.registered_extensions().get(suffix) in Image.OPEN
)

# Limits of a summary: the number of headers it reads, and seconds.
SAMPLED_HEADERS = 256
SAMPLING_SECONDS = 5.0

Parts = tuple[str, ...]  # of a path

_warned: set[str] = set()


def is_image_file(path: str | os.PathLike[str], suffixes: Sequence[str] = IMAGE_SUFFIXES) -> bool:
    """Whether a file is an image by its name.

    Hidden files are not images: macOS puts ``._photo.jpg`` beside ``photo.jpg``.
    """
    name = os.path.basename(os.fspath(path))
    return name.lower().endswith(tuple(suffixes)) and not name.startswith(".")


def walk_images(folder: str, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> Iterator[str]:
    """Find the images in a folder at any depth, following links; hidden ones are skipped.

    Args:
        folder: where to look.
        suffixes: suffixes of the files to find, in lower case.

    Yields:
        Paths relative to the folder, sorted within each folder.
    """
    for parts in _walk(folder, hidden=False):
        if is_image_file(parts[-1], suffixes):
            yield os.path.join(*parts)


def walk_folders(folder: str, hidden: bool = True) -> Iterator[tuple[str, Parts, list[str]]]:
    """Visit a folder and those in it, following links, each once.

    Args:
        folder: where to start.
        hidden: also descend into hidden folders.

    Yields:
        The path of a folder, the parts of its path relative to ``folder``, and the names of its
        files, sorted.
    """
    visited = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:  # a link back
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if hidden or not name.startswith("."))
        relative = os.path.relpath(parent, folder)
        yield parent, () if relative == os.curdir else tuple(relative.split(os.sep)), sorted(files)


def _walk(folder: str, hidden: bool = True) -> Iterator[Parts]:
    """The files that `walk_folders` meets, as the parts of their relative paths."""
    for _, above, names in walk_folders(folder, hidden):
        for name in names:
            yield (*above, name)


def suffix_counts(names: Iterable[str]) -> str:
    """The number of files by suffix, such as "78 jpg, 2 png"."""
    counts = Counter(os.path.splitext(name)[1].lower().lstrip(".") or "none" for name in names)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())


def sampled_sizes(read_size: Callable[[int], tuple[int, int]], count: int) -> str:
    """Describe the sizes of images in one line, from the headers of an even sample of them.

    Args:
        read_size: index of an image -> (height, width); raises UndecodableImageError.
        count: number of images, at least one.

    Returns:
        The number of headers read; the smallest, median and largest size; the number of images
        that cannot be read, and one of them. Takes a few seconds at most.
    """
    sizes, bad = [], []
    chosen = np.linspace(0, count - 1, min(count, SAMPLED_HEADERS)).round().astype(int)
    # In random order: those read before the time is up are an even sample, too.
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
        least, median, most = (
            f"{width}x{height}" for height, width in (sizes[0], sizes[len(sizes) // 2], sizes[-1])
        )
        sides = f"{least} to {most} pixels, median {median}" if least != most else least
        texts.append(f"sizes of {len(sizes)} of them: {sides}")
    if bad:
        texts.append(f"{len(bad)} of {len(bad) + len(sizes)} sampled cannot be read: {bad[0]}")
    return "; ".join(texts)


def file_sizes(paths: Sequence[str]) -> str:
    """:func:`sampled_sizes` of image files."""
    return sampled_sizes(lambda index: image_size(paths[index]), len(paths))


def locate(
    names: Sequence[str], image_root: str, source: str, *, complete: bool = True
) -> list[str]:
    """Find image files by the paths in an annotation file or a list.

    Exporters write the paths of their own storage: ``..\\upload\\1\\abc.jpg``,
    ``/data/local-files/?d=images/abc.jpg``. If a path does not exist below ``image_root``, the file
    with its base name is used; of several, the one whose path has most trailing parts in common.
    If there is none, case and Unicode normalization are ignored. Each folder is listed once.

    Args:
        names: paths relative to ``image_root``, or absolute.
        image_root: the folder of the images.
        source: the file that lists the names, for messages.
        complete: whether every image must exist.

    Returns:
        The path of each image, in the order of ``names``; unchanged if it does not exist.

    Raises:
        FileNotFoundError: the folder does not exist; or, if ``complete``, an image does not exist
            or is ambiguous.
    """
    if not os.path.isdir(image_root):
        raise FileNotFoundError(f"{image_root}: no such image folder (for {source})")
    listings: dict[str, set[str]] = {}
    paths = [os.path.join(image_root, name) for name in names]
    exists = [_exists(path, listings) for path in paths]
    if all(exists):
        return paths
    taken = {os.path.realpath(paths[i]): names[i] for i, found in enumerate(exists) if found}
    by_name: dict[str, list[Parts]] = defaultdict(list)
    by_folded: dict[str, list[Parts]] = defaultdict(list)
    for parts in _walk(image_root):
        by_name[parts[-1]].append(parts)
        by_folded[_folded(parts[-1])].append(parts)
    repaired, failed = [], []  # indices; (name, reason)
    for index in (i for i, found in enumerate(exists) if not found):
        readings = _readings(names[index])
        matches = _best_matches(readings, by_name, str) or _best_matches(
            [tuple(map(_folded, reading)) for reading in readings], by_folded, _folded
        )
        if len(matches) != 1:
            failed.append((names[index], f"{len(matches)} files have this base name"))
            continue
        path = os.path.join(image_root, *matches[0])
        other = taken.setdefault(os.path.realpath(path), names[index])
        if other != names[index]:
            failed.append((names[index], f"{os.path.join(*matches[0])} belongs to {other}"))
            continue
        paths[index] = path
        repaired.append(index)
    if failed and complete:
        name, reason = failed[0]
        raise FileNotFoundError(
            f"{image_root}: {len(failed)} of the {len(names)} images of {source} do not exist in"
            f" this folder, the first is {name} ({reason}): check the folder or complete it"
        )
    if repaired:
        message = (
            f"{source}: {len(repaired)} image paths do not exist in {image_root}: found by their"
            f" base names (first: {names[repaired[0]]} is {paths[repaired[0]]})"
        )
        if message not in _warned:
            _warned.add(message)
            logger.warning(message)
    return paths


def _exists(path: str, listings: dict[str, set[str]]) -> bool:
    folder, name = os.path.split(path)
    if folder not in listings:
        listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    # The file system may ignore case.
    return name in listings[folder] or bool(name and listings[folder] and os.path.exists(path))


def _readings(name: str) -> list[Parts]:
    """The parts of a path or an address of any storage, in every possible reading."""
    readings = []
    for text in dict.fromkeys((name, unquote(name))):
        text = text.rpartition("?d=")[2]  # Label Studio's address of a local file
        if "://" in text:
            text = text.partition("?")[0]
        parts = text.replace("\\", "/").split("/")
        readings.append(tuple(part for part in parts if part not in ("", ".", "..")))
    return readings


def _folded(name: str) -> str:
    """A name without what file systems and archives may change: case, Unicode form, spaces."""
    return unicodedata.normalize("NFC", name).casefold().strip()


def _best_matches(
    readings: Sequence[Parts], by_name: Mapping[str, list[Parts]], key: Callable[[str], str]
) -> list[Parts]:
    """The files whose paths have most trailing parts in common with a name, in any reading.

    ``key`` is applied to the parts of files; ``readings`` and ``by_name`` already have that form.
    """
    best: dict[Parts, None] = {}
    length = 0
    for reading in readings:
        for parts in by_name.get(reading[-1], ()) if reading else ():
            common = 0
            for part, other in zip(reversed(parts), reversed(reading), strict=False):
                if key(part) != other:
                    break
                common += 1
            if common > length:
                best, length = {}, common
            if common == length:
                best[parts] = None
    return list(best)
