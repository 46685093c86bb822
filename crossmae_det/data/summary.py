"""What a data set holds, said before the first iteration: found, used, left out and why."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from detectron2.data import print_instances_class_histogram

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
            source: the data set.
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
