"""Read a dataset of any layout once, until one of its files changes.

Within a process the content goes to `coco_json`, which keeps it like that of a COCO json. A dataset
that takes long to read is also kept in ``~/.cache/crossmae_det`` (``XDG_CACHE_HOME``), for later
processes. Nothing is written beside the data.
"""

import hashlib
import json
import logging
import os
import time
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from crossmae_det.detection.formats import coco_folder, cvat, labelme, masks, voc, yolo
from crossmae_det.detection.formats.content import Content
from crossmae_det.detection.formats.spec import Spec, find_split, parse
from crossmae_det.utils.files import atomic_path

logger = logging.getLogger(__name__)

Version = tuple[int, int]

READERS: dict[str, ModuleType] = {
    "yolo": yolo,
    "voc": voc,
    "cvat": cvat,
    "labelme": labelme,
    "masks": masks,
    "coco": coco_folder,
}

# Reading that takes longer than this is not repeated by the next process.
CACHE_SECONDS = 2.0

# A dataset of more files than this is not looked at for changes again within so many seconds.
_MANY_FILES = 2_000
_PAUSE_SECONDS = 30.0

_CACHE_FORMAT = 2  # changes when readers do


@dataclass
class _Known:
    """What is kept of a dataset: its files, its version, and when the files were looked at."""

    files: list[str]
    version: Version
    looked: float


_known: dict[str, _Known] = {}
_contents: dict[str, Content] = {}  # read, and not yet taken


def splits(spec: Spec) -> list[str]:
    """The names of the splits of a dataset; [] if it has none.

    Raises:
        FileNotFoundError, ValueError: the dataset does not exist or cannot be read.
    """
    return READERS[spec.layout].splits(spec)


def is_present(spec: Spec) -> bool:
    """Whether the annotations of a dataset exist."""
    return os.path.exists(spec.path)


def with_split(text: str, wanted: str) -> str | None:
    """A dataset string with a split that it does not name, such as its validation set.

    Args:
        text: as the user wrote it, with or without a split.
        wanted: "train", "val" or "test".

    Returns:
        The string with the split of that name or an alias, which replaces the one that it names;
        None if it is no string of a layout, does not exist here, or has no such split.

    Raises:
        ValueError: its description cannot be read.
    """
    spec = parse(text)
    if spec is None or not is_present(spec):
        return None
    found = find_split(splits(spec), wanted)
    if found is None:
        return None
    base = text.strip().removesuffix(f":{spec.split}") if spec.split else text.strip().rstrip(":")
    return f"{base}:{found}"


def for_evaluation(text: str) -> str:
    """A dataset string as a test set: without a split it stands for its validation split.

    Returns:
        The string with that split; ``text`` if it names a split, is no string of a layout, has no
        splits, or does not exist here.

    Raises:
        ValueError: there are splits, but none for validation.
    """
    spec = parse(text)
    if spec is None or spec.split or not is_present(spec) or not (names := splits(spec)):
        return text
    found = with_split(text, "val")
    if found is None:
        first = f"{text.strip().rstrip(':')}:{find_split(names, 'test') or names[-1]}"
        raise ValueError(
            f"dataset {text!r}: {spec.path} has no validation split, only {', '.join(names)}: "
            f"name one of them to evaluate on it, as in {first}"
        )
    return found


def version(spec: Spec) -> tuple[str, Version]:
    """A key for a dataset in this process, and its version, which changes when its files do.

    A version is a hash and the approximate size of the content as json. A dataset that is not known
    yet, or has changed, is read for `read`.
    """
    key = _key(spec)
    known = _known.get(key)
    if known is None or not _is_unchanged(known):
        known = _keep(key, _read(spec, key))
    return key, known.version


def read(spec: Spec) -> Content:
    """The content of one split; the caller owns it.

    Raises:
        FileNotFoundError: a file or folder of the dataset does not exist.
        ValueError: a file cannot be read; one line that names the file and the line or object.
    """
    key = _key(spec)
    if key not in _contents:
        _keep(key, _read(spec, key))
    return _contents.pop(key)


def _key(spec: Spec) -> str:
    paths = [os.path.abspath(path) if path else "" for path in (spec.path, spec.images)]
    return json.dumps([spec.layout, *paths, spec.split.lower()])


def _keep(key: str, content: Content) -> _Known:
    _contents[key] = content
    size = 100 * len(content.images)
    for annotation in content.annotations:
        mask = annotation.get("segmentation", [])
        size += 100 + (10 * sum(map(len, mask)) if isinstance(mask, list) else len(mask["counts"]))
    version = _fingerprint(content.files), size
    _known[key] = known = _Known(content.files, version, time.monotonic())
    return known


def _is_unchanged(known: _Known) -> bool:
    now = time.monotonic()
    if len(known.files) > _MANY_FILES and now - known.looked < _PAUSE_SECONDS:
        return True
    known.looked = now
    return _fingerprint(known.files) == known.version[0]


def _fingerprint(files: list[str]) -> int:
    """A hash of the times and sizes of files and folders."""
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        try:
            status = os.stat(path)
        except OSError:
            digest.update(b"missing")
        else:
            digest.update(b"%d %d " % (status.st_mtime_ns, status.st_size))
    return int.from_bytes(digest.digest(), "big")


def _read(spec: Spec, key: str) -> Content:
    path = _cache_file(key)
    content = _read_cache(path)
    if content is not None:
        logger.info("%s: read from %s", spec.text, path)
        return content
    logger.info("%s: reading the annotations", spec.text)
    start = time.monotonic()
    content = READERS[spec.layout].read(spec)
    # The next process may run in another folder.
    content.image_root = os.path.abspath(content.image_root)
    content.files = list(dict.fromkeys(map(os.path.abspath, content.files)))
    if time.monotonic() - start >= CACHE_SECONDS:
        _write_cache(path, content)
    return content


# The cache of slow datasets


def _cache_file(key: str) -> str:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    return os.path.join(os.path.expanduser(root), "crossmae_det", "datasets", f"{name}.json")


def _read_cache(path: str) -> Content | None:
    """The content that an earlier process has kept; None if there is none or its files changed."""
    try:
        with open(path, encoding="utf-8") as file:
            data: dict[str, Any] = json.load(file)
        if data["format"] != _CACHE_FORMAT:
            return None
        content = Content(**data["content"])
        if data["version"] != _fingerprint(content.files):
            return None
    except (OSError, ValueError, KeyError, TypeError):  # absent, or of another version
        return None
    return content


def _write_cache(path: str, content: Content) -> None:
    data = {
        "format": _CACHE_FORMAT,
        "version": _fingerprint(content.files),
        "content": content.as_json(),
    }
    try:
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(data))
    except OSError as error:
        logger.info("%s: not written (%s)", path, error.strerror or error)
