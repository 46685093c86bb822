"""CVAT for images 1.1: one XML file with boxes, polygons, masks and ellipses.

- A box with a rotation is read as the box around it, without a mask.
- Polygons, masks and ellipses of one label and one ``group_id`` in an image are one object, as in
  CVAT's own export to COCO.
- Polylines, points, cuboids, skeletons and tags are no objects; they are counted in the log.
- The attribute ``subset`` of an image is its split.
"""

import math
import os
from functools import lru_cache

import numpy as np

from crossmae_det.detection.formats.content import (
    Collector,
    Content,
    by_stem,
    ellipse_polygon,
    encode,
    existing_folder,
    find_files,
    merge_masks,
)
from crossmae_det.detection.formats.spec import Spec, choose_split
from crossmae_det.detection.formats.xml_reading import Element, children_of_root
from crossmae_det.utils.image_files import is_image_file
from crossmae_det.utils.messages import shorten

_SKIPPED = ("polyline", "points", "cuboid", "skeleton", "tag")


def splits(spec: Spec) -> list[str]:
    """The subsets of the images; [] if there are none.

    Raises:
        FileNotFoundError, ValueError: as `read`.
    """
    if not os.path.isfile(spec.path):
        raise FileNotFoundError(f"{spec.path}: no such annotation file: check {spec.text!r}")
    status = os.stat(spec.path)
    return list(_subsets(spec.path, status.st_mtime_ns, status.st_size))


def read(spec: Spec) -> Content:
    """Read one split.

    Raises:
        FileNotFoundError: the XML file or the image folder does not exist.
        ValueError: the file cannot be read; one line that names the file and the line.
    """
    _frames.cache_clear()  # images may have been added
    split = choose_split(spec, splits(spec))
    root = _image_root(spec)
    collector = Collector(root)
    labels: list[str] = []
    for element in children_of_root(spec.path, "annotations"):
        if element.tag == "track":
            raise ValueError(
                f"{spec.path}, line {element.line}: holds tracks, as CVAT for video: export it as "
                "'CVAT for images 1.1'"
            )
        if element.tag == "meta" and not labels:
            labels = _labels(element)
            if labels:
                collector = Collector(root, labels, f"the labels in {spec.path}")
        if element.tag == "image":
            _read_image(element, spec.path, split, root, collector)
    collector.uses(spec.path)
    if not collector.content.images:
        raise ValueError(f"{spec.path}: has no <image>: export it as 'CVAT for images 1.1'")
    return collector.finish()


@lru_cache(maxsize=8)
def _subsets(path: str, time: int, size: int) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for element in children_of_root(path, "annotations"):
        if element.tag == "image" and (subset := element.attributes.get("subset")):
            found[subset] = None
    return tuple(found)


def _image_root(spec: Spec) -> str:
    if spec.images:
        return existing_folder(spec.images, spec.text)
    folder = os.path.dirname(spec.path) or os.curdir
    images = os.path.join(folder, "images")  # as in an export with the images
    return images if os.path.isdir(images) else folder


def _labels(meta: Element) -> list[str]:
    """The labels of a task, a job or a project; those below skeletons are no classes."""
    names = []
    for part in meta.children:
        labels = part.find("labels")
        for label in labels.find_all("label") if labels else []:
            if label.text_of("parent") is None and (name := label.text_of("name")):
                names.append(name)
    return list(dict.fromkeys(names))


def _read_image(element: Element, path: str, split: str, root: str, collector: Collector) -> None:
    source = f"{path}, line {element.line}"
    name, subset = element.attributes.get("name"), element.attributes.get("subset", "")
    if not name:
        raise ValueError(f"{source}: an <image> has no name: add it")
    height, width = (round(_number(element, side, path)) for side in ("height", "width"))
    if min(height, width) < 1:
        raise ValueError(f"{source}: the image {name} has no pixels: correct width and height")
    keep = not split or subset == split
    image_id = ""
    if keep:
        if subset and os.path.isfile(os.path.join(root, subset, name)):
            name = os.path.join(subset, name)
        if not is_image_file(name):  # a frame of a video
            name = _frames(root).get(name, name)
        image_id = collector.image(name, height, width, source)
    groups: dict[tuple[str, str], tuple[str, list[list | dict]]] = {}
    for number, shape in enumerate(element.children):
        source = f"{path}, line {shape.line}: <{shape.tag}> of image {name}"
        if shape.tag in _SKIPPED:
            if keep:
                collector.count(f"<{shape.tag}>, which are no objects, left out", source)
            continue
        if shape.tag not in ("box", "polygon", "mask", "ellipse"):
            raise ValueError(f"{source} is of an unknown kind: export as 'CVAT for images 1.1'")
        label = collector.see_class(shape.attributes.get("label"), source)
        if not keep:
            continue
        if shape.tag == "box":
            collector.add(image_id, label, source, box=_box(shape, path))
            continue
        mask = _mask(shape, path, height, width)
        group = shape.attributes.get("group_id", "0")
        key = (label, group if group not in ("", "0") else f"shape {number}")
        groups.setdefault(key, (source, []))[1].append(mask)
    for (label, _), (source, masks) in groups.items():
        collector.add(image_id, label, source, mask=merge_masks(masks, height, width))


@lru_cache(maxsize=1)
def _frames(root: str) -> dict[str, str]:
    """Path of an image without suffix -> its path; CVAT names frames of videos without one."""
    return by_stem(find_files(root, Collector(root)))


def _number(element: Element, name: str, path: str) -> float:
    text = element.attributes.get(name)
    try:
        value = float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = math.nan
    if not abs(value) < 1e9:
        what = "is missing" if text is None else f"is {shorten(text)}"
        raise ValueError(
            f"{path}, line {element.line}: {name} of <{element.tag}> {what}: write a number"
        )
    return value


def _box(shape: Element, path: str) -> list[float]:
    x0, y0, x1, y1 = (_number(shape, side, path) for side in ("xtl", "ytl", "xbr", "ybr"))
    degrees = _number(shape, "rotation", path) if "rotation" in shape.attributes else 0.0
    if degrees:
        cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
        cx, cy, w, h = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
        w, h = w * cos + h * sin, w * sin + h * cos
        x0, x1, y0, y1 = cx - w / 2, cx + w / 2, cy - h / 2, cy + h / 2
    return [x0, y0, x1 - x0, y1 - y0]


def _mask(shape: Element, path: str, height: int, width: int) -> list | dict:
    source = f"{path}, line {shape.line}: <{shape.tag}>"
    if shape.tag == "ellipse":
        cx, cy, rx, ry = (_number(shape, name, path) for name in ("cx", "cy", "rx", "ry"))
        degrees = _number(shape, "rotation", path) if "rotation" in shape.attributes else 0.0
        return [ellipse_polygon(cx, cy, rx, ry, degrees)]
    if shape.tag == "polygon":
        text = shape.attributes.get("points", "")
        try:
            points = [[float(v) for v in point.split(",")] for point in text.split(";")]
        except ValueError:
            points = []
        if len(points) < 3 or any(len(point) != 2 for point in points):
            raise ValueError(f"{source} has the points {shorten(text)}: write x,y;x,y;x,y;...")
        return [[value for point in points for value in point]]
    left, top, w, h = (round(_number(shape, n, path)) for n in ("left", "top", "width", "height"))
    text = shape.attributes.get("rle", "")
    try:
        runs = [int(run) for run in text.split(",")]
    except ValueError:
        runs = [-1]
    if min(w, h) < 1 or min(runs) < 0 or sum(runs) != w * h:
        raise ValueError(f"{source} has an rle that does not fit {w}x{h} pixels: export it again")
    if left < 0 or top < 0 or left + w > width or top + h > height:
        raise ValueError(f"{source} leaves its image of {width}x{height} pixels: export it again")
    mask = np.zeros((height, width), np.uint8)
    values = np.arange(len(runs)) % 2
    mask[top : top + h, left : left + w] = np.repeat(values, runs).reshape(h, w)
    return encode(mask)
