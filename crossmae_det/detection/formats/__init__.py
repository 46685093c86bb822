"""Detection datasets in YOLO, Pascal VOC, CVAT and labelme layout, and as folders of masks.

Each is named by one string, see `spec`, and read into the form of a COCO json, see `content`, which
`coco_json` checks like any other.
"""

from crossmae_det.detection.formats.coco_folder import find_json
from crossmae_det.detection.formats.content import Content
from crossmae_det.detection.formats.reading import (
    for_evaluation,
    is_present,
    read,
    splits,
    version,
    with_split,
)
from crossmae_det.detection.formats.spec import (
    INFERRED_CLASSES,
    Spec,
    coco_string,
    find_split,
    parse,
    suggestion,
)

__all__ = [
    "INFERRED_CLASSES",
    "Content",
    "Spec",
    "coco_string",
    "find_json",
    "find_split",
    "for_evaluation",
    "is_present",
    "parse",
    "read",
    "splits",
    "suggestion",
    "version",
    "with_split",
]
