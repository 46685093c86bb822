"""Single values of a COCO json: read as what they mean, and counted where they had to be repaired.

Exporters write ``1`` as ``1.0`` or ``"1"``, and leave out what they hold to be the default. Such a
value has one meaning only, so it is read as that; anything else is None here, and an error of the
caller's, who knows which image or annotation it belongs to.

Masks of a COCO json in two forms only: a list of polygons, or run lengths in compressed form.

Run lengths are counted before anything decodes them: pycocotools writes outside of its memory, or
never ends, where they do not add up to the image.

One annotation of a COCO json in its clean form: see `coco_json.CocoFile`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from crossmae_det.utils.messages import shorten

TEXT = "numbers that are text, read as numbers"

WHOLE = "integers that are floats, read as integers"

CROWD = "annotations without iscrowd, taken as 0"

AREA = "annotations without area, computed from the mask, or the box where there is none"

POLYGON = "polygons of fewer than three vertices or without area, dropped"

MASK_SIZE = "run-length masks without size, taken from the image"

CATEGORY = "categories that are listed twice, read once"

CATEGORY_NAME = "category names that are numbers, read as text"

BOX_OUTSIDE = "boxes that leave their images, clipped in training (are they x, y, width, height?)"

SHARED_FILE = "images that have the file of an earlier image, but objects of their own"

EMPTY_POLYGON = "masks of empty polygons, taken as no mask"


Place = tuple[str, Any]  # "annotation" and its id, or the like


_INTEGER = re.compile(r"\s*[+-]?\d{1,18}\s*", re.ASCII)

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)


class Repairs:
    """How often each kind of repair was made in a file, and where first."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, Place]] = {}

    def add(self, kind: str, place: Place) -> None:
        count, first = self._kinds.get(kind, (0, place))
        self._kinds[kind] = count + 1, first

    def lines(self) -> tuple[str, ...]:
        """A line for each kind: "numbers that are text, read as numbers: 3 (first: image 7)"."""
        return tuple(
            f"{kind}: {count} (first: {place[0]} {place[1]!r})"
            for kind, (count, place) in self._kinds.items()
        )


def number(value: Any, repairs: Repairs, place: Place) -> int | float | None:
    """A finite number, also where it is written as text; None for anything else."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = int(value) if _INTEGER.fullmatch(value) else float(value)
        repairs.add(TEXT, place)
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        return None
    return value


def whole(value: Any, repairs: Repairs, place: Place) -> int | None:
    """An integer, also where it is written as text or as a float; None for anything else."""
    if value.__class__ is int:  # not bool
        return value
    found = number(value, repairs, place)
    if isinstance(found, float):
        if not found.is_integer():
            return None
        if not isinstance(value, str):
            repairs.add(WHOLE, place)
    return None if found is None else int(found)


def identifier(value: Any, repairs: Repairs, place: Place) -> int | str | None:
    """An id: an integer wherever the value is one, else its text; None for anything else."""
    found = whole(value, repairs, place)
    if found is None and isinstance(value, str) and not _NUMBER.fullmatch(value):
        return value or None
    return found


def id_order(id_: int | str) -> tuple[bool, int | str]:
    """A sort key for ids, of which some may be text: numbers first."""
    return isinstance(id_, str), id_


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


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
        repairs.add(EMPTY_POLYGON, place)
        return None, False
    limit = _MAX_SIDES_AWAY * max(height, width)
    polygons = [_coordinates(polygon, limit, repairs, place) for polygon in polygons]
    good = [polygon for polygon in polygons if _has_area(polygon)]
    if len(good) == len(value):
        return good, True
    if not good:
        return [p for p in polygons if len(p) >= 6 and len(p) % 2 == 0], False
    for _ in range(len(value) - len(good)):
        repairs.add(POLYGON, place)
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
        repairs.add(MASK_SIZE, place)
    else:
        sides = size if isinstance(size, list) else []
        if [whole(side, repairs, place) for side in sides] != [height, width]:
            raise MaskError(
                f"has a mask of {shorten(size)} pixels, but its image has {[height, width]}"
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
                f"has a polygon with the coordinates {shorten(polygon)}; give numbers"
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


_NUMBERS = {int, float}

_FAR = 1e15  # where the sum is below it, no number is infinite or NaN

# Pixels by which boxes leave their images where tools round or count from 1.
_ROUNDING = 2.0


class ContradictionError(ValueError):
    """What makes an annotation impossible to read, as the end of a sentence about it."""


def clean_annotation(
    annotation: dict,
    sizes: Mapping[int | str, tuple[int, int]],
    categories: Mapping[int, str],
    repairs: Repairs,
) -> str | None:
    """Clean one annotation in place, and return what keeps it from being a target, or None.

    Raises:
        ContradictionError, MaskError: it cannot be read.
    """
    place = ("annotation", annotation.get("id"))
    if annotation.get("id").__class__ is not int or annotation.get("image_id").__class__ is not int:
        _clean_ids(annotation, repairs, place)
    image_id = annotation["image_id"]
    size = sizes.get(image_id)
    if size is None:
        raise ContradictionError(
            f"points to image {shorten(image_id)}, which is absent (there are "
            f"{_examples(sizes)}); remove it or add the image"
        )
    category_id = annotation.get("category_id")
    if category_id.__class__ is not int:
        category_id = whole(_get(annotation, "category_id"), repairs, place)
    if category_id not in categories:
        raise ContradictionError(
            f"points to category {shorten(annotation['category_id'])}, which is absent (there are "
            f"{_examples(categories)}); remove it or add the category"
        )
    annotation["category_id"] = category_id
    box = annotation["bbox"] = _clean_box(_get(annotation, "bbox"), repairs, place)
    annotation["iscrowd"] = _clean_crowd(annotation, repairs, place)
    annotation["area"] = _clean_area(annotation, repairs, place)

    mask, has_area = clean_mask(annotation.get("segmentation"), *size, repairs, place)
    if mask:
        annotation["segmentation"] = mask
    else:
        annotation.pop("segmentation", None)
    if mask is not None and not has_area:
        return NO_AREA
    fault = _fault_of_place(box, mask, *size)
    if fault is None and _leaves(box, *size):
        repairs.add(BOX_OUTSIDE, place)
    return fault


def _get(annotation: Mapping[str, Any], key: str) -> Any:
    value = annotation.get(key)
    if value is None:
        raise ContradictionError(f"has no {key!r}; write it as COCO does, or remove it")
    return value


def _clean_ids(annotation: dict, repairs: Repairs, place: Place) -> None:
    for key in ("id", "image_id"):
        value = _get(annotation, key)
        annotation[key] = identifier(value, repairs, place)
        if annotation[key] is None:
            raise ContradictionError(
                f"has a value of the wrong type, {key} {shorten(value)}; write an integer"
            )


def area_fault(annotation: Mapping[str, Any], height: float, width: float) -> str | None:
    """Say what keeps an annotation of a record from being a training target, or None.

    For records that a dataset's own function made; those made from here are checked already.

    Args:
        annotation: in detectron2's format, with ``bbox`` as x, y, width, height in pixels.
        height, width: of the image, in pixels.
    """
    if annotation.get("iscrowd", 0):
        return None
    segmentation = annotation.get("segmentation")
    if segmentation and not covers_anything(segmentation):
        return NO_AREA
    return _fault_of_place(annotation["bbox"], segmentation, height, width)


def _clean_box(box: Any, repairs: Repairs, place: Place) -> list[int | float]:
    if (
        box.__class__ is list
        and len(box) == 4
        and _NUMBERS.issuperset(map(type, box))
        and abs(sum(box)) < _FAR
    ):
        return box
    values = [number(v, repairs, place) for v in box] if isinstance(box, list) else []
    if len(values) == 4 and not all(isinstance(v, float | int) for v in box) and None in values:
        raise ContradictionError(
            f"has a value of the wrong type in the box {shorten(box)}; give four numbers"
        )
    if len(values) != 4 or any(v is None or abs(v) >= _FAR for v in values):
        raise ContradictionError(
            f"has the box {shorten(box)}; give four finite numbers: x, y, width, height"
        )
    return values  # type: ignore[return-value]


def _fault_of_place(box: Any, mask: Any, height: float, width: float) -> str | None:
    """Say why nothing of a box or of its mask, if any, is in an image; None where something is."""
    x, y, box_width, box_height = box
    if not (box_width > 0 and box_height > 0):
        return f"its box has no area (width {box_width:g}, height {box_height:g})"
    if x >= width or y >= height or x + box_width <= 0 or y + box_height <= 0:
        return f"its box {shorten(list(box))} is outside of the image of {width}x{height} pixels"
    if mask and is_outside(mask, height, width):
        return f"its mask is outside of the image of {width}x{height} pixels"
    return None


def _leaves(box: Any, height: float, width: float) -> bool:
    """Whether a box reaches out of its image by more than rounding."""
    x, y, box_width, box_height = box
    return (
        x + box_width > width + _ROUNDING
        or y + box_height > height + _ROUNDING
        or min(x, y) < -_ROUNDING
    )


def _clean_crowd(annotation: dict, repairs: Repairs, place: Place) -> int:
    if annotation.get("ignore") not in (None, 0, "", "0", "false"):
        raise ContradictionError(
            'has "ignore", which detectron2 does not support; remove it or set "iscrowd" instead'
        )
    value = annotation.get("iscrowd")
    if value.__class__ is int and value in (0, 1):
        return value
    if value is None:
        repairs.add(CROWD, place)
        return 0
    if isinstance(value, str):
        value = {"false": 0, "true": 1}.get(value.strip().lower(), value)
    crowd = int(value) if isinstance(value, bool) else whole(value, repairs, place)
    if crowd not in (0, 1):
        raise ContradictionError(f'has "iscrowd" {shorten(value)}; write 0 or 1')
    return crowd


def _clean_area(annotation: dict, repairs: Repairs, place: Place) -> float | None:
    """The area as it is given; None where it is not: nothing that is seen covers 0 pixels."""
    value = annotation.get("area")
    if value.__class__ is float and 0 < value < float("inf"):  # as in COCO's files
        return value
    area = None if value is None else number(value, repairs, place)
    if area is None or area <= 0:
        repairs.add(AREA, place)
        return None
    return area


def _examples(ids: Mapping[Any, Any]) -> str:
    first = [shorten(id_) for id_ in list(ids)[:3]]
    return ", ".join(first) + (", ..." if len(ids) > 3 else "")
