"""What a dataset holds, said before the first iteration: found, used, left out and why.

Whether the image files of a dataset have the annotated sizes.

The classes of a model and the categories of a dataset, matched by name.

Records in detectron2's format, made of the clean form of a COCO json.
"""

import logging
import math
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.data import MetadataCatalog, print_instances_class_histogram
from detectron2.structures import BoxMode

from crossmae_det.detection.coco_annotations import area_fault, id_order
from crossmae_det.detection.coco_json import CocoFile, CocoInfo, collector_paused, fault_line, load
from crossmae_det.utils.image_files import locate
from crossmae_det.utils.image_reading import UndecodableImageError, image_size

logger = logging.getLogger(__name__)


Record = dict[str, Any]


CROWDS_ONLY = "with nothing but crowd regions"

KEEP_CROWDS = (
    "dataloader.train.dataset.crowd=keep makes them objects (dataloader.test for a test set)"
)


_logged: set[str] = set()


class Summary:
    """Counts images and objects on their way from the annotations to the loader.

    Attributes:
        found: images in the annotations.
        skipped: reason -> number of images left out.
        faulty: annotations left out because nothing can be trained on them.
    """

    def __init__(self) -> None:
        self.found = 0
        self.skipped: Counter[str] = Counter()
        self.faulty = 0
        self._skipped_crowds = 0

    def filter_empty(self, records: Sequence[Record]) -> list[Record]:
        """The records that have an annotation that is not a crowd region."""
        kept = []
        for record in records:
            annotations = record["annotations"]
            if any(not annotation.get("iscrowd", 0) for annotation in annotations):
                kept.append(record)
            elif annotations:
                self.skipped[CROWDS_ONLY] += 1
                self._skipped_crowds += len(annotations)
            else:
                self.skipped["without objects"] += 1
        return kept

    def log(self, source: str, records: Sequence[Record], classes: Sequence[str] | None) -> None:
        """Log what is used, once for as long as it stays the same.

        Args:
            source: the dataset.
            records: those that are used.
            classes: names of the classes; None where the data have none.
        """
        lines = [f"{self.found} images found, {len(records)} images left to use"]
        lines += [f"Images left out: {count} {reason}" for reason, count in self.skipped.items()]
        sides = [(r["width"], r["height"]) for r in records if "width" in r and "height" in r]
        if sides:
            widths, heights = zip(*sides, strict=True)
            lines.append(
                f"Image sizes: {min(widths)} to {max(widths)} pixels wide, "
                f"{min(heights)} to {max(heights)} high"
            )
        annotated = any(record.get("annotations") for record in records)
        if annotated:
            lines += self._objects(records, classes or ())
        text = "\n  ".join([f"Data of {source}", *lines])
        if text not in _logged:
            _logged.add(text)
            logger.info(text)
            if annotated and classes:
                print_instances_class_histogram(records, classes)

    def _objects(self, records: Sequence[Record], classes: Sequence[str]) -> list[str]:
        annotations = [a for record in records for a in record["annotations"]]
        objects = [a for a in annotations if not a.get("iscrowd", 0)]
        found = len({annotation["category_id"] for annotation in objects})
        lines = [f"Objects: {len(objects)} in {found} of {len(classes)} classes"]
        without_mask = sum(not annotation.get("segmentation") for annotation in objects)
        if 0 < without_mask < len(objects):
            lines.append(
                f"Objects without a mask: {without_mask}, which count for the boxes only and are "
                "left out of the mask loss"
            )
        if crowds := len(annotations) - len(objects) + self._skipped_crowds:
            lines.append(
                f"Crowd regions: {crowds} annotations with iscrowd: 1 are no objects; {KEEP_CROWDS}"
            )
        if self.faulty:
            lines.append(f"Annotations left out: {self.faulty} that cannot be trained on")
        return lines


# The headers of some thousand images on a slow disk, and of all in most datasets.
HEADER_SECONDS = 10.0


_checked: set[tuple[Any, ...]] = set()


def check_headers(
    records: Sequence[dict[str, Any]],
    source: str,
    *,
    skip_undecodable: bool | None = None,
    key: tuple[Any, ...] = (),
    seconds: float | None = None,
) -> None:
    """Compare the annotated sizes with the headers of the image files, before anything trains.

    As many as can be read in ``seconds``, in a fixed random order. What passed is not read again
    in the life of the process.

    Args:
        records: in detectron2's format, with ``file_name``, ``height`` and ``width``.
        source: the annotations, for messages.
        skip_undecodable: warn of images that training will skip, rather than raise. None: it cannot
            skip them.
        key: identifies the records, for as long as their files stay as they are.
        seconds: None for `HEADER_SECONDS`.

    Raises:
        UndecodableImageError: an image cannot be read, or has another size; one line.
    """
    if key and key in _checked:
        return
    seconds = HEADER_SECONDS if seconds is None else seconds
    start = time.monotonic()
    order = list(range(len(records)))
    random.Random(0).shuffle(order)
    problems: list[str] = []
    read = 0
    for index in order:
        if time.monotonic() - start > seconds:
            break
        read += 1
        problem = _header_problem(records[index], source)
        if problem is None:
            continue
        problems.append(problem)
        if not skip_undecodable:
            advice = "correct it, replace the file or take it out of the dataset"
            if skip_undecodable is not None:
                advice += ", or pass dataloader.train.skip_undecodable=True to skip such images"
            raise UndecodableImageError(f"{problem}; {advice}", records[index]["file_name"])
    if problems:
        logger.warning(
            "%s: %d of %d checked images will be skipped in training (first: %s)",
            source,
            len(problems),
            read,
            problems[0],
        )
    logger.info(
        "%s: the headers of %d of %d images were read in %.1f s, sizes agree",
        source,
        read - len(problems),
        len(records),
        time.monotonic() - start,
    )
    if key:
        _checked.add(key)


def _header_problem(record: dict[str, Any], source: str) -> str | None:
    try:
        height, width = image_size(record["file_name"])
    except UndecodableImageError as error:
        return str(error)
    annotated = record.get("width", width), record.get("height", height)
    if (width, height) == annotated:
        return None
    turned = " (an image that was turned?)" if (height, width) == annotated else ""
    return (
        f"{record['file_name']}: the image is {width}x{height} pixels, but {source} says "
        f"{annotated[0]}x{annotated[1]}{turned}"
    )


def category_indices(
    own: Mapping[int, str],
    classes: Mapping[int, str],
    source: str,
    reference: str = "the model",
) -> dict[int, int]:
    """Map the category ids of a dataset to the classes of a model, by name.

    Ids and their order are the exporter's choice and may differ; names may not.

    Args:
        own: category id -> name of the dataset.
        classes: id -> name, in the order of the model's classes.
        source: the dataset, for messages.
        reference: whose ``classes`` they are, for messages.

    Returns:
        Category id of the dataset -> index of the class.

    Raises:
        ValueError: a name is missing or new, or is there twice; one line that names it.
    """
    for names, owner in ((own, source), (classes, reference)):
        if len(set(names.values())) < len(names):
            values = list(names.values())
            twice = next(name for name in values if values.count(name) > 1)
            raise ValueError(
                f"{owner}: two categories are named {twice!r}, so that they cannot be matched by "
                "name; rename one of them"
            )
    indices = {name: index for index, name in enumerate(classes.values())}
    new = {id_: name for id_, name in own.items() if name not in indices}
    missing = {id_: name for id_, name in classes.items() if name not in own.values()}
    if new or missing:
        parts = [f"it lacks {_first(missing)}"] * bool(missing) + [f"it adds {_first(new)}"] * bool(
            new
        )
        raise ValueError(
            f"{source}: its categories are not those of {reference}: {' and '.join(parts)}; use "
            "data with the same category names (ids may differ), or train a model for these"
        )
    return {id_: indices[name] for id_, name in own.items()}


def dataset_categories(name: str, info: CocoInfo | None) -> dict[int, str]:
    """Category id -> name of a registered dataset, in the order of its classes.

    Args:
        name: the registered name; its metadata decide, as they do in detectron2.
        info: the COCO json of the dataset, where it has one.

    Raises:
        ValueError: neither has names.
    """
    metadata = MetadataCatalog.get(name)
    classes = metadata.get("thing_classes")
    if info is not None:
        ids_of = {category: id_ for id_, category in info.categories.items()}
        if classes is None:
            return dict(info.categories)
        if sorted(classes) == sorted(ids_of):  # ids may have changed since it was registered
            return {ids_of[category]: category for category in classes}
    if classes is None:
        raise ValueError(
            f"dataset {name!r} has no class names; set MetadataCatalog.get(name).thing_classes"
        )
    ids = metadata.get("thing_dataset_id_to_contiguous_id")
    if ids is None:
        return dict(enumerate(classes))
    # Several dataset ids may share a class: the first of them stands for it.
    first = {contiguous: id_ for id_, contiguous in sorted(ids.items(), reverse=True)}
    return {first[contiguous]: classes[contiguous] for contiguous in sorted(first)}


def json_indices(name: str, info: CocoInfo, own: Mapping[int, str]) -> dict[int, int]:
    """Map the category ids of a json to the classes of the dataset that was registered with it.

    Args:
        name: the registered name.
        info: its COCO json.
        own: its categories, from `dataset_categories`.

    Returns:
        Category id -> index of the class. Several ids may share a class, and categories that the
        dataset leaves out are left out, where its metadata say so.

    Raises:
        ValueError: the metadata have other classes than the json, and do not say which is which.
    """
    if own.keys() == info.categories.keys() and set(own.values()) == set(info.categories.values()):
        return {id_: index for index, id_ in enumerate(own)}
    ids = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id") or {}
    indices = {id_: ids[id_] for id_ in info.categories if id_ in ids}
    if not indices:
        raise ValueError(
            f"{info.path}: its categories are not those that {name} is registered with; "
            "give the dataset as JSON:IMAGE_FOLDER instead"
        )
    return indices


def _first(categories: Mapping[int, str], count: int = 3) -> str:
    shown = [f"{name!r} (id {id_})" for id_, name in list(categories.items())[:count]]
    more = f" and {len(categories) - count} more" if len(categories) > count else ""
    return ", ".join(shown) + more


def check_crowd(crowd: str) -> None:
    """Raise a ValueError of one line unless ``crowd`` is "ignore" or "keep"."""
    if crowd not in ("ignore", "keep"):
        raise ValueError(f"crowd={crowd!r}: choose ignore or keep")


def load_records(
    json_file: str,
    image_root: str,
    indices: Mapping[int, int],
    *,
    invalid_annotations: str = "skip",
    crowd: str = "ignore",
    summary: Summary | None = None,
    needs_annotations: bool = True,
) -> list[dict[str, Any]]:
    """Load the records of a COCO json, by ascending image id.

    Args:
        json_file: the json.
        image_root: the folder of its images, which are looked for; or an address, which is not.
        indices: category id -> index of the class.
        invalid_annotations: "error" raises where an annotation cannot be trained on, "skip" leaves
            it out with a warning.
        crowd: "keep" makes crowd regions objects like any other.
        summary: counts what is left out.
        needs_annotations: False accepts a json without annotations.

    Returns:
        As detectron2's ``load_coco_json``, without keypoints. The lists of numbers in them are
        shared with other records of the file: copy before you write.

    Raises:
        ValueError, FileNotFoundError: as `crossmae_det.detection.coco_json.load` and
            `crossmae_det.utils.image_files.locate`, or for "error"; one line.
    """
    summary = summary or Summary()
    with collector_paused():
        file = load(json_file, needs_annotations=needs_annotations)
        names = [image["file_name"] for image in file.images]
        if "://" in image_root:
            paths = [os.path.join(image_root, name) for name in names]
        else:
            paths = locate(names, image_root, file.path)
        left_out = _faults(file, invalid_annotations, crowd)
        summary.faulty += len(left_out)
        objects = defaultdict(list)
        for index, annotation in enumerate(file.annotations):
            if index in left_out:
                continue
            made = {
                "iscrowd": 0 if crowd == "keep" else annotation["iscrowd"],
                "bbox": annotation["bbox"],
                "category_id": indices[annotation["category_id"]],
                "bbox_mode": BoxMode.XYWH_ABS,
            }
            if "segmentation" in annotation:
                made["segmentation"] = annotation["segmentation"]
            objects[annotation["image_id"]].append(made)
        records = [
            {
                "file_name": path,
                "height": image["height"],
                "width": image["width"],
                "image_id": image["id"],
                "annotations": objects[image["id"]],
            }
            for image, path in zip(file.images, paths, strict=True)
        ]
    return sorted(records, key=lambda record: id_order(record["image_id"]))


def adapt_records(
    records: Sequence[dict[str, Any]],
    file: CocoFile | None,
    remap: Mapping[int, int] | None,
    *,
    invalid_annotations: str = "skip",
    crowd: str = "ignore",
    summary: Summary,
) -> list[dict[str, Any]]:
    """Records that a dataset's own function made, with the classes and choices asked for.

    Args:
        records: in detectron2's format; they are not modified.
        file: the json that they are from, whose faulty annotations are left out of them.
        remap: class index there -> class index here; None where they are the same.
        invalid_annotations, crowd, summary: as in `load_records`.
    """
    faulty = file is not None and bool(_faults(file, invalid_annotations, crowd))
    adapted = []
    for record in records:
        if "annotations" not in record or not (faulty or remap or crowd == "keep"):
            adapted.append(record)
            continue
        size = record.get("height", math.inf), record.get("width", math.inf)
        annotations = []
        for annotation in record["annotations"]:
            changed = dict(annotation)
            if crowd == "keep":
                changed["iscrowd"] = 0
            if faulty and area_fault(changed, *size) is not None:
                summary.faulty += 1
                continue
            if remap is not None:
                changed["category_id"] = remap[changed["category_id"]]
            annotations.append(changed)
        adapted.append({**record, "annotations": annotations})
    return adapted


def _faults(file: CocoFile, invalid_annotations: str, crowd: str) -> dict[int, str]:
    """The annotations to leave out, by index; whoever asked for an error gets it."""
    faults = {
        index: fault
        for index, fault in file.faults.items()
        if crowd == "keep" or not file.annotations[index]["iscrowd"]
    }
    if not faults:
        return faults
    index, fault = next(iter(faults.items()))
    first = fault_line(file.annotations[index], fault)
    if invalid_annotations == "error":
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(
            f"{file.path}: {first}{more}; correct it, or "
            "set dataloader.train.dataset.invalid_annotations=skip to leave such annotations "
            "out (dataloader.test for a test set)"
        )
    logger.warning("%s: left out %d annotations; the first: %s", file.path, len(faults), first)
    return faults
