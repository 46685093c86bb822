"""Read one COCO json and check it before anything trains on it.

detectron2's ``load_coco_json`` trusts its input: an annotation of an absent image is dropped
silently, an absent image file is met hours later inside a worker, a mask without area turns into
an infinite box. `inspect` finds all of that in one pass over the file, and says it in one line.
"""

import functools
import gc
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pycocotools.mask as mask_util

# Twice the area (square pixels) below which three vertices count as lying on one line: above the
# rounding error of coordinates up to 10^4, far below anything that covers a pixel.
_MIN_CROSS = 1e-6


@dataclass(frozen=True)
class CocoFile:
    """What one COCO json holds.

    Attributes:
        path: the file.
        num_images: number of entries in ``images``.
        categories: dataset id -> name, in the order of detectron2's contiguous ids (by dataset id).
        has_masks: whether any annotation that is not a crowd region has a mask.
        file_names: ``file_name`` of every image, as written in the file.
        num_faulty: number of annotations `area_fault` objects to.
        first_fault: one line on the first of them; empty without any.
        faulty_images: ids of the images that have such annotations.
    """

    path: str
    num_images: int
    categories: dict[int, str]
    has_masks: bool
    file_names: tuple[str, ...]
    num_faulty: int
    first_fault: str
    faulty_images: frozenset


def inspect(json_file: str, *, needs_annotations: bool = True) -> CocoFile:
    """Read and check a COCO json, once: the answer is kept until its size or time stamp changes.

    Args:
        json_file: path of the json.
        needs_annotations: False accepts a file without ``annotations``, like COCO's test sets.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a COCO json, or its parts contradict each other; one line that
            names the file, the id and what to do.
    """
    if not os.path.isfile(json_file):
        raise FileNotFoundError(f"{json_file}: no such annotation file; check the path")
    stat = os.stat(json_file)
    with collector_paused():
        return _inspect(json_file, needs_annotations, (stat.st_mtime_ns, stat.st_size))


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector, which walks all of a large json again and again while it grows.

    Reading COCO train2017 takes about half the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_images(coco_file: CocoFile, image_root: str) -> None:
    """Check that every image of a json is in its folder, with one directory listing per folder.

    Raises:
        FileNotFoundError: the folder or some of the images are absent.
    """
    if not os.path.isdir(image_root):
        raise FileNotFoundError(
            f"{image_root}: no such image folder (for {coco_file.path}); check the path"
        )
    listings: dict[str, set[str]] = {}
    absent = []
    for file_name in coco_file.file_names:
        folder, name = os.path.split(os.path.join(image_root, file_name))
        if folder not in listings:
            listings[folder] = _list_folder(folder)
        if name in listings[folder]:
            continue
        # A listing does not know of file systems that ignore case: they have the last word.
        if not (listings[folder] and os.path.exists(os.path.join(folder, name))):
            absent.append(file_name)
    if absent:
        raise FileNotFoundError(
            f"{image_root}: {len(absent)} of the {coco_file.num_images} images of {coco_file.path} "
            f"are not in this folder, the first is {absent[0]}; check the folder or complete it"
        )


def area_fault(annotation: Mapping[str, Any], needs_mask: bool) -> str | None:
    """Say what keeps an annotation from being a training target, or None.

    It takes annotations as they are in the json and as ``load_coco_json`` converts them. Crowd
    regions are never targets, so nothing is asked of them. A mask has no area when each of its
    polygons has fewer than three vertices or all of them on one line, or when its run lengths
    cover no pixel.

    Args:
        annotation: with ``bbox`` as x, y, width, height in pixels.
        needs_mask: whether a mask must be there, because other annotations of the set have one.
    """
    if annotation.get("iscrowd", 0):
        return None
    width, height = annotation["bbox"][2:]
    if not (width > 0 and height > 0):
        return f"its box has no area (width {width:g}, height {height:g})"
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return "it has no mask, though others have one" if needs_mask else None
    if isinstance(segmentation, Mapping):
        counts = segmentation["counts"]
        area = sum(counts[1::2]) if isinstance(counts, list) else mask_util.area(segmentation)
        return None if area > 0 else "its mask has no area"
    return None if any(map(_has_area, segmentation)) else "its mask has no area"


@functools.lru_cache(maxsize=16)
def _inspect(path: str, needs_annotations: bool, version: tuple[int, int]) -> CocoFile:
    data = _read(path, needs_annotations)
    categories = _check_categories(path, data["categories"])
    sizes, file_names = _check_images(path, data["images"])

    # The annotation ids of minival2014 are not unique; detectron2 lets that file pass by its name.
    unique_ids = "minival" not in path
    seen = set()
    num_masks = 0
    faults, without_mask = [], []
    for index, annotation in enumerate(data.get("annotations", [])):
        try:
            problem = _contradiction(annotation, sizes, categories)
        except (KeyError, TypeError) as error:
            name = annotation.get("id", f"number {index} of the list")
            detail = f"no {error}" if isinstance(error, KeyError) else "a value of the wrong type"
            raise ValueError(
                f"{path}: annotation {name} has {detail}; write it as COCO does, or remove it"
            ) from error
        annotation_id = annotation["id"]
        if problem is None and unique_ids and annotation_id in seen:
            problem = "has an id that another annotation has too; give each its own"
        if problem is not None:
            raise ValueError(f"{path}: annotation {annotation_id} {problem}")
        seen.add(annotation_id)

        fault = area_fault(annotation, needs_mask=False)
        if fault is not None:
            faults.append((index, annotation_id, fault, annotation["image_id"]))
        if not annotation.get("iscrowd", 0):
            if annotation.get("segmentation"):
                num_masks += 1
            elif fault is None:
                without_mask.append(index)

    if num_masks:  # only now is it known that a missing mask is a fault rather than a set of boxes
        for index in without_mask:
            annotation = data["annotations"][index]
            fault = area_fault(annotation, needs_mask=True)
            faults.append((index, annotation["id"], str(fault), annotation["image_id"]))
        faults.sort()
    first_fault = (
        f"annotation {faults[0][1]} cannot be trained on: {faults[0][2]}" if faults else ""
    )
    faulty_images = frozenset(fault[3] for fault in faults)
    return CocoFile(
        path=path,
        num_images=len(file_names),
        categories=categories,
        has_masks=num_masks > 0,
        file_names=file_names,
        num_faulty=len(faults),
        first_fault=first_fault,
        faulty_images=faulty_images,
    )


def _read(path: str, needs_annotations: bool) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(
            f"{path}: not a complete json file ({error}); write or fetch it again"
        ) from error
    if not isinstance(data, dict):
        found = "a list, as COCO result files do" if isinstance(data, list) else "a single value"
        raise ValueError(
            f"{path}: holds {found}; a COCO annotation file holds an object with images, "
            "annotations and categories"
        )
    required = ["images", "categories"] + ["annotations"] * (
        needs_annotations or "annotations" in data
    )
    for key in required:
        value = data.get(key)
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            found = f"{key!r} is not a list of objects" if key in data else f"there is no {key!r}"
            raise ValueError(
                f"{path}: not a COCO annotation file, {found}; "
                "it must hold images, annotations and categories"
            )
    return data


def _check_categories(path: str, entries: list[dict]) -> dict[int, str]:
    categories: dict[int, str] = {}
    for entry in entries:
        category_id: Any = entry.get("id")
        name = entry.get("name")
        if not _is_whole(category_id) or not isinstance(name, str):
            raise ValueError(
                f"{path}: a category needs an integer id and a name, but one is {_short(entry)}"
            )
        if category_id in categories:
            raise ValueError(f"{path}: two categories have the id {category_id}; give each its own")
        categories[category_id] = name
    if not categories:
        raise ValueError(f"{path}: there are no categories; list at least one")
    return dict(sorted(categories.items()))  # load_coco_json numbers the classes by ascending id


def _check_images(path: str, entries: list[dict]) -> tuple[dict[int, list[int]], tuple[str, ...]]:
    """Return image id -> [height, width], and the file names."""
    sizes: dict[int, list[int]] = {}
    for entry in entries:
        image_id: Any = entry.get("id")
        file_name = entry.get("file_name")
        size: list[Any] = [entry.get("height"), entry.get("width")]
        if not _is_whole(image_id) or not file_name or not isinstance(file_name, str):
            raise ValueError(
                f"{path}: an image needs an integer id and a file_name, but one is {_short(entry)}"
            )
        if not all(_is_whole(side) and side > 0 for side in size):
            raise ValueError(
                f"{path}: image {image_id} needs a height and a width in pixels, not {_short(size)}"
            )
        if image_id in sizes:
            raise ValueError(f"{path}: two images have the id {image_id}; give each its own")
        sizes[image_id] = size
    if not sizes:
        raise ValueError(f"{path}: there are no images; list at least one")
    return sizes, tuple(entry["file_name"] for entry in entries)


def _contradiction(
    annotation: dict, sizes: dict[int, list[int]], categories: dict[int, str]
) -> str | None:
    """Say what makes an annotation impossible to load, as the end of a sentence, or None.

    Raises:
        KeyError, TypeError: a part is absent or of the wrong type.
    """
    hash(annotation["id"])
    image_id, category_id, box = (annotation[key] for key in ("image_id", "category_id", "bbox"))
    if image_id not in sizes:
        return f"points to image {image_id!r}, which is absent; remove it or add the image"
    if category_id not in categories:
        return f"points to category {category_id!r}, which is absent; remove it or add the category"
    if len(box) != 4 or not all(map(math.isfinite, box)):
        return f"has the box {_short(box)}; give four finite numbers: x, y, width, height"
    if annotation.get("ignore", 0):
        return 'has "ignore", which detectron2 does not support; remove it or set "iscrowd" instead'
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return None
    if isinstance(segmentation, dict):
        counts, size = segmentation["counts"], segmentation["size"]
        if list(size) != sizes[image_id]:
            return f"has a mask of {_short(size)} pixels, but its image has {sizes[image_id]}"
        if isinstance(counts, list):
            if min(counts, default=0) < 0 or sum(counts) != size[0] * size[1]:
                return "has run lengths that do not add up to its image; encode the mask again"
        elif not isinstance(counts, str):
            return 'has "counts" that are neither a list nor a string; encode the mask again'
        return None
    for polygon in segmentation:
        if not isinstance(polygon, list):
            return "has a mask that is not a list of polygons; write [[x, y, x, y, ...], ...]"
        if not math.isfinite(sum(polygon)):
            return "has a polygon with a coordinate that is not finite; remove or correct it"
    return None


def _has_area(polygon: Any) -> bool:
    """Whether a polygon x, y, x, y, ... has three vertices that are not on one line.

    Unlike the signed area this is done after three or four vertices, and does not take a figure of
    eight for nothing.
    """
    if len(polygon) < 6 or len(polygon) % 2:
        return False
    x0, y0 = polygon[0], polygon[1]
    dx = dy = 0.0
    for k in range(2, len(polygon), 2):
        x, y = polygon[k] - x0, polygon[k + 1] - y0
        if abs(dx * y - dy * x) > _MIN_CROSS:
            return True
        if abs(x) + abs(y) > abs(dx) + abs(dy):  # a direction from two near points says nothing
            dx, dy = x, y
    return False


def _list_folder(folder: str) -> set[str]:
    if not os.path.isdir(folder):
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | float) and value == value // 1 and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
