"""Health of an annotated dataset: what is wrong with it, and how often, in one dict.

Joins what reading the json found (`coco_json.load`) with the checks of hotcoco, where it is
installed.
"""

import ast
import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from crossmae_det.detection.coco_backends import has_hotcoco, hotcoco_truth
from crossmae_det.detection.coco_json import CocoFile

_EXAMPLES = 10
# A repair as `ValueReader.repairs` and the readers of other layouts write it.
_REPAIR = re.compile(r"(?P<what>.*): (?P<count>\d+) \(first: (?P<first>.*)\)", re.DOTALL)
_ID = re.compile(r"(?:annotation|image|category) (.*)", re.DOTALL)
# Checks of hotcoco that reading the json has made already.
_MADE = {"degenerate_bbox"}
# Checks of hotcoco whose ids are not those of annotations.
_OF_CLASSES = {"zero_instance_category", "low_instance_category", "duplicate_category_id"}
_OF_IMAGES = {"zero_dimensions", "duplicate_image_id", "near_duplicate_check_skipped"}


def check_dataset(file: CocoFile) -> dict[str, Any]:
    """Describe the state of a dataset.

    Args:
        file: its json.

    Returns:
        - "images", "annotations", "images_without_annotations": numbers of them.
        - "checks": for each problem its "severity" (error: nothing can be trained on it; warning:
            probably wrong; info: read all the same, or a property of the data), "what" it is, the
            "count", and up to 10 "examples": the ids of annotations or images, names of classes,
            or the places in the files of other layouts.
        - "classes": name -> number of annotations.
    """
    categories = file.info.categories
    counts = Counter(annotation["category_id"] for annotation in file.annotations)
    annotated = {annotation["image_id"] for annotation in file.annotations}
    checks = [*_faults(file), *_repairs(file.info.repairs)]
    if has_hotcoco():
        checks += _hotcoco_checks(file)
    order = ("error", "warning", "info")
    return {
        "images": len(file.images),
        "annotations": len(file.annotations),
        "images_without_annotations": len(file.images) - len(annotated),
        "checks": sorted(checks, key=lambda check: order.index(check["severity"])),
        "classes": {name: counts[id_] for id_, name in categories.items()},
    }


def _check(severity: str, what: str, count: int, examples: Sequence[Any]) -> dict[str, Any]:
    examples = list(examples[:_EXAMPLES])
    return {"severity": severity, "what": what, "count": count, "examples": examples}


def _faults(file: CocoFile) -> list[dict[str, Any]]:
    ids = defaultdict(list)
    for index, fault in file.faults.items():
        # Some name the values of one annotation: count them together.
        kind = re.sub(r" \[.*?\]| \(.*?\)| of \d+x\d+ pixels", "", fault)
        ids[kind].append(_annotation(file, index))
    return [_check("error", kind, len(found), found) for kind, found in ids.items()]


def _annotation(file: CocoFile, index: int) -> int | str:
    """What names an annotation: its id; of other layouts, where it is from."""
    return file.sources[index] if file.sources else file.annotations[index]["id"]


def _repairs(lines: Sequence[str]) -> list[dict[str, Any]]:
    checks = []
    for line in lines:
        if match := _REPAIR.fullmatch(line):
            example = _example(match["first"])
            checks.append(_check("info", match["what"], int(match["count"]), [example]))
        else:
            checks.append(_check("info", line, 1, []))
    return checks


def _example(first: str) -> Any:
    """The id in "image 7"; of other layouts, the file and the line or object, as it is."""
    if match := _ID.fullmatch(first):
        with contextlib.suppress(ValueError, SyntaxError):
            return ast.literal_eval(match[1])
    return first


def _hotcoco_checks(file: CocoFile) -> list[dict[str, Any]]:
    # hotcoco needs integer ids: positions in the lists, from 1.
    images = [image["id"] for image in file.images]
    names = list(file.info.categories.values())
    annotations = [_annotation(file, index) for index in range(len(file.annotations))]
    found = hotcoco_truth(_numbered(file)).healthcheck()
    checks = []
    for severity, entry in [
        *(("error", entry) for entry in found["errors"]),
        *(("warning", entry) for entry in found["warnings"]),
    ]:
        code, numbers = entry["code"], entry["affected_ids"]
        if code in _MADE:
            continue
        owners = names if code in _OF_CLASSES else images if code in _OF_IMAGES else annotations
        what = re.sub(r"^\d+ ", "", entry["message"]).rstrip(".").replace("(s)", "s")
        what = what.replace("category/categories", "categories")
        if entry["layer"] == "Distribution":
            severity = "info"
        examples = [owners[number - 1] for number in sorted(numbers)[:_EXAMPLES]]
        checks.append(_check(severity, what, len(numbers), examples))
    return checks


def _numbered(file: CocoFile) -> dict[str, Any]:
    images = {image["id"]: number for number, image in enumerate(file.images, start=1)}
    categories = {id_: number for number, id_ in enumerate(file.info.categories, start=1)}
    annotations = []
    for number, annotation in enumerate(file.annotations, start=1):
        made = {
            "id": number,
            "image_id": images[annotation["image_id"]],
            "category_id": categories[annotation["category_id"]],
            "bbox": annotation["bbox"],
            "iscrowd": annotation["iscrowd"],
        }
        x, y, width, height = annotation["bbox"]
        made["area"] = annotation["area"] or float(width * height)
        annotations.append(made)
    return {
        "images": [{**image, "id": images[image["id"]]} for image in file.images],
        "annotations": annotations,
        "categories": [
            {"id": categories[id_], "name": name} for id_, name in file.info.categories.items()
        ],
    }
