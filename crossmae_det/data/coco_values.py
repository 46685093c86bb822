"""Single values of a COCO json: read as what they mean, and counted where they had to be repaired.

Exporters write ``1`` as ``1.0`` or ``"1"``, and leave out what they hold to be the default. Such a
value has one meaning only, so it is read as that; anything else is None here, and an error of the
caller's, who knows which image or annotation it belongs to.
"""

import math
import re
from typing import Any

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


def short(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False
