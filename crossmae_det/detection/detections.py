"""The detections of an evaluation as columns: made for each image, joined, and written as JSON.

A dict for each of 200,000 detections takes longer to build and to write than their evaluation. So
each image keeps arrays and its part of the result file, both made while the model runs.

Legend: D detections, H height and W width of the image in pixels.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.structures import Instances

try:
    from hotcoco import mask as encoder  # the same interface as pycocotools.mask, faster
except ImportError:
    encoder = mask_util

Mask = dict[str, Any]  # run lengths: "size" [H, W], "counts" as text


@dataclass(frozen=True, eq=False)
class ImageDetections:
    """The detections in one image.

    Attributes:
        boxes: (D, 4) float64, x, y, width, height in pixels.
        scores: (D,) float64.
        classes: (D,) int64, from 0.
        masks: D masks; None for a model without masks.
        areas: (D,) float64, area of each mask in pixels; None without masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: list[Mask] | None = None
    areas: np.ndarray | None = None

    @classmethod
    def from_instances(cls, instances: Instances) -> "ImageDetections":
        """From the output of a detector: ``pred_boxes`` (corners in pixels), ``scores``,
        ``pred_classes`` and optionally ``pred_masks`` (D, H, W) bool, on any device."""
        corners = instances.pred_boxes.tensor.detach()
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)
        masks = areas = None
        if instances.has("pred_masks"):
            masks, areas = encode_masks(instances.pred_masks.detach())
        return cls(
            boxes=boxes.cpu().to(torch.float64).numpy(),
            scores=instances.scores.detach().cpu().to(torch.float64).numpy(),
            classes=instances.pred_classes.detach().cpu().to(torch.int64).numpy(),
            masks=masks,
            areas=areas,
        )

    def __len__(self) -> int:
        return len(self.scores)

    def to_json(self, image_id: int | str | None, category_ids: Sequence[int]) -> bytes:
        """The detections in COCO's result format, without the brackets of the list.

        Args:
            image_id: the id of the image.
            category_ids: the category id of each class.

        Raises:
            ValueError: a box or a score is not finite.
        """
        if not len(self):
            return b""
        if not (np.isfinite(self.boxes).all() and np.isfinite(self.scores).all()):
            raise ValueError(
                f"image {image_id!r} has a detection with a box or a score that is not finite: "
                "check the weights"
            )
        columns = (self.classes.tolist(), self.boxes.tolist(), self.scores.tolist())
        records: list[dict[str, Any]] = [
            {"image_id": image_id, "category_id": category_ids[k], "bbox": box, "score": score}
            for k, box, score in zip(*columns, strict=True)
        ]
        for record, mask in zip(records, self.masks or (), strict=bool(self.masks)):
            record["segmentation"] = mask
        return json.dumps(records)[1:-1].encode()


def encode_masks(masks: torch.Tensor) -> tuple[list[Mask], np.ndarray]:
    """Run lengths and areas of masks.

    Args:
        masks: (D, H, W), bool or another type in which nonzero is inside, on any device.

    Returns:
        The masks, and their areas (D,) float64 in pixels.
    """
    columns: Iterable[np.ndarray]
    masks = masks if masks.dtype in (torch.bool, torch.uint8) else masks != 0
    if masks.is_cuda:  # run lengths go down the columns: a GPU transposes faster
        columns = masks.transpose(1, 2).contiguous().cpu().view(torch.uint8).numpy()
    else:
        columns = map(_transpose, masks.contiguous().view(torch.uint8).numpy())
    encoded = [encoder.encode(mask.T) for mask in columns]
    areas = np.asarray(encoder.area(encoded), dtype=np.float64) if encoded else np.zeros(0)
    return list(map(as_text, encoded)), areas


def as_text(mask: Mask) -> Mask:
    """A mask whose counts are bytes, as the encoder makes them, for JSON."""
    return {"size": list(mask["size"]), "counts": mask["counts"].decode()}


def _transpose(mask: np.ndarray) -> np.ndarray:
    # OpenCV transposes by blocks, several times as fast as numpy and torch. It has no empty images.
    return cv2.transpose(mask) if mask.size else mask.T


@dataclass(frozen=True, eq=False)
class Detections:
    """The detections of an evaluation.

    Attributes:
        images: (D,) int64, number of the image, from 1.
        boxes, scores, classes, masks, areas: as in `ImageDetections`.
    """

    images: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: list[Mask] | None = None
    areas: np.ndarray | None = None

    @classmethod
    def join(cls, images: Iterable[tuple[int, ImageDetections]]) -> "Detections":
        """The detections of all images, in their order; with masks if all images have them.

        Args:
            images: number from 1, and detections, of each image.
        """
        parts = [(number, part) for number, part in images if len(part)]
        if not parts:
            none = np.zeros(0, np.int64)
            return cls(none, np.zeros((0, 4)), np.zeros(0), none)
        numbers, found = zip(*parts, strict=True)
        masks = all(part.masks is not None for part in found)
        return cls(
            images=np.repeat(np.array(numbers, np.int64), [len(part) for part in found]),
            boxes=np.concatenate([part.boxes for part in found]),
            scores=np.concatenate([part.scores for part in found]),
            classes=np.concatenate([part.classes for part in found]),
            masks=[mask for part in found for mask in part.masks] if masks else None,
            areas=np.concatenate([part.areas for part in found]) if masks else None,
        )

    def __len__(self) -> int:
        return len(self.scores)

    def has_nan(self) -> bool:
        """Whether any score is not a number."""
        return bool(np.isnan(self.scores).any())

    def without_masks(self) -> "Detections":
        """The same detections as boxes."""
        return replace(self, masks=None, areas=None)

    def select(self, chosen: np.ndarray) -> "Detections":
        """Some of the detections; ``chosen`` is (D,) bool."""
        indices = np.flatnonzero(chosen)
        return Detections(
            images=self.images[indices],
            boxes=self.boxes[indices],
            scores=self.scores[indices],
            classes=self.classes[indices],
            masks=None if self.masks is None else [self.masks[i] for i in indices.tolist()],
            areas=None if self.areas is None else self.areas[indices],
        )

    def records(self) -> list[dict[str, Any]]:
        """The detections in COCO's result format, with categories from 1.

        Each has a mask or a box: where pycocotools finds a box, it takes the size of that.
        """
        key = "bbox" if self.masks is None else "segmentation"
        shapes = self.boxes.tolist() if self.masks is None else self.masks
        columns = (self.images.tolist(), (self.classes + 1).tolist(), self.scores.tolist(), shapes)
        return [
            {"image_id": image, "category_id": category, "score": score, key: shape}
            for image, category, score, shape in zip(*columns, strict=True)
        ]
