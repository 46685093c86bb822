"""One annotation of a COCO json: its values, its mask, and whether it can be a training target.

Exporters write ``1`` as ``1.0`` or ``"1"`` and omit what they consider the default. A value with a
single possible meaning is read as such and counted as a repair; anything else is an error.

Masks have one of two forms: a list of polygons, or compressed run lengths. Run lengths are checked
before they are decoded: pycocotools writes out of bounds, or never returns, if they do not add up
to the image.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from crossmae_det.utils.messages import list_names, shorten

_INTEGER = re.compile(r"\s*[+-]?\d{1,18}\s*", re.ASCII)
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
_LARGEST = 1e18  # no valid box, area or id reaches it

# Twice the area (square pixels) below which three vertices count as collinear: above the rounding
# error of coordinates up to 10^4, far below anything that covers a pixel.
_MIN_CROSS = 1e-6

# Coordinates may leave the image, but rasterizing takes time and memory in proportion to them.
_MAX_SIDES_AWAY = 16

# Pixels by which boxes may leave their images because a tool rounds, or counts from 1.
_ROUNDING = 2.0

_NO_AREA = "its mask has no area"


class AnnotationError(ValueError):
    """An annotation that cannot be read; the message continues "annotation 12 ..."."""


class ValueReader:
    """Reads single values, and counts the repairs of each kind.

    Args:
        sources: where each annotation is from, by its id less one, if it is from no COCO json.

    Attributes:
        place: what is being read, such as ``("annotation", 12)``; kept for the first of each kind.
    """

    def __init__(self, sources: Sequence[str] = ()) -> None:
        self.sources = sources
        self.place: tuple[str, Any] = ("", None)
        self._repairs: dict[str, tuple[int, tuple[str, Any]]] = {}

    def repair(self, kind: str, count: int = 1) -> None:
        before, first = self._repairs.get(kind, (0, self.place))
        self._repairs[kind] = before + count, first

    def repairs(self) -> tuple[str, ...]:
        """A line for each kind: "numbers written as text, read as numbers: 3 (first: image 7)"."""
        return tuple(
            f"{kind}: {count} (first: {self._name(*place)})"
            for kind, (count, place) in self._repairs.items()
        )

    def _name(self, kind: str, id_: Any) -> str:
        if self.sources and kind == "annotation":
            return self.sources[id_ - 1]
        return f"{kind} {id_!r}"

    def number(self, value: Any) -> int | float | None:
        """A finite number, possibly written as text; None for anything else."""
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            value = int(value) if _INTEGER.fullmatch(value) else float(value)
            self.repair("numbers written as text, read as numbers")
        is_number = type(value) in (int, float)  # not bool
        return value if is_number and -_LARGEST < value < _LARGEST else None

    def integer(self, value: Any) -> int | None:
        """An integer, possibly written as text or as a float; None for anything else."""
        if value.__class__ is int:
            return value
        number = self.number(value)
        if number is None or number != int(number):
            return None
        if isinstance(value, float):
            self.repair("integers written as floats, read as integers")
        return int(number)

    def identifier(self, value: Any) -> int | str | None:
        """An id: an integer if the value is one, else its text; None for anything else."""
        if isinstance(value, str) and not _NUMBER.fullmatch(value):
            return value or None
        return self.integer(value)


def id_order(id_: int | str) -> tuple[bool, int | str]:
    """Sort key for ids, some of which may be text: numbers first."""
    return isinstance(id_, str), id_


def clean_annotation(
    annotation: dict,
    sizes: Mapping[int | str, tuple[int, int]],
    categories: Mapping[int, str],
    reader: ValueReader,
) -> str | None:
    """Bring one annotation into the form of `coco_json.CocoFile`, in place.

    Args:
        annotation: as in the json.
        sizes: image id -> (height, width) in pixels.
        categories: category id -> name.
        reader: counts the repairs.

    Returns:
        Why nothing can be trained on the annotation; None if it is a training target.

    Raises:
        AnnotationError: it cannot be read.
    """
    reader.place = "annotation", annotation.get("id")
    for key in ("id", "image_id"):
        if annotation.get(key).__class__ is not int:
            value = _required(annotation, key)
            if (identifier := reader.identifier(value)) is None:
                raise AnnotationError(f"has the {key} {shorten(value)}: write an integer")
            annotation[key] = identifier
    size = sizes.get(annotation["image_id"])
    if size is None:
        raise AnnotationError(
            f"points to image {shorten(annotation['image_id'])}, which is not among the "
            f"{list_names(sizes)}: remove it or add the image"
        )
    category_id = reader.integer(_required(annotation, "category_id"))
    if category_id not in categories:
        raise AnnotationError(
            f"points to category {shorten(annotation['category_id'])}, which is not among the "
            f"{list_names(categories)}: remove it or add the category"
        )
    annotation["category_id"] = category_id
    box = annotation["bbox"] = _clean_box(_required(annotation, "bbox"), reader)
    annotation["iscrowd"] = _clean_crowd(annotation, reader)
    area = annotation["area"] = reader.number(annotation.get("area"))
    if area is None or area <= 0:  # no visible object covers 0 pixels
        annotation["area"] = None
        if not reader.sources:  # other layouts have no areas
            reader.repair("annotations without area, computed from the mask or else the box")

    mask, has_area = clean_mask(annotation.get("segmentation"), *size, reader)
    if mask:
        annotation["segmentation"] = mask
    else:
        annotation.pop("segmentation", None)
    if mask is not None and not has_area:
        return _NO_AREA
    fault = _location_fault(box, mask, *size)
    if fault is None:
        (x, y, box_width, box_height), (height, width) = box, size
        right, bottom = x + box_width - width, y + box_height - height
        if max(-x, -y, right, bottom) > _ROUNDING:
            reader.repair(
                "boxes that leave their images, clipped in training (are they x, y, width, height?)"
            )
    return fault


def area_fault(annotation: Mapping[str, Any], height: float, width: float) -> str | None:
    """Why nothing can be trained on an annotation of a record; None if it is a training target.

    For records from a dataset's own function; annotations of a `CocoFile` are already checked.

    Args:
        annotation: in detectron2's format, with ``bbox`` as x, y, width, height in pixels.
        height, width: of the image, in pixels.
    """
    if annotation.get("iscrowd", 0):
        return None
    mask = annotation.get("segmentation")
    if isinstance(mask, Mapping):
        counts = mask["counts"]
        covered = sum(counts[1::2]) if isinstance(counts, list) else mask_util.area(mask)
        if not covered:
            return _NO_AREA
    elif mask and not any(map(_has_area, mask)):
        return _NO_AREA
    return _location_fault(annotation["bbox"], mask, height, width)


def mask_area(mask: list | Mapping[str, Any], height: int, width: int) -> float:
    """Area in pixels of a clean mask, computed as COCO computes its own."""
    if isinstance(mask, list):
        mask = mask_util.merge(mask_util.frPyObjects(mask, height, width))
    return float(mask_util.area(mask))


def clean_mask(
    value: Any, height: int, width: int, reader: ValueReader
) -> tuple[list | dict | None, bool]:
    """Read the ``segmentation`` of an annotation.

    Args:
        value: as in the json.
        height, width: of the image, in pixels.
        reader: counts the repairs.

    Returns:
        The mask, and whether it covers anything. The mask is None if there is none; a list of
        polygons, each of at least three vertices as x, y, x, y, ... in pixels; or compressed run
        lengths, ``{"size": [height, width], "counts": str or bytes}``. Polygons without area are
        dropped if others have one; polygons with fewer vertices are always dropped.

    Raises:
        AnnotationError: the mask has neither form, or does not fit its image.
    """
    if not value:
        return None, False
    if isinstance(value, Mapping):
        return _clean_run_lengths(value, height, width, reader)
    if not isinstance(value, list) or not all(isinstance(polygon, list) for polygon in value):
        raise AnnotationError(
            "has a segmentation that is not a list of polygons: write [[x, y, x, y, ...], ...]"
        )
    limit = _MAX_SIDES_AWAY * max(height, width)
    polygons = [_clean_polygon(polygon, limit, reader) for polygon in value if polygon]
    if not polygons:
        reader.repair("masks of empty polygons, read as no mask")
        return None, False
    good = [polygon for polygon in polygons if _has_area(polygon)]
    if not good:
        return [p for p in polygons if len(p) >= 6 and len(p) % 2 == 0], False
    if len(good) < len(value):
        dropped = len(value) - len(good)
        reader.repair("polygons of fewer than three vertices or without area, dropped", dropped)
    return good, True


def run_lengths(counts: str) -> list[int] | None:
    """Decode compressed run lengths, each at least 0; None if they cannot be decoded.

    The encoding: each run is a sequence of groups of five bits, lowest first, in characters from
    "0" on. The sixth bit means that more follow; the fifth bit of the last group is the sign. From
    the fourth run on, the value is the difference from the run before the previous one.
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
    return None if runs.min() < 0 else runs.tolist()


def _clean_run_lengths(
    value: Mapping[str, Any], height: int, width: int, reader: ValueReader
) -> tuple[dict, bool]:
    size, counts = value.get("size"), value.get("counts")
    if size is None:
        reader.repair("run-length masks without size, given that of the image")
    elif not isinstance(size, list) or list(map(reader.integer, size)) != [height, width]:
        raise AnnotationError(
            f"has a mask of size {shorten(size)}, but its image has {[height, width]}: "
            "encode the mask again"
        )
    runs: list[Any] | None
    if isinstance(counts, list):
        runs = list(map(reader.integer, counts))
    elif isinstance(counts, str):
        runs = run_lengths(counts)
    else:
        raise AnnotationError('has "counts" that are not a list or a string: encode the mask again')
    if runs is None or None in runs or min(runs, default=0) < 0 or sum(runs) != height * width:
        raise AnnotationError("has run lengths that do not fit its image: encode the mask again")
    mask = {"size": [height, width], "counts": runs if isinstance(counts, list) else counts}
    if isinstance(counts, list):
        mask = mask_util.frPyObjects(mask, height, width)
    return mask, sum(runs[1::2]) > 0


def _clean_polygon(polygon: list, limit: int, reader: ValueReader) -> list:
    """The polygon as numbers, each within ``limit`` pixels."""
    try:
        near = min(polygon) >= -limit and max(polygon) <= limit and math.isfinite(sum(polygon))
    except TypeError:
        numbers = [reader.number(value) for value in polygon]
        if None in numbers:
            raise AnnotationError(
                f"has a polygon with the coordinates {shorten(polygon)}: give finite numbers"
            ) from None
        return _clean_polygon(numbers, limit, reader)
    if not near:
        raise AnnotationError(
            "has a polygon with a coordinate that is not finite or far outside of the image: "
            "correct or remove it"
        )
    return polygon


def _has_area(polygon: Any) -> bool:
    """Whether a polygon x, y, x, y, ... has three vertices that are not collinear.

    Unlike the signed area, this reads only three or four vertices of most polygons, and does not
    cancel out in a figure of eight.
    """
    if len(polygon) < 6 or len(polygon) % 2:
        return False
    x0, y0 = polygon[0], polygon[1]
    dx = dy = 0.0
    for k in range(2, len(polygon), 2):
        x, y = polygon[k] - x0, polygon[k + 1] - y0
        if abs(dx * y - dy * x) > _MIN_CROSS:
            return True
        if abs(x) + abs(y) > abs(dx) + abs(dy):  # close points give no direction
            dx, dy = x, y
    return False


def _location_fault(box: Any, mask: Any, height: float, width: float) -> str | None:
    """Why no part of a box, or of its mask if any, is in the image; None if some part is."""
    x, y, box_width, box_height = box
    if not (box_width > 0 and box_height > 0):
        return f"its box has no area (width {box_width:g}, height {box_height:g})"
    if x >= width or y >= height or x + box_width <= 0 or y + box_height <= 0:
        return f"its box {shorten(list(box))} is outside of the image of {width}x{height} pixels"
    if mask and not isinstance(mask, Mapping) and _is_outside(mask, height, width):
        return f"its mask is outside of the image of {width}x{height} pixels"
    return None


def _is_outside(polygons: Any, height: float, width: float) -> bool:
    for polygon in polygons:
        if 0 < polygon[0] < width and 0 < polygon[1] < height:  # one vertex settles most polygons
            return False
        xs, ys = polygon[::2], polygon[1::2]
        if min(xs) < width and min(ys) < height and max(xs) > 0 and max(ys) > 0:
            return False
    return True


def _required(annotation: Mapping[str, Any], key: str) -> Any:
    value = annotation.get(key)
    if value is None:
        raise AnnotationError(f"has no {key!r}: add it or remove the annotation")
    return value


def _clean_box(box: Any, reader: ValueReader) -> list[int | float]:
    values = [reader.number(value) for value in box] if isinstance(box, list) else []
    if len(values) != 4 or None in values:
        raise AnnotationError(
            f"has the box {shorten(box)}: give four finite numbers, x, y, width, height"
        )
    return values  # type: ignore[return-value]


def _clean_crowd(annotation: dict, reader: ValueReader) -> int:
    if annotation.get("ignore") not in (None, 0, "", "0", "false"):
        raise AnnotationError(
            'has "ignore", which detectron2 does not support: remove it or set "iscrowd" instead'
        )
    value = annotation.get("iscrowd")
    if value is None:
        reader.repair("annotations without iscrowd, read as 0")
        return 0
    if isinstance(value, str):
        value = {"false": 0, "true": 1}.get(value.strip().lower(), value)
    crowd = int(value) if isinstance(value, bool) else reader.integer(value)
    if crowd not in (0, 1):
        raise AnnotationError(f'has "iscrowd" {shorten(value)}: write 0 or 1')
    return crowd
