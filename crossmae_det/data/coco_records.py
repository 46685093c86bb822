"""Records in detectron2's format, made of the clean form of a COCO json."""

import logging
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.structures import BoxMode

from crossmae_det.data.coco_annotations import area_fault
from crossmae_det.data.coco_json import CocoFile, collector_paused, fault_line, load
from crossmae_det.data.coco_values import id_order
from crossmae_det.data.summary import Summary
from crossmae_det.utils.image_paths import locate

logger = logging.getLogger(__name__)


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
        ValueError, FileNotFoundError: as `crossmae_det.data.coco_json.load` and
            `crossmae_det.utils.image_paths.locate`, or for "error"; one line.
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
    """Records that a data set's own function made, with the classes and choices asked for.

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
