"""Read one COCO json into one clean form, which training, evaluation and drawing all read.

What a value means is decided here, once: `load` repairs what has one meaning only (an integer that
is written as text, ``"iscrowd": null``, a polygon of two vertices beside good ones) and counts it;
what contradicts itself is one line that names the file, the id and what to do. So nothing that is
met hours later, inside a worker or inside COCO's evaluation, comes from the json.
"""

import gc
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from crossmae_det.detection import coco_annotations
from crossmae_det.detection.coco_annotations import (
    ContradictionError,
    MaskError,
    Repairs,
    clean_annotation,
    identifier,
    whole,
)
from crossmae_det.utils.messages import shorten

logger = logging.getLogger(__name__)


# The content of files up to this size stays in memory, for the next evaluation; together they take
# about ten times as much of it. Of COCO train2017 (450 MB) only the description is kept.
_KEPT_BYTES = 32 * 2**20

_KEPT_DESCRIPTIONS = 32


Version = tuple[int, int]  # time stamp and size


@dataclass(frozen=True)
class CocoInfo:
    """What is known of one COCO json without its content.

    Attributes:
        path: the file.
        version: changes when the file does.
        num_images: number of entries in ``images``.
        num_annotations: number of entries in ``annotations``; None where there is no such key.
        num_crowds: number of crowd regions among them.
        categories: dataset id -> name, by ascending id, as detectron2 numbers the classes.
        has_masks: whether any annotation that is not a crowd region has a mask.
        crowds_have_masks: whether any crowd region has one.
        num_faulty: number of annotations, crowd regions apart, that cannot be trained on.
        first_fault: one line on the first of them; empty without any.
        num_with_objects: images that have an annotation to train on, crowd regions apart.
        num_with_crowds: images that have one, crowd regions included.
        repairs: what was repaired, one line for each kind.
    """

    path: str
    version: Version
    num_images: int
    num_annotations: int | None
    num_crowds: int
    categories: dict[int, str]
    has_masks: bool
    crowds_have_masks: bool
    num_faulty: int
    first_fault: str
    num_with_objects: int
    num_with_crowds: int
    repairs: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class CocoFile:
    """A COCO json in its clean form. It is shared: nobody writes into it.

    Attributes:
        info: see `CocoInfo`.
        images: one dict for each image: ``id``, an integer wherever it is written as one, else
            text; ``file_name`` as in the file; ``height`` and ``width`` in pixels, integers.
        annotations: one dict for each: ``id``, ``image_id`` and ``category_id``, which are those of
            ``images`` and of ``info.categories``; ``bbox``, four finite numbers x, y, width,
            height; ``iscrowd``, 0 or 1; ``area`` in pixels, None where it has to be computed; and
            ``segmentation`` where there is a mask, see `coco_masks.clean_mask`. Other keys are as
            in the file.
        faults: index into ``annotations`` -> what keeps it from being a training target.
    """

    info: CocoInfo
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    faults: dict[int, str]

    @property
    def path(self) -> str:
        return self.info.path


_descriptions: OrderedDict[tuple[str, Version], CocoInfo] = OrderedDict()

_contents: OrderedDict[tuple[str, Version], CocoFile] = OrderedDict()

_reported: set[tuple[str, Version]] = set()


def inspect(json_file: str, *, needs_annotations: bool = True) -> CocoInfo:
    """Describe a COCO json. It is read and checked whole, and again only when it changes.

    Args:
        json_file: path of the json.
        needs_annotations: False accepts a file without ``annotations``, like COCO's test sets.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a COCO json, or its parts contradict each other; one line that
            names the file, the id and what to do.
    """
    key = _key(json_file)
    info = _descriptions.get(key) or _read_and_keep(json_file, key).info
    if needs_annotations and info.num_annotations is None:
        raise ValueError(
            f"{json_file}: not a COCO annotation file, there is no 'annotations'; "
            "it must hold images, annotations and categories"
        )
    return info


def load(json_file: str, *, needs_annotations: bool = True) -> CocoFile:
    """Read a COCO json in its clean form; what was repaired is logged once for each file.

    Args, Raises: as `inspect`.
    """
    inspect(json_file, needs_annotations=needs_annotations)
    key = _key(json_file)
    file = _contents.get(key) or _read_and_keep(json_file, key)
    if key not in _reported:
        _reported.add(key)
        for line in file.info.repairs:
            logger.warning("%s: %s", json_file, line)
    return file


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


def _key(json_file: str) -> tuple[str, Version]:
    if not os.path.isfile(json_file):
        raise FileNotFoundError(f"{json_file}: no such annotation file; check the path")
    stat = os.stat(json_file)
    return os.path.abspath(json_file), (stat.st_mtime_ns, stat.st_size)


def _read_and_keep(path: str, key: tuple[str, Version]) -> CocoFile:
    with collector_paused():
        file = _clean(path, key[1], _read(path))
    _descriptions[key] = file.info
    if len(_descriptions) > _KEPT_DESCRIPTIONS:
        _descriptions.popitem(last=False)
    if key[1][1] <= _KEPT_BYTES:
        _contents[key] = file
        while sum(size for _, (_, size) in _contents) > _KEPT_BYTES:
            _contents.popitem(last=False)
    return file


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:  # as bytes: json finds out the encoding by itself
            data = json.load(file)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(
            f"{path}: not a complete json file ({error}); write or fetch it again"
        ) from error
    if not isinstance(data, dict):
        found = "a list, as COCO result files do" if isinstance(data, list) else "a single value"
        raise ValueError(
            f"{path}: holds {found}; a COCO annotation file holds an object with images, "
            "annotations and categories"
        )
    for key in ["images", "categories"] + ["annotations"] * ("annotations" in data):
        value = data.get(key)
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            found = f"{key!r} is not a list of objects" if key in data else f"there is no {key!r}"
            raise ValueError(
                f"{path}: not a COCO annotation file, {found}; "
                "it must hold images, annotations and categories"
            )
    return data


def _clean(path: str, version: Version, data: dict[str, Any]) -> CocoFile:
    """Clean the content of a json, in place where it is large."""
    repairs = Repairs()
    categories = _clean_categories(path, data["categories"], repairs)
    images = _clean_images(path, data["images"], repairs)
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    annotations = data.get("annotations", [])
    # The annotation ids of minival2014 are not unique; detectron2 lets that file pass by its name.
    unique_ids = "minival" not in path
    seen: set[Any] = set()
    faults: dict[int, str] = {}
    num_crowds = 0
    masks = [False, False]  # of objects, of crowds
    with_objects, with_crowds = set(), set()
    for index, annotation in enumerate(annotations):
        try:
            fault = clean_annotation(annotation, sizes, categories, repairs)
        except (ContradictionError, MaskError) as error:
            name = annotation.get("id")
            name = f"number {index} of the list" if name is None else shorten(name)
            raise ValueError(f"{path}: annotation {name} {error}") from error
        if unique_ids and annotation["id"] in seen:
            raise ValueError(
                f"{path}: annotation {annotation['id']} has an id that another annotation has too; "
                "give each its own"
            )
        seen.add(annotation["id"])
        crowd = annotation["iscrowd"]
        num_crowds += crowd
        masks[crowd] = masks[crowd] or "segmentation" in annotation
        if fault is not None:
            faults[index] = fault
        else:
            with_crowds.add(annotation["image_id"])
            if not crowd:
                with_objects.add(annotation["image_id"])

    faulty = [index for index in faults if not annotations[index]["iscrowd"]]
    info = CocoInfo(
        path=path,
        version=version,
        num_images=len(images),
        num_annotations=len(annotations) if "annotations" in data else None,
        num_crowds=num_crowds,
        categories=categories,
        has_masks=masks[0],
        crowds_have_masks=masks[1],
        num_faulty=len(faulty),
        first_fault=fault_line(annotations[faulty[0]], faults[faulty[0]]) if faulty else "",
        num_with_objects=len(with_objects),
        num_with_crowds=len(with_crowds),
        repairs=repairs.lines(),
    )
    return CocoFile(info, images, annotations, faults)


def fault_line(annotation: Mapping[str, Any], fault: str) -> str:
    return f"annotation {annotation['id']} cannot be trained on: {fault}"


def _clean_categories(path: str, entries: list[dict], repairs: Repairs) -> dict[int, str]:
    categories: dict[int, str] = {}
    for entry in entries:
        place = ("category", entry.get("id"))
        category_id = whole(entry.get("id"), repairs, place)
        name = entry.get("name")
        if name.__class__ is int:
            name = str(name)
            repairs.add(coco_annotations.CATEGORY_NAME, place)
        if category_id is None or not name or not isinstance(name, str):
            raise ValueError(
                f"{path}: a category needs an integer id and a name, but one is {shorten(entry)}"
            )
        if category_id in categories:
            if categories[category_id] != name:
                raise ValueError(
                    f"{path}: two categories have the id {category_id}; give each its own"
                )
            repairs.add(coco_annotations.CATEGORY, place)
        categories[category_id] = name
    if not categories:
        raise ValueError(f"{path}: there are no categories; list at least one")
    categories = dict(sorted(categories.items()))  # detectron2 numbers classes by ascending id
    first: dict[str, int] = {}
    for category_id, name in categories.items():
        if first.setdefault(name, category_id) != category_id:
            raise ValueError(
                f"{path}: categories {first[name]} and {category_id} have the same name {name!r}; "
                "rename one of them, or give their annotations one id"
            )
    return categories


def _clean_images(path: str, entries: list[dict], repairs: Repairs) -> list[dict[str, Any]]:
    images = []
    seen: set[int | str] = set()
    files: set[str] = set()
    for entry in entries:
        place = ("image", entry.get("id"))
        image_id = identifier(entry.get("id"), repairs, place)
        file_name = entry.get("file_name")
        if image_id is None or not file_name or not isinstance(file_name, str):
            raise ValueError(
                f"{path}: an image needs an integer id and a file_name, but one is {shorten(entry)}"
            )
        height, width = (whole(entry.get(side), repairs, place) for side in ("height", "width"))
        if height is None or width is None or min(height, width) < 1:
            raise ValueError(
                f"{path}: image {image_id} needs a height and a width in pixels, not "
                f"{shorten([entry.get('height'), entry.get('width')])}"
            )
        if image_id in seen:
            raise ValueError(f"{path}: two images have the id {image_id}; give each its own")
        seen.add(image_id)
        if file_name in files:
            repairs.add(coco_annotations.SHARED_FILE, place)
        files.add(file_name)
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
    if not images:
        raise ValueError(f"{path}: there are no images; list at least one")
    return images
