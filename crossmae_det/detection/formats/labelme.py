"""labelme: a JSON file with shapes for each image, beside it or at its ``imagePath``.

- Polygons, circles and masks have a mask; rectangles are boxes.
- Shapes of one label and one ``group_id`` are parts of one object.
- Lines and points are no objects; they are counted in the log.
- Images without a JSON file are left out, as not yet annotated.
- The classes are those of all JSON files, of every split, or those listed in ``labels.txt``.
"""

import base64
import binascii
import json
import math
import os
from collections.abc import Collection, Mapping
from typing import Any

import cv2
import numpy as np

from crossmae_det.detection.formats.content import (
    Collector,
    Content,
    box_around,
    by_stem,
    ellipse_polygon,
    encode,
    existing_folder,
    find_files,
    image_sizes,
    merge_masks,
    read_classes,
    read_text,
    union_box,
)
from crossmae_det.detection.formats.spec import Spec, choose_split, split_folders
from crossmae_det.utils.messages import shorten

_SKIPPED = ("line", "linestrip", "point", "points")

Part = tuple[list[float], list | dict | None]  # box, mask


def splits(spec: Spec) -> list[str]:
    """The folders that are named like splits; [] without any."""
    return list(split_folders(spec.path))


def read(spec: Spec) -> Content:
    """Read one split.

    Raises:
        FileNotFoundError: the folder does not exist or has no JSON file of labelme.
        ValueError: a file cannot be read; one line that names the file and the shape.
    """
    existing_folder(spec.path, spec.text)
    folders = split_folders(spec.path)
    split = choose_split(spec, folders)
    classes, class_file = read_classes(spec.path)
    collector = Collector(spec.path, classes, class_file)
    collector.uses(*[class_file] * bool(class_file))
    files = find_files(spec.path, collector)
    prefix = os.path.basename(folders[split]) + os.sep if split else ""
    entries = []
    for name in files:
        if not name.lower().endswith(".json"):
            continue
        path = os.path.join(spec.path, name)
        data = _read_json(path)
        if data is None:
            continue
        collector.uses(path)
        if name.startswith(prefix):
            entries.append((name, data))
        else:
            for number, shape in enumerate(data["shapes"], start=1):
                if shape.get("shape_type") not in _SKIPPED:
                    collector.see_class(shape.get("label"), f"{path}: shape {number}")
    if not entries:
        raise FileNotFoundError(
            f"{os.path.join(spec.path, prefix)}: there is no JSON file of labelme: check the path"
        )
    images = by_stem(files)
    _add(spec.path, entries, images, set(files), collector)
    used = {image["file_name"] for image in collector.content.images}
    for name in images.values():
        if name.startswith(prefix) and name not in used:
            collector.count("images without a JSON file, left out", os.path.join(spec.path, name))
    return collector.finish()


def _read_json(path: str) -> dict[str, Any] | None:
    """The content of a JSON file; None if it is none of labelme's."""
    try:
        data = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path}: not a complete json file ({error}): save or copy it again"
        ) from error
    if not isinstance(data, dict) or "shapes" not in data:
        return None
    shapes = data["shapes"]
    if not isinstance(shapes, list) or not all(isinstance(shape, dict) for shape in shapes):
        raise ValueError(f"{path}: 'shapes' is not a list of objects: save the file again")
    return data


def _add(
    folder: str,
    entries: list[tuple[str, dict[str, Any]]],
    images: Mapping[str, str],
    files: Collection[str],
    collector: Collector,
) -> None:
    names = [_image_of(name, data, images, files) for name, data in entries]
    sizes = [_size(data) for _, data in entries]
    unsized = [i for i, size in enumerate(sizes) if size is None]
    paths = [os.path.join(folder, names[i]) for i in unsized]
    collector.uses(*paths)
    for index, found in zip(unsized, image_sizes(paths), strict=True):
        sizes[index] = found
    for (name, data), image, size in zip(entries, names, sizes, strict=True):
        height, width = size  # type: ignore[misc]
        path = os.path.join(folder, name)
        image_id = collector.image(image, height, width, path)
        groups: dict[tuple[str, Any], tuple[str, list[Part]]] = {}
        for number, shape in enumerate(data["shapes"], start=1):
            label = shape.get("label")
            source = f"{path}: shape {number} ({label})"
            kind = shape.get("shape_type") or "polygon"
            if kind in _SKIPPED:
                collector.count(f"shapes of type {kind}, which are no objects, left out", source)
                continue
            label = collector.see_class(label, f"{path}: shape {number}")
            part = _part(kind, shape, source, height, width)
            group = shape.get("group_id")
            key = (label, f"shape {number}" if group is None else f"group {group!r}")
            groups.setdefault(key, (source, []))[1].append(part)
        for (label, _), (source, parts) in groups.items():
            masks = [mask for _, mask in parts if mask is not None]
            collector.add(
                image_id,
                label,
                source,
                box=union_box(box for box, _ in parts),
                mask=merge_masks(masks, height, width) if masks else None,
            )


def _image_of(
    name: str, data: Mapping[str, Any], images: Mapping[str, str], files: Collection[str]
) -> str:
    """The path of an image below the folder: its ``imagePath``, or else the image beside it."""
    stem, folder = os.path.splitext(name)[0], os.path.dirname(name)
    stated = data.get("imagePath")
    if isinstance(stated, str) and stated:
        stated = stated.replace("\\", "/")
        below = os.path.normpath(os.path.join(folder, stated))
        beside = os.path.normpath(os.path.join(folder, os.path.basename(stated)))
        found = next((p for p in (below, beside) if p in files), None)
        return found or images.get(stem) or below
    return images.get(stem, f"{stem}.jpg")


def _size(data: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) as the file states them; None if it does not."""
    height, width = data.get("imageHeight"), data.get("imageWidth")
    if not isinstance(height, int) or not isinstance(width, int) or min(height, width) < 1:
        return None
    return height, width


def _part(kind: str, shape: Mapping[str, Any], source: str, height: int, width: int) -> Part:
    """The box and the mask of a shape; of a rectangle, the mask is None."""
    points = _points(shape, source)
    if kind == "polygon":
        if len(points) < 3:
            raise ValueError(f"{source} is a polygon of {len(points)} points: give three or more")
        polygon = [value for point in points for value in point]
        return box_around([polygon]), [polygon]
    if kind == "rectangle":
        if len(points) not in (2, 4):
            raise ValueError(f"{source} is a rectangle of {len(points)} points: give two corners")
        return box_around([[value for point in points for value in point]]), None
    if kind == "circle":
        if len(points) != 2:
            raise ValueError(f"{source} is a circle of {len(points)} points: give two")
        (cx, cy), edge = points
        radius = math.dist((cx, cy), edge)
        polygon = ellipse_polygon(cx, cy, radius, radius)
        return box_around([polygon]), [polygon]
    if kind == "mask":
        lengths = encode(_decode_mask(shape, points, source, height, width))
        return box_around(lengths), lengths
    raise ValueError(
        f"{source} is of the unknown type {kind!r}: use polygon, rectangle, circle or mask"
    )


def _points(shape: Mapping[str, Any], source: str) -> list[list[float]]:
    points = shape.get("points")
    fits = isinstance(points, list) and all(
        isinstance(point, list)
        and len(point) == 2
        and all(type(value) in (int, float) and abs(value) < 1e9 for value in point)
        for point in points
    )
    if not fits:
        raise ValueError(
            f"{source} has the points {shorten(points)}: give a list of finite x and y"
        )
    return points  # type: ignore[return-value]


def _decode_mask(
    shape: Mapping[str, Any], points: list[list[float]], source: str, height: int, width: int
) -> np.ndarray:
    """The mask of the whole image, from the PNG of the rectangle that it fills."""
    try:
        data = base64.b64decode(shape.get("mask") or "", validate=False)
    except (binascii.Error, TypeError, ValueError):
        data = b""
    pixels: Any = None
    if data:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or len(points) != 2:
        raise ValueError(f"{source} has no mask that can be decoded: draw it again")
    if pixels.ndim == 3:
        pixels = pixels[..., :3].any(axis=2)
    x, y = (round(min(point[axis] for point in points)) for axis in (0, 1))
    h, w = pixels.shape
    if x < 0 or y < 0 or x + w > width or y + h > height:
        raise ValueError(f"{source} leaves its image of {width}x{height} pixels: draw it again")
    mask = np.zeros((height, width), np.uint8)
    mask[y : y + h, x : x + w] = pixels != 0
    return mask
