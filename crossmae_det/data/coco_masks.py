"""Masks of a COCO json in two forms only: a list of polygons, or run lengths in compressed form.

Run lengths are counted before anything decodes them: pycocotools writes outside of its memory, or
never ends, where they do not add up to the image.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from crossmae_det.data import coco_values
from crossmae_det.data.coco_values import Place, Repairs, number, short, whole

# Twice the area (square pixels) below which three vertices count as lying on one line: above the
# rounding error of coordinates up to 10^4, far below anything that covers a pixel.
_MIN_CROSS = 1e-6
# Coordinates may leave the image, but rasterizing takes time and memory in proportion to them.
_MAX_SIDES_AWAY = 16

NO_AREA = "its mask has no area"


class MaskError(ValueError):
    """A mask that cannot be read; the message is the end of a sentence about its annotation."""


def clean_mask(
    value: Any, height: int, width: int, repairs: Repairs, place: Place
) -> tuple[list | dict | None, bool]:
    """Read the ``segmentation`` of an annotation.

    Args:
        value: as in the json.
        height, width: of the image, in pixels.
        repairs: counts what had to be repaired.
        place: the annotation, for ``repairs``.

    Returns:
        The mask and whether it covers anything. The mask is None where there is none; a list of
        polygons, each at least three vertices as x, y, x, y, ... in pixels; or compressed run
        lengths, ``{"size": [height, width], "counts": str or bytes}``. Polygons that cover nothing
        are dropped beside others that do, and those that are none are always dropped.

    Raises:
        MaskError: it is neither of them, or does not fit its image.
    """
    if not value:
        return None, False
    if isinstance(value, Mapping):
        return _run_lengths(value, height, width, repairs, place)
    if not isinstance(value, list) or set(map(type, value)) != {list}:
        raise MaskError("has a mask that is not a list of polygons; write [[x, y, x, y, ...], ...]")
    polygons = [polygon for polygon in value if polygon]
    if not polygons:
        repairs.add(coco_values.EMPTY_POLYGON, place)
        return None, False
    limit = _MAX_SIDES_AWAY * max(height, width)
    polygons = [_coordinates(polygon, limit, repairs, place) for polygon in polygons]
    good = [polygon for polygon in polygons if _has_area(polygon)]
    if len(good) == len(value):
        return good, True
    if not good:
        return [p for p in polygons if len(p) >= 6 and len(p) % 2 == 0], False
    for _ in range(len(value) - len(good)):
        repairs.add(coco_values.POLYGON, place)
    return good, True


def mask_area(mask: list | Mapping[str, Any], height: int, width: int) -> float:
    """Area of a clean mask in pixels, as COCO's own areas of masks are."""
    if isinstance(mask, list):
        mask = mask_util.merge(mask_util.frPyObjects(mask, height, width))
    return float(mask_util.area(mask))


def covers_anything(mask: Any) -> bool:
    """Whether a mask of a record that is in detectron2's format, but not from here, has area."""
    if isinstance(mask, Mapping):
        counts = mask["counts"]
        return (sum(counts[1::2]) if isinstance(counts, list) else mask_util.area(mask)) > 0
    return any(map(_has_area, mask))


def is_outside(mask: Any, height: float, width: float) -> bool:
    """Whether all polygons of a mask are outside of the image; run lengths never are."""
    if isinstance(mask, Mapping):
        return False
    for polygon in mask:
        if 0 < polygon[0] < width and 0 < polygon[1] < height:  # most: one vertex says it
            return False
        xs, ys = polygon[::2], polygon[1::2]
        if min(xs) < width and min(ys) < height and max(xs) > 0 and max(ys) > 0:
            return False
    return True


def run_lengths(counts: str) -> np.ndarray | None:
    """The runs of a compressed mask: (R,) int64, at least 0; None where they cannot be read.

    The encoding: each run as groups of five bits, lowest first, in characters from "0" on. The
    sixth bit says that more follow, the fifth bit of the last group is the sign. From the fourth
    run on, what is written is the difference to the run before the last.
    """
    try:
        codes = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return None
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits hold every run that an image can have
        return None
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 31) << shifts, starts)
    runs -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return None if runs.min() < 0 else runs


def _run_lengths(
    value: Mapping[str, Any], height: int, width: int, repairs: Repairs, place: Place
) -> tuple[dict, bool]:
    size = value.get("size")
    if size is None:
        repairs.add(coco_values.MASK_SIZE, place)
    else:
        sides = size if isinstance(size, list) else []
        if [whole(side, repairs, place) for side in sides] != [height, width]:
            raise MaskError(
                f"has a mask of {short(size)} pixels, but its image has {[height, width]}"
            )
    counts = value.get("counts")
    if isinstance(counts, list):
        found = (c if c.__class__ is int else whole(c, repairs, place) for c in counts)
        runs = [run for run in found if run is not None]
        if len(runs) < len(counts) or min(runs, default=0) < 0 or sum(runs) != height * width:
            raise MaskError(
                "has run lengths that do not add up to its image; encode the mask again"
            )
        rle = {"size": [height, width], "counts": runs}
        return mask_util.frPyObjects(rle, height, width), sum(runs[1::2]) > 0
    if not isinstance(counts, str):
        raise MaskError('has "counts" that are neither a list nor a string; encode the mask again')
    decoded = run_lengths(counts)
    if decoded is None or decoded.sum() != height * width:
        raise MaskError(
            "has compressed run lengths that do not add up to its image; encode the mask again"
        )
    return {"size": [height, width], "counts": counts}, bool(decoded[1::2].sum() > 0)


def _coordinates(polygon: list, limit: int, repairs: Repairs, place: Place) -> list:
    """The polygon with numbers only, none of them further away than ``limit`` pixels."""
    try:
        finite = math.isfinite(sum(polygon)) and max(polygon) <= limit and min(polygon) >= -limit
    except (TypeError, OverflowError):
        numbers = [number(value, repairs, place) for value in polygon]
        if None in numbers:
            raise MaskError(
                f"has a polygon with the coordinates {short(polygon)}; give numbers"
            ) from None
        return _coordinates(numbers, limit, repairs, place)
    if not finite:
        raise MaskError(
            "has a polygon with a coordinate that is not finite, or far outside of its image; "
            "remove or correct it"
        )
    return polygon


def _has_area(polygon: Any) -> bool:
    """Whether a polygon x, y, x, y, ... has three vertices that are not on one line.

    Unlike the signed area this is done after three or four vertices, and does not take a figure of
    eight for nothing.
    """
    if len(polygon) < 6 or len(polygon) % 2:
        return False
    x0, y0 = polygon[0], polygon[1]
    dx = dy = 0.0
    for k in range(2, len(polygon), 2):
        x, y = polygon[k] - x0, polygon[k + 1] - y0
        if abs(dx * y - dy * x) > _MIN_CROSS:
            return True
        if abs(x) + abs(y) > abs(dx) + abs(dy):  # a direction from two near points says nothing
            dx, dy = x, y
    return False
