"""Where images are that an annotation file names by the paths of another storage."""

import logging
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import unquote

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
