"""A folder of masks: ``images/`` and ``masks/``, of one class or with a folder for each.

For ``images/NAME.jpg``, one of:

- ``masks/NAME.png`` or ``masks/NAME_mask.png``: the pixels of each object have a value (or color)
  of their own, the background is 0 (black);
- ``masks/NAME/*.png``: a file for each object, whose pixels are not 0.

With several classes, the same below ``masks/CLASS/``. Without, the class is "object". The layout of
the 2018 Data Science Bowl, ``NAME/images/`` and ``NAME/masks/*.png``, is read as well. Splits are
folders such as ``train/`` and ``val/``, each in this layout.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from crossmae_det.detection.formats.content import (
    Collector,
    Content,
    by_stem,
    encode,
    existing_folder,
    find_files,
    image_sizes,
    read_classes,
)
from crossmae_det.detection.formats.spec import Spec, choose_split, split_folders
from crossmae_det.utils.image_reading import naming_errors
from crossmae_det.utils.messages import list_names

DEFAULT_CLASS = "object"

_IMAGES, _MASKS = "images", "masks"
_LOSSLESS = (".png", ".tif", ".tiff", ".bmp", ".gif")
_SUFFIX = "_mask"  # that a mask may have behind the name of its image

# More values than a mask of instances has: colors of a photograph, or a lossy format.
_MAX_OBJECTS = 10_000


@dataclass(frozen=True)
class _Mask:
    """A mask file below the folder; ``single``: it holds one object."""

    image: str  # path without suffix below images/
    label: str
    file: str
    single: bool


def splits(spec: Spec) -> list[str]:
    """The folders that are named like splits; [] without any."""
    return list(_folders(spec.path))


def read(spec: Spec) -> Content:
    """Read one split. Every mask is decoded, once.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: a mask cannot be read, or belongs to no image; one line that names the file.
    """
    existing_folder(spec.path, spec.text)
    folders = _folders(spec.path)
    split = choose_split(spec, folders)
    classes, class_file = read_classes(spec.path)
    collector = Collector(spec.path, classes, class_file)
    collector.uses(spec.path, *[class_file] * bool(class_file))
    for name, folder in folders.items():
        if name != split:  # the classes are those of every split
            for mask in _find(spec, folder, collector, complete=False)[1]:
                collector.see_class(mask.label, os.path.join(folder, mask.file))
    folder = folders[split] if split else spec.path
    images, masks = _find(spec, folder, collector)
    by_image: dict[str, list[_Mask]] = {stem: [] for stem in images}
    for mask in masks:
        by_image[mask.image].append(mask)
    paths = [os.path.join(folder, name) for name in images.values()]
    collector.uses(*paths, *(os.path.join(folder, mask.file) for mask in masks))
    for (stem, name), (height, width) in zip(images.items(), image_sizes(paths), strict=True):
        path = os.path.join(folder, name)
        image_id = collector.image(os.path.relpath(path, spec.path), height, width, path)
        if not by_image[stem]:
            collector.count("images without a mask, read as without objects", path)
        for mask in by_image[stem]:
            _add(os.path.join(folder, mask.file), mask, (height, width), image_id, collector)
    return collector.finish()


def _folders(folder: str) -> dict[str, str]:
    """The folders of splits, where the folder itself has no images."""
    return {} if os.path.isdir(os.path.join(folder, _IMAGES)) else split_folders(folder)


def _find(
    spec: Spec, folder: str, collector: Collector, *, complete: bool = True
) -> tuple[dict[str, str], list[_Mask]]:
    """The images of a folder by their path without suffix, and the masks.

    ``complete`` requires that there are some.
    """
    files = find_files(folder, collector)
    parts = [name.split(os.sep) for name in files]
    if any(p[0] == _IMAGES for p in parts):
        images = by_stem(os.path.join(*p[1:]) for p in parts if p[0] == _IMAGES and p[1:])
        images = {stem: os.path.join(_IMAGES, name) for stem, name in images.items()}
        below = [os.path.join(*p[1:]) for p in parts if p[0] == _MASKS and p[1:]]
        masks = _named_masks(folder, below, images)
    else:  # NAME/images/..., NAME/masks/...
        images = by_stem(n for n, p in zip(files, parts, strict=True) if p[-2:-1] == [_IMAGES])
        owners: dict[str, list[str]] = {}
        for stem in images:
            owners.setdefault(os.path.dirname(os.path.dirname(stem)), []).append(stem)
        if several := [owner for owner, stems in owners.items() if len(stems) > 1]:
            raise ValueError(
                f"{os.path.join(folder, several[0], _IMAGES)}: has several images: keep one, or "
                f"name the folder that has {_IMAGES} and {_MASKS}"
            )
        masks = []
        for name, p in zip(files, parts, strict=True):
            owner = os.path.join(*p[:-2]) if len(p) > 2 else ""
            if p[-2:-1] == [_MASKS] and owner in owners and _is_mask(os.path.join(folder, name)):
                masks.append(_Mask(owners[owner][0], DEFAULT_CLASS, name, True))
    if complete and not images:
        raise FileNotFoundError(
            f"{folder}: there is no image in {_IMAGES}/: the layout is {_IMAGES}/NAME.jpg and "
            f"{_MASKS}/NAME.png; check the dataset {spec.text!r}"
        )
    if complete and not masks:
        raise FileNotFoundError(
            f"{folder}: there is no mask in {_MASKS}/: the layout is {_IMAGES}/NAME.jpg and "
            f"{_MASKS}/NAME.png; check the dataset {spec.text!r}"
        )
    return images, masks


def _named_masks(folder: str, files: Iterable[str], images: dict[str, str]) -> list[_Mask]:
    """The masks below ``masks/``, by the images that their paths name."""
    masks, unknown = [], []
    for name in files:
        if not _is_mask(os.path.join(folder, _MASKS, name)):
            continue
        for label, rest in ((DEFAULT_CLASS, name), tuple(name.partition(os.sep)[::2])):
            stem, above = os.path.splitext(rest)[0], os.path.dirname(rest)
            bare = stem.removesuffix(_SUFFIX)
            image = next((s for s in (stem, bare) if s in images), None)
            if image is None and above in images:
                masks.append(_Mask(above, label, os.path.join(_MASKS, name), True))
                break
            if image is not None:
                masks.append(_Mask(image, label, os.path.join(_MASKS, name), False))
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{os.path.join(folder, _MASKS)}: {list_names(unknown)} belong to no image in "
            f"{_IMAGES}/: name masks like their images, or remove them"
        )
    return masks


def _is_mask(path: str) -> bool:
    suffix = os.path.splitext(path)[1].lower()
    if suffix in (".jpg", ".jpeg", ".webp"):
        raise ValueError(f"{path}: a mask in a lossy format has wrong values: write it as PNG")
    return suffix in _LOSSLESS


def _add(
    path: str, mask: _Mask, size: tuple[int, int], image_id: str, collector: Collector
) -> None:
    """Add the objects of a mask file."""
    values = _read_values(path)
    if values.shape != size:
        (h, w), (height, width) = values.shape, size
        rotated = " (rotated by its EXIF tag?)" if (w, h) == size else ""
        raise ValueError(
            f"{path}: the mask has {w}x{h} pixels, but its image has {width}x{height}{rotated}: "
            "write it again"
        )
    if mask.single:
        if not values.any():
            collector.count("masks without a pixel, left out", path)
            return
        collector.add(image_id, mask.label, path, mask=encode(values != 0))
        return
    found = [int(value) for value in np.unique(values) if value]
    if len(found) > _MAX_OBJECTS:
        raise ValueError(
            f"{path}: has {len(found)} different values, one for each object: write integers "
            "without interpolation"
        )
    if found == [255]:
        collector.count("masks of black and white only, read as one object each", path)
    for value in found:
        source = f"{path}, value {value}"
        collector.add(image_id, mask.label, source, mask=encode(values == value))


def _read_values(path: str) -> np.ndarray:
    """The value of each pixel, (H, W): gray, index of a palette, or color as one number."""
    with naming_errors(path), Image.open(path) as image:
        if image.mode in ("1", "L", "P", "I") or image.mode.startswith("I;16"):
            return np.asarray(image).astype(np.int64)
        if image.mode == "LA":
            return np.asarray(image)[..., 0].astype(np.int64)
        if image.mode == "F":
            values = np.asarray(image)
            if np.mod(values, 1).any():  # also infinity and NaN
                raise ValueError("float values that are not integers: write integers")
            return values.astype(np.int64)
        pixels = np.asarray(image.convert("RGB")).astype(np.int64)
    return pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]
