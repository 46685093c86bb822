"""Targets of training from the annotations of an image: boxes, classes and masks, all at once.

The arithmetic is that of detectron2's ``DatasetMapper``, over all objects of an image together
instead of one by one, and annotations are read without being copied: boxes and polygons are equal
to the last bit, and so are run-length masks. Transforms of other kinds than detectron2's flips,
resizes, crops and paddings move run-length masks one at a time.

Legend: N objects, P points of all polygons, H x W pixels of the image, h x w after the transforms.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util
import shapely
import torch
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import (
    BitMasks,
    Boxes,
    BoxMode,
    Instances,
    PolygonMasks,
    polygons_to_bitmask,
)

# Bytes of run-length masks that are decoded at a time.
DECODED_BYTES = 1 << 26

# detectron2's threshold: boxes with a shorter side, in pixels, are not targets.
MIN_SIDE = 1e-5


def make_instances(
    annotations: Sequence[dict[str, Any]],
    transforms: T.TransformList,
    size: tuple[int, int],
    new_size: tuple[int, int],
    *,
    masks: bool,
    recompute_boxes: bool,
) -> Instances:
    """Transform the annotations of an image to what detectron2's models train on.

    Args:
        annotations: in detectron2's format; they are not modified. Crowds are left out.
        transforms: those of the image.
        size: (H, W) of the image before the transforms, in pixels.
        new_size: (h, w) of it after them.
        masks: whether to return masks.
        recompute_boxes: make the boxes of objects with a mask tight around it.

    Returns:
        Objects with an area inside the image, with ``gt_boxes``, ``gt_classes`` and, as described
        in :class:`~crossmae_det.detection.DetectionMapper`, ``gt_masks`` and ``gt_has_mask``.

    Raises:
        ValueError: a segmentation is neither polygons nor run lengths, or run lengths are not of
            the size of the image.
    """
    objects = [a for a in annotations if not a.get("iscrowd", 0)]
    boxes = _transform_boxes(objects, transforms, new_size)
    instances = Instances(new_size)
    instances.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32))
    classes = [int(annotation["category_id"]) for annotation in objects]
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    keep = instances.gt_boxes.nonempty(threshold=MIN_SIDE)
    if not masks:
        return instances[keep]

    has_mask = torch.tensor(["segmentation" in a for a in objects], dtype=torch.bool)
    if not objects:
        instances.gt_masks = PolygonMasks([])
    elif has_mask.any():
        instances.gt_masks = _transform_masks(objects, boxes, transforms, size, new_size)
        if recompute_boxes:
            tight = _tight_boxes(instances.gt_masks)
            tight = torch.where(has_mask[:, None], tight, instances.gt_boxes.tensor)
            instances.gt_boxes = Boxes(tight)
            keep = instances.gt_boxes.nonempty(threshold=MIN_SIDE)
        keep &= instances.gt_masks.nonempty() | ~has_mask
        if not has_mask.all():
            instances.gt_has_mask = has_mask
    return instances[keep]


# Boxes


def _transform_boxes(objects, transforms, new_size) -> np.ndarray:
    """The boxes (N, 4) float64 as corners (x0, y0, x1, y1) inside the image."""
    if not objects:
        return np.zeros((0, 4))
    modes = {annotation["bbox_mode"] for annotation in objects}
    given = [annotation["bbox"] for annotation in objects]
    if modes == {BoxMode.XYXY_ABS}:
        boxes = np.asarray(given, np.float64)
    elif len(modes) == 1 and all(isinstance(box, list) and len(box) == 4 for box in given):
        # In float32, as detectron2 converts a list.
        boxes = BoxMode.convert(torch.tensor(given), modes.pop(), BoxMode.XYXY_ABS).numpy()
    else:
        boxes = np.stack([utils.get_bbox(annotation) for annotation in objects])
    boxes = transforms.apply_box(boxes.astype(np.float64)).clip(min=0)
    return np.minimum(boxes, (new_size + new_size)[::-1])


def _tight_boxes(masks: BitMasks | PolygonMasks) -> torch.Tensor:
    """What ``masks.get_bounding_boxes()`` returns: (N, 4) float32."""
    if isinstance(masks, BitMasks):
        return masks.get_bounding_boxes().tensor
    boxes = np.zeros((len(masks), 4), np.float32)
    boxes[:, :2] = np.inf
    for box, polygons in zip(boxes, masks.polygons, strict=True):
        if polygons:
            points = np.concatenate(polygons).astype(np.float32).reshape(-1, 2)
            box[:2] = points.min(0)
            box[2:] = points.max(0).clip(min=0)
    return torch.from_numpy(boxes)


# Masks


def _transform_masks(objects, boxes, transforms, size, new_size) -> BitMasks | PolygonMasks:
    """The masks of objects; boxes stand in where there are none."""
    run_lengths, polygons = {}, {}
    for index, annotation in enumerate(objects):
        if "segmentation" not in annotation:
            continue
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, dict):
            run_lengths[index] = segmentation
        elif isinstance(segmentation, list):
            polygons[index] = [np.asarray(p, np.float64).reshape(-1, 2) for p in segmentation]
        else:
            raise ValueError(
                f"a segmentation is a {type(segmentation).__name__}: give a list of polygons or"
                " a dict of run lengths"
            )
    made = dict(
        zip(polygons, _transform_polygons(list(polygons.values()), transforms), strict=True)
    )
    for index in range(len(objects)):
        if index not in made and index not in run_lengths:
            x0, y0, x1, y1 = boxes[index]
            made[index] = [np.array([x0, y0, x1, y0, x1, y1, x0, y1])]
    if not run_lengths:
        return PolygonMasks([made[index] for index in range(len(objects))])
    bits = np.zeros((len(objects), *new_size), bool)
    bits[list(run_lengths)] = _transform_run_lengths(
        list(run_lengths.values()), transforms, size, new_size
    )
    for index, each in made.items():
        bits[index] = polygons_to_bitmask(each, *new_size)
    return BitMasks(torch.from_numpy(bits))


class _Polygons(NamedTuple):
    """Polygons of several objects.

    Attributes:
        points: (P, 2) float64, x and y, of one polygon after the other.
        counts: points of each polygon.
        owners: the object of each polygon, ascending.
    """

    points: np.ndarray
    counts: np.ndarray
    owners: np.ndarray

    @classmethod
    def of(cls, objects: Sequence[Sequence[np.ndarray]]) -> "_Polygons":
        polygons = [polygon for each in objects for polygon in each]
        return cls(
            np.concatenate([np.zeros((0, 2)), *polygons]),
            np.array([len(polygon) for polygon in polygons], int),
            np.repeat(np.arange(len(objects)), [len(each) for each in objects]),
        )

    def split(self, count: int) -> list[list[np.ndarray]]:
        """The polygons (points, 2) of each of ``count`` objects."""
        objects: list[list[np.ndarray]] = [[] for _ in range(count)]
        ends = np.cumsum(self.counts).tolist()
        for owner, size, end in zip(self.owners.tolist(), self.counts.tolist(), ends, strict=True):
            objects[owner].append(self.points[end - size : end])
        return objects


def _transform_polygons(
    objects: list[list[np.ndarray]], transforms: T.TransformList
) -> list[list[np.ndarray]]:
    """Transform the polygons of each object, (points, 2) float64; flat at the end."""
    polygons = _Polygons.of(objects)
    for step in transforms.transforms:
        if type(step) is T.CropTransform:
            polygons = _crop(polygons, step)
        elif type(step).apply_polygons is T.Transform.apply_polygons:
            polygons = polygons._replace(points=step.apply_coords(polygons.points))
        else:
            split = polygons.split(len(objects))
            polygons = _Polygons.of([step.apply_polygons(each) for each in split])
    return [[p.reshape(-1) for p in each] for each in polygons.split(len(objects))]


def _crop(polygons: _Polygons, crop: T.CropTransform) -> _Polygons:
    """``CropTransform.apply_polygons``: one polygon may become none or several."""
    numbers = np.arange(len(polygons.counts))
    rings = shapely.linearrings(polygons.points, indices=np.repeat(numbers, polygons.counts))
    shapes = shapely.buffer(shapely.polygons(rings), 0.0)  # repairs what intersects itself
    valid = shapely.is_valid(shapes)
    box = shapely.box(crop.x0, crop.y0, crop.x0 + crop.w, crop.y0 + crop.h)
    parts, part_of = shapely.get_parts(
        shapely.intersection(shapes[valid], shapely.buffer(box, 0.0)), return_index=True
    )
    # The rest are points, lines and nothing.
    areas = (shapely.get_type_id(parts) == shapely.GeometryType.POLYGON) & ~shapely.is_empty(parts)
    areas &= shapely.is_valid(parts)
    points, ring_of = shapely.get_coordinates(
        shapely.get_exterior_ring(parts[areas]), return_index=True
    )
    last = np.diff(ring_of, append=-1) != 0  # which is the first again
    points = points[~last]
    return _Polygons(
        crop.apply_coords(points),
        np.bincount(ring_of[~last], minlength=int(areas.sum())),
        polygons.owners[valid][part_of[areas]],
    )


def _transform_run_lengths(run_lengths, transforms, size, new_size) -> np.ndarray:
    """Decode run-length masks and transform them: (N, h, w) bool."""
    for each in run_lengths:
        if tuple(each["size"]) != tuple(size):
            raise ValueError(
                f"a run-length mask is {each['size'][1]}x{each['size'][0]} pixels, but its image is"
                f" {size[1]}x{size[0]}: correct the annotations"
            )
    lines = _source_lines(transforms, size)
    result = np.zeros((len(run_lengths), *new_size), bool)
    step = max(1, DECODED_BYTES // (size[0] * size[1]))
    for start in range(0, len(run_lengths), step):
        masks = mask_util.decode(run_lengths[start : start + step])  # (H, W, N) in Fortran order
        _move_masks(masks, transforms, lines, result[start : start + step])
    return result


def _move_masks(masks, transforms, lines, result) -> None:
    """Transform masks (H, W, N) into ``result`` (N, h, w), which is False."""
    if lines is None:  # 255 is padding
        for moved, mask in zip(result, masks.transpose(2, 0, 1), strict=True):
            moved[:] = transforms.apply_segmentation(np.ascontiguousarray(mask)) == 1
        return
    rows, columns = lines
    inside = masks.transpose(2, 1, 0)[:, columns[columns >= 0]][:, :, rows[rows >= 0]]
    indices = np.arange(len(result)), np.flatnonzero(rows >= 0), np.flatnonzero(columns >= 0)
    result[np.ix_(*indices)] = inside.transpose(0, 2, 1)


def _source_lines(transforms, size) -> tuple[np.ndarray, np.ndarray] | None:
    """The row and the column of a mask that each row and column of the result shows, -1 for
    padding; None for transforms that do more than move rows and columns."""
    rows, columns = np.arange(size[0]), np.arange(size[1])
    for step in transforms.transforms:
        if type(step) is T.HFlipTransform:
            columns = columns[::-1]
        elif type(step) is T.VFlipTransform:
            rows = rows[::-1]
        elif type(step) is T.ResizeTransform:
            rows = rows[_nearest(len(rows), step.new_h)]
            columns = columns[_nearest(len(columns), step.new_w)]
        elif type(step) is T.CropTransform:
            rows = rows[step.y0 : step.y0 + step.h]
            columns = columns[step.x0 : step.x0 + step.w]
        elif type(step) is T.PadTransform:
            rows = np.pad(rows, (step.y0, step.y1), constant_values=-1)
            columns = np.pad(columns, (step.x0, step.x1), constant_values=-1)
        elif type(step) is not T.NoOpTransform:
            return None
    return rows, columns


def _nearest(size: int, new_size: int) -> np.ndarray:
    """Index of the pixel that each pixel of a resized line shows, as Pillow adds them up."""
    step = np.full(new_size, size / new_size)
    step[0] /= 2
    return np.minimum(np.add.accumulate(step).astype(int), size - 1)
