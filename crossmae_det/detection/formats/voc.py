"""Pascal VOC: ``JPEGImages``, ``Annotations``, ``ImageSets/Main``, ``SegmentationObject``.

A folder of images with their XML files, as LabelImg writes them, is read as well; it may have
folders for its splits.

- Coordinates count pixels from 1 and include the last one: a box from 1 to W covers the image.
- ``difficult`` objects are ignored, as in VOC's own evaluation: they become crowd regions, on which
  nothing is trained and which count neither as found nor as missed.
- Instance masks come from ``SegmentationObject``. Its values number the objects of the XML file.
- The classes are those of all XML files, of every split, or those listed in ``labels.txt``.
"""

import os
from dataclasses import dataclass

import numpy as np
from PIL import Image

from crossmae_det.detection.formats.content import (
    Collector,
    Content,
    by_stem,
    encode,
    existing_folder,
    find_files,
    image_sizes,
    read_classes,
    read_text,
)
from crossmae_det.detection.formats.spec import Spec, choose_split, split_folders
from crossmae_det.detection.formats.xml_reading import Element, children_of_root
from crossmae_det.utils.image_files import is_image_file
from crossmae_det.utils.image_reading import naming_errors
from crossmae_det.utils.messages import shorten

_IMAGES, _ANNOTATIONS, _MASKS = "JPEGImages", "Annotations", "SegmentationObject"
_SETS = ("Main", "Segmentation")  # folders of ImageSets
_SPLITS = ("train", "val", "trainval", "test")

_VOID = 255  # the border between objects
_COLOR_BITS = 8

# Least overlap of a mask's box and an annotated box: by the number of the object, and by overlap
# alone where the numbers do not fit.
_MIN_IOU, _MIN_IOU_UNNUMBERED = 0.1, 0.4


@dataclass
class _Object:
    name: str
    box: list[float]
    difficult: bool
    source: str


@dataclass
class _Annotation:
    """The content of an XML file; ``size`` is (height, width), None where it is not given."""

    path: str
    file_name: str
    size: tuple[int, int] | None
    objects: list[_Object]


def splits(spec: Spec) -> list[str]:
    """The splits of a dataset: its lists of images, or its folders; [] without any."""
    return list(_image_sets(spec.path) or _folders(spec.path))


def read(spec: Spec) -> Content:
    """Read one split.

    Raises:
        FileNotFoundError: a file of the split does not exist.
        ValueError: a file cannot be read; one line that names the file and the line.
    """
    existing_folder(spec.path, spec.text)
    sets, folders = _image_sets(spec.path), _folders(spec.path)
    split = choose_split(spec, sets or folders)
    classes, class_file = read_classes(spec.path)
    collector = Collector(_image_root(spec.path), classes, class_file)
    collector.uses(*[class_file] * bool(class_file))
    files = find_files(spec.path, collector)
    xmls = {os.path.splitext(n)[0]: n for n in files if n.lower().endswith(".xml")}
    if os.path.isdir(os.path.join(spec.path, _ANNOTATIONS)):
        xmls = {stem: n for stem, n in xmls.items() if n.startswith(_ANNOTATIONS + os.sep)}
    if not xmls:
        raise FileNotFoundError(f"{spec.path}: there is no XML file in this folder: check the path")
    collector.uses(*(os.path.join(spec.path, name) for name in xmls.values()))
    images = by_stem(files)
    if sets:
        collector.uses(sets[split])
        names = [os.path.join(_ANNOTATIONS, name) for name in _listed(sets[split], xmls)]
        if not names:
            raise ValueError(f"{sets[split]}: lists no image: write one a line")
        if missing := [name for name in names if name not in xmls]:
            raise FileNotFoundError(
                f"{spec.path}: {sets[split]} lists {len(missing)} images without an XML file, the "
                f"first would be {missing[0]}.xml: add the files or remove the lines"
            )
    elif folders:
        prefix = os.path.basename(folders[split]) + os.sep
        names = [name for name in xmls if name.startswith(prefix)]
    else:
        names = list(xmls)
    chosen = set(names)
    annotations: dict[str, _Annotation] = {}
    for name, file_name in xmls.items():
        # Every split is read: the classes are those of all.
        annotation = _read_xml(os.path.join(spec.path, file_name), collector)
        if name in chosen:
            annotations[name] = annotation
    _add(spec.path, annotations, images, set(files), collector)
    return collector.finish()


def _folders(folder: str) -> dict[str, str]:
    """The folders of splits, where the folder itself does not have VOC's layout."""
    return {} if os.path.isdir(os.path.join(folder, _ANNOTATIONS)) else split_folders(folder)


def _image_root(folder: str) -> str:
    """The folder that has the images, and no masks of the same names."""
    if os.path.isdir(os.path.join(folder, _ANNOTATIONS)):
        for name in (_IMAGES, "images"):
            if os.path.isdir(path := os.path.join(folder, name)):
                return path
    return folder


def _image_sets(folder: str) -> dict[str, str]:
    """Name of a split -> the file that lists its images; without those of single classes."""
    for name in _SETS:
        sets = os.path.join(folder, "ImageSets", name)
        if os.path.isdir(sets):
            stems = sorted(n[:-4] for n in os.listdir(sets) if n.lower().endswith(".txt"))
            # aeroplane_train.txt lists the images again, with 1 or -1 behind them.
            whole = [s for s in stems if "_" not in s or s.rpartition("_")[2] not in _SPLITS]
            if stems:
                return {stem: os.path.join(sets, f"{stem}.txt") for stem in whole or stems}
    return {}


def _listed(path: str, xmls: dict[str, str]) -> list[str]:
    """The names in a list of images, without suffixes and the numbers of lists of one class."""
    names = []
    for line in read_text(path).splitlines():
        if not (name := line.strip()):
            continue
        if os.path.join(_ANNOTATIONS, name) not in xmls:
            head, _, tail = name.rpartition(" ")
            name = head.strip() if head and tail in ("-1", "0", "1") else name
            name = os.path.splitext(name)[0] if is_image_file(name) else name
        names.append(name)
    return list(dict.fromkeys(names))


def _add(
    folder: str,
    annotations: dict[str, _Annotation],
    images: dict[str, str],
    files: set[str],
    collector: Collector,
) -> None:
    """Add the images of a split and their objects."""
    root = collector.content.image_root
    paths = {name: _image_of(name, a, images, files) for name, a in annotations.items()}
    unsized = [name for name, annotation in annotations.items() if annotation.size is None]
    unsized_paths = [os.path.join(folder, paths[name]) for name in unsized]
    sizes = dict(zip(unsized, image_sizes(unsized_paths), strict=True))
    collector.uses(*unsized_paths)
    for name, annotation in annotations.items():
        height, width = annotation.size or sizes[name]
        file_name = os.path.relpath(os.path.join(folder, paths[name]), root)
        image_id = collector.image(file_name, height, width, annotation.path)
        masks = _read_masks(folder, name, annotation, (height, width), files, collector)
        for index, item in enumerate(annotation.objects):
            collector.add(
                image_id,
                item.name,
                item.source,
                box=item.box,
                mask=masks.get(index),
                crowd=item.difficult,
            )


def _image_of(name: str, annotation: _Annotation, images: dict[str, str], files: set[str]) -> str:
    """The path of an image below the folder of the dataset, whether or not it exists."""
    folder, stem = os.path.split(name)
    below = os.path.relpath(name, _ANNOTATIONS)
    folders = [os.path.join(_IMAGES, os.path.dirname(below)), "images", folder]
    if folder.split(os.sep)[0] != _ANNOTATIONS:
        folders = [folder, os.path.join(os.path.dirname(folder), "images")]
    file_name = os.path.basename(annotation.file_name.replace("\\", "/"))
    candidates = [os.path.join(f, file_name) for f in folders if file_name]
    candidates += [images.get(os.path.join(f, stem), "") for f in folders]
    found = next((c for c in map(os.path.normpath, candidates) if c in files), None)
    return found or os.path.normpath(os.path.join(folders[0], file_name or f"{stem}.jpg"))


# XML files


def _read_xml(path: str, collector: Collector) -> _Annotation:
    file_name, size = "", None
    objects: list[_Object] = []
    for element in children_of_root(path, "annotation"):
        if element.tag == "filename":
            file_name = element.text.strip()
        elif element.tag == "size":
            sides = [_number(element, side, path) for side in ("height", "width")]
            if all(side is not None and side >= 1 for side in sides):
                size = round(sides[0]), round(sides[1])  # type: ignore[arg-type]
        elif element.tag == "object":
            number = len(objects) + 1
            source = f"{path}, line {element.line}: object {number}"
            name = collector.see_class(element.text_of("name"), source)
            box = element.find("bndbox")
            if box is None:
                raise ValueError(f"{source} ({name}) has no <bndbox>: add it or remove the object")
            corners = [_number(box, side, path) for side in ("xmin", "ymin", "xmax", "ymax")]
            if None in corners:
                raise ValueError(
                    f"{source} ({name}) lacks a side of its <bndbox>: give xmin, ymin, xmax, ymax"
                )
            x0, y0, x1, y1 = corners
            if x1 < x0 or y1 < y0:  # type: ignore[operator]
                raise ValueError(
                    f"{source} ({name}) has the box {shorten(corners)}: xmax and ymax must not be "
                    "less than xmin and ymin"
                )
            box_ = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]  # type: ignore[operator]
            difficult = element.text_of("difficult") in ("1", "true", "True")
            objects.append(_Object(name, box_, difficult, source))
    return _Annotation(path, file_name, size, objects)


def _number(element: Element, tag: str, path: str) -> float | None:
    """A finite number in a child of an element; None if there is none."""
    child = element.find(tag)
    if child is None or not child.text.strip():
        return None
    try:
        value = float(child.text)
    except ValueError:
        value = float("nan")
    if not abs(value) < 1e9:
        raise ValueError(
            f"{path}, line {child.line}: <{tag}> is {shorten(child.text.strip())}: write a number"
        )
    return value


# Masks


def _read_masks(
    folder: str,
    name: str,
    annotation: _Annotation,
    size: tuple[int, int],
    files: set[str],
    collector: Collector,
) -> dict[int, dict]:
    """The masks of the objects of an image, by the index of the object."""
    below = os.path.relpath(name, _ANNOTATIONS)
    relative = os.path.join(_MASKS, f"{below}.png")
    if relative not in files or not annotation.objects:
        return {}
    path = os.path.join(folder, relative)
    collector.uses(path)
    numbers = _numbers(path)
    if numbers.shape != size:
        height, width = numbers.shape
        raise ValueError(
            f"{path}: the masks have {width}x{height} pixels, but the image of {name} has "
            f"{size[1]}x{size[0]}: write them again"
        )
    found = [int(n) for n in np.unique(numbers) if n not in (0, _VOID)]
    masks = {number: numbers == number for number in found}
    boxes = {number: _mask_box(mask) for number, mask in masks.items()}
    objects = annotation.objects
    numbered = {n: n - 1 for n in found if n <= len(objects)}
    fits = all(_iou(boxes[n], objects[index].box) > _MIN_IOU for n, index in numbered.items())
    if len(numbered) < len(found) or not fits:  # numbered by another rule
        numbered = _match(boxes, [item.box for item in objects])
    if unmatched := len(found) - len(numbered):
        collector.count("masks that belong to no box, left out", path, unmatched)
    return {index: encode(masks[n]) for n, index in numbered.items()}


def _numbers(path: str) -> np.ndarray:
    """The number of the object at each pixel, (H, W); of VOC's colors, their index."""
    with naming_errors(path), Image.open(path) as image:
        if image.mode in ("P", "L", "1", "I", "I;16"):
            return np.asarray(image).astype(np.int64)
        if image.mode == "LA":
            return np.asarray(image)[..., 0].astype(np.int64)
        pixels = np.asarray(image.convert("RGB")).astype(np.int64)
    index = np.zeros(pixels.shape[:2], np.int64)
    # The bits of an index are spread over the channels, the lowest three over their highest bits.
    for bit in range(_COLOR_BITS):
        for channel in range(3):
            index |= ((pixels[..., channel] >> (_COLOR_BITS - 1 - bit)) & 1) << (3 * bit + channel)
    return index


def _mask_box(mask: np.ndarray) -> list[float]:
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(xs[0]), int(ys[0])
    return [x, y, int(xs[-1]) + 1 - x, int(ys[-1]) + 1 - y]


def _iou(a: list[float], b: list[float]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    return overlap / (a[2] * a[3] + b[2] * b[3] - overlap)


def _match(masks: dict[int, list[float]], boxes: list[list[float]]) -> dict[int, int]:
    """Number of a mask -> index of a box, each at most once, the largest overlaps first."""
    pairs = [(_iou(mask, box), n, i) for n, mask in masks.items() for i, box in enumerate(boxes)]
    matched: dict[int, int] = {}
    for iou, number, index in sorted(pairs, key=lambda pair: -pair[0]):
        if iou < _MIN_IOU_UNNUMBERED:
            break
        if number not in matched and index not in matched.values():
            matched[number] = index
    return matched
