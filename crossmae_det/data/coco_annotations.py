"""One annotation of a COCO json in its clean form: see `coco_json.CocoFile`."""

from collections.abc import Mapping
from typing import Any

from crossmae_det.data import coco_values
from crossmae_det.data.coco_masks import NO_AREA, clean_mask, covers_anything, is_outside
from crossmae_det.data.coco_values import Place, Repairs, identifier, number, short, whole

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
            f"points to image {short(image_id)}, which is absent (there are "
            f"{_examples(sizes)}); remove it or add the image"
        )
    category_id = annotation.get("category_id")
    if category_id.__class__ is not int:
        category_id = whole(_get(annotation, "category_id"), repairs, place)
    if category_id not in categories:
        raise ContradictionError(
            f"points to category {short(annotation['category_id'])}, which is absent (there are "
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
        repairs.add(coco_values.BOX_OUTSIDE, place)
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
                f"has a value of the wrong type, {key} {short(value)}; write an integer"
            )


def area_fault(annotation: Mapping[str, Any], height: float, width: float) -> str | None:
    """Say what keeps an annotation of a record from being a training target, or None.

    For records that a data set's own function made; those made from here are checked already.

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
            f"has a value of the wrong type in the box {short(box)}; give four numbers"
        )
    if len(values) != 4 or any(v is None or abs(v) >= _FAR for v in values):
        raise ContradictionError(
            f"has the box {short(box)}; give four finite numbers: x, y, width, height"
        )
    return values  # type: ignore[return-value]


def _fault_of_place(box: Any, mask: Any, height: float, width: float) -> str | None:
    """Say why nothing of a box or of its mask, if any, is in an image; None where something is."""
    x, y, box_width, box_height = box
    if not (box_width > 0 and box_height > 0):
        return f"its box has no area (width {box_width:g}, height {box_height:g})"
    if x >= width or y >= height or x + box_width <= 0 or y + box_height <= 0:
        return f"its box {short(list(box))} is outside of the image of {width}x{height} pixels"
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
        repairs.add(coco_values.CROWD, place)
        return 0
    if isinstance(value, str):
        value = {"false": 0, "true": 1}.get(value.strip().lower(), value)
    crowd = int(value) if isinstance(value, bool) else whole(value, repairs, place)
    if crowd not in (0, 1):
        raise ContradictionError(f'has "iscrowd" {short(value)}; write 0 or 1')
    return crowd


def _clean_area(annotation: dict, repairs: Repairs, place: Place) -> float | None:
    """The area as it is given; None where it is not: nothing that is seen covers 0 pixels."""
    value = annotation.get("area")
    if value.__class__ is float and 0 < value < float("inf"):  # as in COCO's files
        return value
    area = None if value is None else number(value, repairs, place)
    if area is None or area <= 0:
        repairs.add(coco_values.AREA, place)
        return None
    return area


def _examples(ids: Mapping[Any, Any]) -> str:
    first = [short(id_) for id_ in list(ids)[:3]]
    return ", ".join(first) + (", ..." if len(ids) > 3 else "")
