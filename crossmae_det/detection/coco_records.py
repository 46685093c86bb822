"""Records in detectron2's format from COCO jsons: classes matched by name, checked, summarized."""

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

from crossmae_det.detection import formats
from crossmae_det.detection.coco_annotations import area_fault, id_order
from crossmae_det.detection.coco_json import CocoFile, CocoInfo, collector_paused
from crossmae_det.utils.image_files import locate
from crossmae_det.utils.image_reading import UndecodableImageError, image_size
from crossmae_det.utils.messages import list_names

logger = logging.getLogger(__name__)

Record = dict[str, Any]

CROWDS_ONLY = "with crowd regions only"
KEEP_CROWDS = (
    "dataloader.train.dataset.crowd=keep makes them objects (dataloader.test for a test set)"
)

# Time limit for reading image headers: enough for most datasets, or for thousands on a slow disk.
HEADER_SECONDS = 10.0

_logged: set[str] = set()
_checked: set[Any] = set()


def check_crowd(crowd: str) -> None:
    """Raise a ValueError unless ``crowd`` is "ignore" or "keep"."""
    if crowd not in ("ignore", "keep"):
        raise ValueError(f"crowd={crowd!r}: choose ignore or keep")


# Classes


def category_indices(
    own: Mapping[int, str],
    classes: Mapping[int, str],
    source: str,
    reference: str = "the model",
) -> dict[int, int]:
    """Map the category ids of a dataset to the classes of a model, by name.

    Ids and their order depend on the exporter and may differ; names may not.

    Args:
        own: category id -> name of the dataset.
        classes: id -> name, in the order of the model's classes.
        source: the dataset, for messages.
        reference: the owner of ``classes``, for messages.

    Returns:
        Category id of the dataset -> index of the class.

    Raises:
        ValueError: a name is missing, unknown or duplicate; one line that contains it.
    """
    for names, owner in ((own, source), (classes, reference)):
        name, count = Counter(names.values()).most_common(1)[0] if names else ("", 0)
        if count > 1:
            raise ValueError(f"{owner}: two categories are named {name!r}: rename one of them")
    indices = {name: index for index, name in enumerate(classes.values())}
    lacks = [name for name in indices if name not in own.values()]
    adds = [name for name in own.values() if name not in indices]
    if lacks or adds:
        differences = [("lacks", lacks), ("adds", adds)]
        text = " and ".join(f"{verb} {list_names(names)}" for verb, names in differences if names)
        layout = formats.parse(source)
        listed = ""
        if layout is not None and layout.layout in formats.INFERRED_CLASSES:
            listed = f"list every class in {os.path.join(layout.path, 'labels.txt')}, "
        raise ValueError(
            f"{source}: its categories differ from those of {reference}: "
            f"it {text}: {listed}use data with the same category names (ids may differ), or train "
            "a model for these"
        )
    return {id_: indices[name] for id_, name in own.items()}


def dataset_categories(name: str, info: CocoInfo | None) -> dict[int, str]:
    """Category id -> name of a registered dataset, in the order of its classes.

    Args:
        name: the registered name; its metadata take precedence, as in detectron2.
        info: the COCO json of the dataset, None without one.

    Raises:
        ValueError: neither has names.
    """
    metadata = MetadataCatalog.get(name)
    classes = metadata.get("thing_classes")
    if info is not None:
        if classes is None:
            return dict(info.categories)
        ids_of = {category: id_ for id_, category in info.categories.items()}
        if sorted(classes) == sorted(ids_of):  # ids may have changed since it was registered
            return {ids_of[category]: category for category in classes}
    if classes is None:
        raise ValueError(
            f"dataset {name!r} has no class names: set MetadataCatalog.get(name).thing_classes"
        )
    ids = metadata.get("thing_dataset_id_to_contiguous_id")
    if ids is None:
        return dict(enumerate(classes))
    # Several dataset ids may share a class: the lowest stands for it.
    first = {contiguous: id_ for id_, contiguous in sorted(ids.items(), reverse=True)}
    return {first[contiguous]: classes[contiguous] for contiguous in sorted(first)}


# Records


def find_faults(file: CocoFile, *, invalid_annotations: str, crowd: str) -> dict[int, str]:
    """The annotations to leave out of training.

    Args:
        file: the json.
        invalid_annotations: "error" raises if there are any, "skip" logs a warning.
        crowd: "keep" includes crowd regions as ordinary objects.

    Returns:
        Index into ``file.annotations`` -> why nothing can be trained on it.

    Raises:
        ValueError: there are some and the policy is "error"; one line that names the first.
    """
    faults = {
        index: fault
        for index, fault in file.faults.items()
        if crowd == "keep" or not file.annotations[index]["iscrowd"]
    }
    if faults:
        index, fault = next(iter(faults.items()))
        path, first = file.info.path, f"{file.name_of(index)}: {fault}"
        if invalid_annotations == "error":
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise ValueError(
                f"{first}{more}: nothing can be trained on it: correct it, or set "
                "dataloader.train.dataset.invalid_annotations=skip to leave such annotations out "
                "(dataloader.test for a test set)"
            )
        first = first.removeprefix(f"{path}: ")
        logger.warning("%s: left out %d annotations (first: %s)", path, len(faults), first)
    return faults


def make_records(
    file: CocoFile,
    image_root: str,
    indices: Mapping[int, int],
    faults: Mapping[int, str],
    crowd: str = "ignore",
) -> list[Record]:
    """The records of a COCO json, by ascending image id.

    Args:
        file: the json.
        image_root: the folder of its images, which must exist; or a URL, which is not checked.
        indices: category id -> index of the class.
        faults: the annotations to leave out, from `find_faults`.
        crowd: "keep" makes crowd regions ordinary objects.

    Returns:
        As detectron2's ``load_coco_json``, without keypoints. Records share their lists of numbers
        with ``file``: copy before modifying.

    Raises:
        FileNotFoundError: images are missing, see `image_files.locate`.
    """
    names = [image["file_name"] for image in file.images]
    if "://" in image_root:
        paths = [os.path.join(image_root, name) for name in names]
    else:
        paths = locate(names, image_root, file.info.path)
    with collector_paused():
        objects = defaultdict(list)
        for index, annotation in enumerate(file.annotations):
            if index in faults:
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
    records: Sequence[Record],
    remap: Mapping[int, int] | None,
    check: bool,
    crowd: str,
    summary: "Summary",
) -> list[Record]:
    """Apply classes and options to the records that a dataset's own function returned.

    Args:
        records: in detectron2's format; they are not modified.
        remap: class index in the records -> class index of the model; None if they agree.
        check: leave out annotations that cannot be trained on.
        crowd: "keep" makes crowd regions ordinary objects.
        summary: counts what is left out.
    """
    if not (check or remap or crowd == "keep"):
        return list(records)
    adapted = []
    for record in records:
        if "annotations" in record:
            size = record.get("height", math.inf), record.get("width", math.inf)
            annotations = []
            for annotation in map(dict, record["annotations"]):
                if crowd == "keep":
                    annotation["iscrowd"] = 0
                if check and area_fault(annotation, *size) is not None:
                    summary.faulty += 1
                    continue
                if remap is not None:
                    annotation["category_id"] = remap[annotation["category_id"]]
                annotations.append(annotation)
            record = {**record, "annotations": annotations}
        adapted.append(record)
    return adapted


# Checks of image files


def check_headers(
    records: Sequence[Record], source: str, *, skip_undecodable: bool | None, key: Any
) -> None:
    """Compare the annotated sizes with the headers of the image files, before training starts.

    Reads as many headers as it can in `HEADER_SECONDS`, in a fixed random order. The same records
    are not checked again in this process.

    Args:
        records: in detectron2's format, with ``file_name``, ``height`` and ``width``.
        source: the annotations, for messages.
        skip_undecodable: warn of images that training will skip, rather than raise. None: skipping
            is not an option.
        key: hashable; identifies the records and the state of their files.

    Raises:
        UndecodableImageError: an image cannot be read, or has another size; one line.
    """
    if key in _checked:
        return
    start = time.monotonic()
    problems: list[str] = []
    read = 0
    for index in random.Random(0).sample(range(len(records)), len(records)):
        if time.monotonic() - start > HEADER_SECONDS:
            break
        read += 1
        problem = _header_problem(records[index], source)
        if problem is not None and not skip_undecodable:
            advice = "correct it, replace the file or remove it from the dataset"
            if skip_undecodable is not None:
                advice += ", or pass dataloader.train.skip_undecodable=True to skip such images"
            raise UndecodableImageError(f"{problem}: {advice}", records[index]["file_name"])
        if problem is not None:
            problems.append(problem)
    seconds = time.monotonic() - start
    counts = f"{source}: {read} of {len(records)} image headers read in {seconds:.1f} s"
    if problems:
        logger.warning(
            "%s: training will skip %d images (first: %s)", counts, len(problems), problems[0]
        )
    else:
        logger.info("%s: all have the annotated sizes", counts)
    _checked.add(key)


def _header_problem(record: Record, source: str) -> str | None:
    try:
        height, width = image_size(record["file_name"])
    except UndecodableImageError as error:
        return str(error)
    annotated = record.get("width", width), record.get("height", height)
    if (width, height) == annotated:
        return None
    rotated = " (a rotated image?)" if (height, width) == annotated else ""
    return (
        f"{record['file_name']}: the image is {width}x{height} pixels, but {source} says "
        f"{annotated[0]}x{annotated[1]}{rotated}"
    )


# Summary


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
        """The records with an annotation that is not a crowd region."""
        kept = []
        for record in records:
            annotations = record["annotations"]
            if any(not annotation.get("iscrowd", 0) for annotation in annotations):
                kept.append(record)
            else:
                self.skipped[CROWDS_ONLY if annotations else "without objects"] += 1
                self._skipped_crowds += len(annotations)
        return kept

    def log(self, source: str, records: Sequence[Record], classes: Sequence[str] | None) -> None:
        """Log which data are used, unless the same was logged before.

        Args:
            source: the dataset.
            records: the records that are used.
            classes: names of the classes; None if the data have none.
        """
        lines = [f"{self.found} images found, {len(records)} images used"]
        lines += [f"Images left out: {count} {reason}" for reason, count in self.skipped.items()]
        sides = [(r["width"], r["height"]) for r in records if "width" in r and "height" in r]
        if sides:
            widths, heights = zip(*sides, strict=True)
            lines.append(
                f"Image sizes: {min(widths)} to {max(widths)} pixels wide, "
                f"{min(heights)} to {max(heights)} high"
            )
        annotations = [a for record in records for a in record.get("annotations", ())]
        if annotations:
            lines += self._objects(annotations, classes or ())
        text = "\n  ".join([f"Data of {source}", *lines])
        if text not in _logged:
            _logged.add(text)
            logger.info(text)
            if annotations and classes:
                print_instances_class_histogram(records, classes)

    def _objects(self, annotations: list[Record], classes: Sequence[str]) -> list[str]:
        objects = [a for a in annotations if not a.get("iscrowd", 0)]
        found = len({annotation["category_id"] for annotation in objects})
        lines = [f"Objects: {len(objects)} in {found} of {len(classes)} classes"]
        without_mask = sum(not annotation.get("segmentation") for annotation in objects)
        if 0 < without_mask < len(objects):
            lines.append(f"Objects without a mask: {without_mask}, left out of the mask loss")
        if crowds := len(annotations) - len(objects) + self._skipped_crowds:
            lines.append(
                f"Crowd regions: {crowds} annotations with iscrowd: 1 are ignored; {KEEP_CROWDS}"
            )
        if self.faulty:
            lines.append(f"Annotations left out: {self.faulty} that cannot be trained on")
        return lines
