"""Read a COCO json once into a clean form, which training, evaluation and drawing share.

`load` repairs values with a single possible meaning (an integer written as text,
``"iscrowd": null``, a degenerate polygon beside good ones) and counts the repairs. A contradiction
is a one-line error that names the file and the id. So the json cannot cause a failure later, hours
into training or inside COCO's evaluation.

Datasets in another layout, such as ``yolo:data.yaml``, are checked the same way: `formats` reads
them into the form of a json, and their errors name the file and the line that an object is from.
"""

import gc
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from crossmae_det.detection import formats
from crossmae_det.detection.coco_annotations import AnnotationError, ValueReader, clean_annotation
from crossmae_det.utils.messages import shorten

logger = logging.getLogger(__name__)

Version = tuple[int, int]  # time stamp and size of a file

# The content of files of up to this many bytes in total is kept for the next reader; it takes about
# ten times as much memory. Of COCO train2017 (450 MB), only the description is kept.
_KEPT_BYTES = 32 * 2**20

_LAYOUT = "a COCO annotation file is an object with images, annotations and categories"

_descriptions: dict[tuple[str, Version], "CocoInfo"] = {}
_contents: dict[tuple[str, Version], "CocoFile"] = {}
_reported: set[tuple[str, Version]] = set()


@dataclass(frozen=True)
class CocoInfo:
    """A COCO json without its content.

    Attributes:
        path: the file; of another layout, the string that names the dataset.
        version: changes when the file does.
        num_images: number of entries in ``images``.
        num_annotations: number of entries in ``annotations``; None without that key.
        categories: dataset id -> name, by ascending id, as detectron2 numbers the classes.
        has_masks: whether any annotation other than a crowd region has a mask.
        crowds_have_masks: whether any crowd region has one.
        num_with_objects: images with an annotation to train on, crowd regions excluded.
        num_with_crowds: images with an annotation to train on, crowd regions included.
        repairs: what was repaired or left out, one line for each kind.
        image_root: the folder of the images, which only other layouts than a json state.
    """

    path: str
    version: Version
    num_images: int
    num_annotations: int | None
    categories: dict[int, str]
    has_masks: bool
    crowds_have_masks: bool
    num_with_objects: int
    num_with_crowds: int
    repairs: tuple[str, ...]
    image_root: str | None = None


@dataclass(frozen=True, eq=False)
class CocoFile:
    """A COCO json in its clean form. It is shared: do not modify it.

    Attributes:
        info: see `CocoInfo`.
        images: a dict for each image: ``id``, an integer if it can be read as one, else text;
            ``file_name`` as in the file; ``height`` and ``width``, integers in pixels.
        annotations: a dict for each: ``id``; ``image_id`` and ``category_id``, which exist in
            ``images`` and ``info.categories``; ``bbox``, four finite numbers x, y, width, height;
            ``iscrowd``, 0 or 1; ``area`` in pixels, None if it has to be computed; and if there
            is a mask, ``segmentation``, see `coco_annotations.clean_mask`. Other keys are as in
            the file.
        faults: index into ``annotations`` -> why nothing can be trained on it.
        sources: of another layout, where each annotation is from: a file and a line or an object.
    """

    info: CocoInfo
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    faults: dict[int, str]
    sources: Sequence[str] = ()

    def name_of(self, index: int) -> str:
        """The name of an annotation for messages, by its index."""
        if self.sources:
            return self.sources[index]
        return f"{self.info.path}: annotation {self.annotations[index]['id']}"


def inspect(json_file: str, *, needs_annotations: bool = True) -> CocoInfo:
    """Describe a COCO json. It is read and checked completely, and again only when it changes.

    Args:
        json_file: path of the json, or a dataset string that `formats.parse` knows.
        needs_annotations: False accepts a file without ``annotations``, such as COCO's test sets.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a COCO json or contradicts itself; one line that names the file
            and the id.
    """
    key = _key(json_file)
    info = _descriptions.get(key) or _read(json_file, key).info
    if needs_annotations and info.num_annotations is None:
        raise ValueError(f"{json_file}: 'annotations' is missing: {_LAYOUT}")
    return info


def load(json_file: str, *, needs_annotations: bool = True) -> CocoFile:
    """Read a COCO json in its clean form; the repairs are logged once for each file.

    Args, Raises: as `inspect`.
    """
    inspect(json_file, needs_annotations=needs_annotations)
    key = _key(json_file)
    file = _contents.get(key) or _read(json_file, key)
    if key not in _reported:
        _reported.add(key)
        for line in file.info.repairs:
            logger.warning("%s: %s", json_file, line)
    return file


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector, which would traverse a large json repeatedly as it is built.

    Reading COCO train2017 then takes about half the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _key(json_file: str) -> tuple[str, Version]:
    if (spec := formats.parse(json_file)) is not None:
        return formats.version(spec)
    if not os.path.isfile(json_file):
        raise FileNotFoundError(f"{json_file}: no such annotation file: check the path")
    stat = os.stat(json_file)
    return os.path.abspath(json_file), (stat.st_mtime_ns, stat.st_size)


def _read(path: str, key: tuple[str, Version]) -> CocoFile:
    with collector_paused():
        if (spec := formats.parse(path)) is None:
            file = _clean(path, key[1], _parse(path))
        else:
            content = formats.read(spec)
            file = _clean(path, key[1], content.as_coco(), content)
    _descriptions[key] = file.info
    if key[1][1] <= _KEPT_BYTES:
        _contents[key] = file
        while sum(size for _, (_, size) in _contents) > _KEPT_BYTES:
            del _contents[next(iter(_contents))]
    return file


def _parse(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:  # as bytes: json detects the encoding
            data = json.load(file)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(
            f"{path}: not a complete json file ({error}): write or download it again"
        ) from error
    if not isinstance(data, dict):
        found = "a list, as COCO result files do" if isinstance(data, list) else "a single value"
        raise ValueError(f"{path}: holds {found}: {_LAYOUT}")
    for key in ["images", "categories"] + ["annotations"] * ("annotations" in data):
        value = data.get(key)
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            found = f"{key!r} is not a list of objects" if key in data else f"{key!r} is missing"
            raise ValueError(f"{path}: {found}: {_LAYOUT}")
    return data


def _clean(
    path: str, version: Version, data: dict[str, Any], content: formats.Content | None = None
) -> CocoFile:
    """Clean the content of a json; annotations in place. ``content``: where it is from."""
    sources = content.sources if content else ()
    reader = ValueReader(sources)
    categories = _clean_categories(path, data["categories"], reader)
    images = _clean_images(path, data["images"], reader)
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    annotations = data.get("annotations", [])
    # The annotation ids of minival2014 are not unique; detectron2 also exempts it by its name.
    unique_ids = "minival" not in path
    seen: set[Any] = set()
    faults: dict[int, str] = {}
    masks = [False, False]  # of objects, of crowd regions
    with_objects, with_crowds = set(), set()
    for index, annotation in enumerate(annotations):
        try:
            fault = clean_annotation(annotation, sizes, categories, reader)
        except AnnotationError as error:
            if sources:
                raise ValueError(f"{sources[index]} {error}") from error
            id_ = annotation.get("id")
            name = f"number {index} of the list" if id_ is None else shorten(id_)
            raise ValueError(f"{path}: annotation {name} {error}") from error
        if unique_ids and annotation["id"] in seen:
            raise ValueError(
                f"{path}: two annotations have the id {annotation['id']}: give each its own"
            )
        seen.add(annotation["id"])
        crowd = annotation["iscrowd"]
        masks[crowd] |= "segmentation" in annotation
        if fault is not None:
            faults[index] = fault
            continue
        with_crowds.add(annotation["image_id"])
        if not crowd:
            with_objects.add(annotation["image_id"])
    info = CocoInfo(
        path=path,
        version=version,
        num_images=len(images),
        num_annotations=len(annotations) if "annotations" in data else None,
        categories=categories,
        has_masks=masks[0],
        crowds_have_masks=masks[1],
        num_with_objects=len(with_objects),
        num_with_crowds=len(with_crowds),
        repairs=(*(content.notes if content else ()), *reader.repairs()),
        image_root=content.image_root if content else None,
    )
    return CocoFile(info, images, annotations, faults, sources)


def _clean_categories(path: str, entries: list[dict], reader: ValueReader) -> dict[int, str]:
    categories: dict[int, str] = {}
    for entry in entries:
        reader.place = "category", entry.get("id")
        category_id, name = reader.integer(entry.get("id")), entry.get("name")
        if name.__class__ is int:
            name = str(name)
            reader.repair("category names that are numbers, read as text")
        if category_id is None or not name or not isinstance(name, str):
            raise ValueError(f"{path}: category {shorten(entry)}: give it an integer id and a name")
        if category_id in categories:
            if categories[category_id] != name:
                raise ValueError(
                    f"{path}: two categories share the id {category_id}: give each its own"
                )
            reader.repair("categories listed twice, read once")
        categories[category_id] = name
    if not categories:
        raise ValueError(f"{path}: there are no categories: list at least one")
    first: dict[str, int] = {}
    for category_id, name in sorted(categories.items()):
        if first.setdefault(name, category_id) != category_id:
            raise ValueError(
                f"{path}: categories {first[name]} and {category_id} have the same name {name!r}: "
                "rename one of them, or give their annotations one id"
            )
    return dict(sorted(categories.items()))  # detectron2 numbers classes by ascending id


def _clean_images(path: str, entries: list[dict], reader: ValueReader) -> list[dict[str, Any]]:
    images: dict[int | str, dict[str, Any]] = {}
    files: set[str] = set()
    for entry in entries:
        reader.place = "image", entry.get("id")
        image_id, file_name = reader.identifier(entry.get("id")), entry.get("file_name")
        if image_id is None or not file_name or not isinstance(file_name, str):
            raise ValueError(f"{path}: image {shorten(entry)}: give it an id and a file_name")
        height, width = (reader.integer(entry.get(side)) for side in ("height", "width"))
        if height is None or width is None or min(height, width) < 1:
            raise ValueError(
                f"{path}: image {image_id} has the height and width "
                f"{shorten([entry.get('height'), entry.get('width')])}: give them in pixels"
            )
        if image_id in images:
            raise ValueError(f"{path}: two images have the id {image_id}: give each its own")
        if file_name in files:
            reader.repair("images that share the file of an earlier image, but not its objects")
        files.add(file_name)
        images[image_id] = {
            "id": image_id,
            "file_name": file_name,
            "height": height,
            "width": width,
        }
    if not images:
        raise ValueError(f"{path}: there are no images: list at least one")
    return list(images.values())
