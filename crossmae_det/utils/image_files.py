"""Finding image files, and saying what was found.

Where images are that an annotation file names by the paths of another storage.
"""

import logging
import os
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from urllib.parse import unquote

import numpy as np
from PIL import Image

from crossmae_det.utils.image_reading import UndecodableImageError, image_size

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


logger = logging.getLogger(__name__)


_reported: set[str] = set()


def locate(
    names: Sequence[str], image_root: str, source: str, *, complete: bool = True
) -> list[str]:
    """Find image files by the paths that an annotation file or a list has for them.

    There is one directory listing per folder.

    Exporters write the paths of their own storage: ``..\\upload\\1\\abc.jpg``,
    ``/data/local-files/?d=images/abc.jpg``. Where a path does not exist below ``image_root``, the
    one file there that has its base name is taken; of several, the one that shares most of the
    path. Where none has it, other case and other forms of the same Unicode text count as equal.

    Args:
        names: paths as they are written, relative to ``image_root`` or absolute.
        image_root: the folder that has the images.
        source: the file that has the names, for messages.
        complete: whether every image must be there.

    Returns:
        The path of each image, in the order of ``names``; as it is written where it is absent.

    Raises:
        FileNotFoundError: the folder is absent, or some of the images that must be there are, or
            more than one file could be meant.
    """
    if not os.path.isdir(image_root):
        raise FileNotFoundError(
            f"{image_root}: no such image folder (for {source}); check the path"
        )
    listings: dict[str, set[str]] = {}
    paths = [os.path.join(image_root, name) for name in names]
    lost = [index for index, path in enumerate(paths) if not _exists(path, listings)]
    if not lost:
        return paths
    absent = set(lost)
    taken = {
        os.path.realpath(path): names[index]
        for index, path in enumerate(paths)
        if index not in absent
    }
    by_base = _files_by_base_name(image_root)
    by_folded: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for base, files in by_base.items():
        by_folded[_folded(base)] += files
    reasons = []  # of those that stay absent
    for index in lost:
        readings = _parts(names[index])
        found = _best_matches(readings, by_base)
        if not found:
            found = _best_matches([tuple(map(_folded, r)) for r in readings], by_folded, _folded)
        if len(found) != 1:
            reasons.append((names[index], f"{len(found)} files there have its base name"))
            continue
        path = os.path.join(image_root, *found[0])
        other = taken.setdefault(os.path.realpath(path), names[index])
        if other != names[index]:
            reasons.append((names[index], f"{os.path.join(*found[0])} is the file of {other}"))
            continue
        paths[index] = path
        absent.discard(index)
    if reasons and complete:
        raise FileNotFoundError(
            f"{image_root}: {len(reasons)} of the {len(names)} images of {source} are not in this "
            f"folder, the first is {reasons[0][0]}: no such file, and {reasons[0][1]}; check the "
            "folder or complete it"
        )
    repaired = [index for index in lost if index not in absent]
    if repaired:
        message = (
            f"{source}: {len(repaired)} image paths do not exist in {image_root}: found by their "
            f"base names (first: {names[repaired[0]]} is {paths[repaired[0]]})"
        )
        if message not in _reported:
            _reported.add(message)
            logger.warning(message)
    return paths


def _exists(path: str, listings: dict[str, set[str]]) -> bool:
    folder, name = os.path.split(path)
    if folder not in listings:
        listings[folder] = set(_list_folder(folder))
    if name in listings[folder]:
        return True
    # A listing does not know of file systems that ignore case: they have the last word.
    return bool(name and listings[folder]) and os.path.exists(path)


def _list_folder(folder: str) -> list[str]:
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def _parts(file_name: str) -> list[tuple[str, ...]]:
    """What a path or an address in any storage may be called here: its parts, in each reading."""
    readings = []
    for name in dict.fromkeys((file_name, unquote(file_name))):
        name = name.rpartition("?d=")[2]  # Label Studio's address of a local file
        if "://" in name:
            name = name.partition("?")[0]
        parts = name.replace("\\", "/").split("/")
        readings.append(tuple(part for part in parts if part not in ("", ".", "..")))
    return readings


def _files_by_base_name(image_root: str) -> dict[str, list[tuple[str, ...]]]:
    """Base name -> the files that have it, as the parts of their paths below the folder."""
    found = defaultdict(list)
    for parts in _walk(image_root, (), set()):
        found[parts[-1]].append(parts)
    return found


def _folded(name: str) -> str:
    """A name without what file systems and archives change: case, composed accents, spaces."""
    return unicodedata.normalize("NFC", name).casefold().strip()


def _walk(folder: str, parts: tuple[str, ...], seen: set[str]) -> Iterator[tuple[str, ...]]:
    real = os.path.realpath(folder)
    if real in seen:  # a link back
        return
    seen.add(real)
    for name in sorted(_list_folder(folder)):
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            yield from _walk(path, (*parts, name), seen)
        else:
            yield (*parts, name)


def _best_matches(
    readings: list[tuple[str, ...]],
    by_base: dict[str, list[tuple[str, ...]]],
    key: Callable[[str], str] = str,
) -> list[tuple[str, ...]]:
    """The files that share the most last parts of their paths with a name, in any reading.

    ``key`` makes of a part what it is compared by; ``readings`` and ``by_base`` have that form.
    """
    best: dict[tuple[str, ...], None] = {}
    length = 0
    for reading in readings:
        for parts in by_base.get(reading[-1], ()) if reading else ():
            common = 0
            for ours, other in zip(reversed(parts), reversed(reading), strict=False):
                if key(ours) != other:
                    break
                common += 1
            if common > length:
                best, length = {}, common
            if common == length:
                best[parts] = None
    return list(best)
