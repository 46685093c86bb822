"""Image datasets for pretraining, each named by one string, without labels.

=====================  ============================================================================
``photos/``            a folder: every image in it, at any depth, so class folders too
``photo.jpg``          one image file
``photos.txt``         a list of image files, one per line, relative to the list's own folder
``set.json:photos/``   the images of a COCO json, relative to the folder
``set/{00..63}.tar``   tar shards in WebDataset's format: a pattern with braces, or wildcards;
                       several patterns are joined with ``::``
=====================  ============================================================================
"""

import json
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from glob import glob
from typing import NamedTuple

import numpy as np
import torch
from braceexpand import braceexpand
from torch import Tensor
from torch.utils.data import Dataset

from crossmae_det.utils.image_files import (
    IMAGE_SUFFIXES,
    is_image_file,
    locate,
    suffix_counts,
    walk_images,
)
from crossmae_det.utils.image_reading import EncodedImage, image_size, naming_errors

logger = logging.getLogger(__name__)

# An epoch goes through the shards in a random order, this many at a time, and through the images of
# those in a random order: what is read lies close together.
SHARDS_AT_A_TIME = 16


class StoredImage(NamedTuple):
    """Where the bytes of an encoded image are; as a string, its name for messages.

    Attributes:
        path: the file.
        member: name inside a tar file; empty where the file is the image.
        offset: first byte in the file.
        size: number of bytes; -1 for all that follow.
    """

    path: str
    member: str = ""
    offset: int = 0
    size: int = -1

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else self.path

    def read(self) -> bytes:
        """Read the encoded image; raises OSError."""
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            return file.read(self.size)

    def open(self) -> EncodedImage:
        """Read the encoded image and its header; raises UndecodableImageError."""
        with naming_errors(str(self)):
            data = self.read()
        return EncodedImage(data, str(self))

    def image_size(self) -> tuple[int, int]:
        """Height and width of the upright image, from its header; raises UndecodableImageError."""
        if not self.member:
            return image_size(self.path)
        image = self.open()
        return image.height, image.width


class ImageFiles(Dataset):
    """Images in files of their own, under one folder.

    Attributes:
        summary: number and suffixes of the images, number of folders.
    """

    def __init__(self, folder: str, names: Iterable[str]):
        self.folder = folder
        names = list(names)
        self._names = _pack(names)
        folders = len({os.path.dirname(name) for name in names})
        where = f"{folders} folder{'s' if folders != 1 else ''}"
        self.summary = f"{len(names)} images ({suffix_counts(names)}) in {where}"

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> StoredImage:
        return StoredImage(os.path.join(self.folder, _unpack(self._names[index])))


class ShardedImages(Dataset):
    """Images inside uncompressed tar files, indexed once so that each can be read directly.

    The index is made from headers only; a million images take one or two minutes.

    Args:
        shards: the tar files.

    Attributes:
        summary: number and suffixes of the images, number of shards.

    Raises:
        ValueError: a shard is not an uncompressed tar file.
        OSError: a shard cannot be read.
    """

    def __init__(self, shards: Sequence[str]):
        self.shards = list(shards)
        logger.info("Indexing %d tar shards", len(self.shards))
        names: list[str] = []
        extents: list[tuple[int, int]] = []
        starts = [0]
        for shard in self.shards:
            for name, offset, size in _tar_index(shard):
                names.append(name)
                extents.append((offset, size))
            starts.append(len(names))
        self._names = _pack(names)
        self._extents = torch.tensor(extents, dtype=torch.int64).reshape(-1, 2)
        self._starts = np.array(starts)
        self.summary = (
            f"{len(names)} images ({suffix_counts(names)}) in {len(self.shards)} tar shards"
        )

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> StoredImage:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        offset, size = self._extents[index].tolist()
        return StoredImage(self.shards[shard], _unpack(self._names[index]), offset, size)

    def permutation(self, rng: np.random.Generator) -> np.ndarray:
        """The order of an epoch, (len(self),) int64: see ``SHARDS_AT_A_TIME``."""
        images = np.split(np.arange(len(self)), self._starts[1:-1])
        shards = rng.permutation(len(self.shards)).tolist()
        return np.concatenate(
            [
                rng.permutation(
                    np.concatenate([images[s] for s in shards[i : i + SHARDS_AT_A_TIME]])
                )
                for i in range(0, len(shards), SHARDS_AT_A_TIME)
            ]
        )


@lru_cache(maxsize=8)
def find_images(dataset: str) -> ImageFiles | ShardedImages:
    """Find the images of a dataset. A process searches for each dataset once.

    Args:
        dataset: a folder, an image, a list file, ``JSON:FOLDER`` or tar shards: see the head of
            this module.

    Returns:
        :class:`StoredImage` by index, in an order that depends on the names only.

    Raises:
        ValueError: there is no image, or the string or a file is malformed; one line.
        FileNotFoundError: a file or a folder does not exist; one line.
    """
    images: ImageFiles | ShardedImages
    if pair := re.fullmatch(r"(.+?\.json):(.+)", dataset, re.IGNORECASE):
        images = _coco_images(*map(os.path.expanduser, pair.groups()))
    elif dataset.lower().endswith(".tar"):
        images = ShardedImages(_expand(os.path.expanduser(dataset)))
    else:
        path = os.path.expanduser(dataset)
        if os.path.isdir(path):
            images = ImageFiles(path, walk_images(path))
        elif os.path.isfile(path):
            images = _listed_images(path)
        else:
            raise FileNotFoundError(f"{dataset}: no such folder or list of images; check the path")
    if not len(images):
        raise ValueError(f"{dataset}: there is no image ({', '.join(IMAGE_SUFFIXES)})")
    return images


def _pack(names: Iterable[str]) -> Tensor:
    """Strings as (number, length of the longest) uint8, padded with zeros.

    Worker processes share a tensor, however they are started; each would have its own copy of a
    list.
    """
    array = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
    return torch.from_numpy(array.view(np.uint8).reshape(len(array), array.itemsize))


def _unpack(row: Tensor) -> str:
    return os.fsdecode(row.numpy().tobytes().rstrip(b"\0"))


def _listed_images(path: str) -> ImageFiles:
    folder, file_name = os.path.split(path)
    if is_image_file(path):
        return ImageFiles(folder, [file_name])
    if path.lower().endswith(".json"):
        raise ValueError(f"dataset '{path}': add the image folder, as in {path}:FOLDER")
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a list of images, one path per line, in UTF-8") from error
    return _existing(ImageFiles(folder, names), path)


def _coco_images(json_file: str, folder: str) -> ImageFiles:
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such image folder; check the path")
    try:
        with open(json_file, "rb") as file:  # as bytes: json detects the encoding
            names = [os.fspath(image["file_name"]) for image in json.load(file)["images"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{json_file}: not a COCO json, which lists images by name") from error
    paths = locate(names, folder, json_file, complete=False)  # absent ones count as undecodable
    images = ImageFiles(folder, [os.path.relpath(path, folder) for path in paths])
    return _existing(images, json_file)


def _existing(images: ImageFiles, source: str) -> ImageFiles:
    """Check the first image: paths are mostly all right or all wrong, and checking takes time."""
    if len(images) and not os.path.isfile(images[0].path):
        raise FileNotFoundError(
            f"{images[0]}: no such image, though {source} lists it; check where its paths start"
        )
    return images


def _expand(patterns: str) -> list[str]:
    """The tar files that patterns with braces and wildcards stand for, in their order."""
    shards: list[str] = []
    for path in (path for pattern in patterns.split("::") for path in braceexpand(pattern)):
        found = [path] if os.path.isfile(path) else sorted(glob(path))
        if not found:
            raise FileNotFoundError(f"{path}: no such tar shard; check the path")
        shards += found
    return shards


def _tar_index(shard: str) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and size of each image in a tar file; only its headers are read."""
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                # WebDataset's extension begins at the first dot: that of a.seg.png is not .png.
                stem, dot, extension = os.path.basename(member.name).partition(".")
                if member.isfile() and stem and f"{dot}{extension.lower()}" in IMAGE_SUFFIXES:
                    yield member.name, member.offset_data, member.size
                # It would keep the headers of all members.
                archive.members = []  # type: ignore[attr-defined]
    except tarfile.TarError as error:
        raise ValueError(f"{shard}: not a whole, uncompressed tar file ({error})") from error
