"""Ultralytics' YOLO layout: ``data.yaml``, images, and a text file of rows for each image.

The label file of ``images/a/b.jpg`` is ``labels/a/b.txt``. A row is ``class cx cy w h``, a box, or
``class x1 y1 x2 y2 x3 y3 ...``, a polygon; coordinates are fractions of the image's width and
height. Both may be mixed. An image without a label file has no objects.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import yaml

from crossmae_det.detection.formats.content import (
    Collector,
    Content,
    check_classes,
    existing_folder,
    find_files,
    image_sizes,
    read_text,
)
from crossmae_det.detection.formats.spec import Spec, choose_split
from crossmae_det.utils.image_files import is_image_file
from crossmae_det.utils.messages import list_names, shorten

_YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_SPLIT_KEYS = ("train", "val", "valid", "validation", "test")
_CLASSES = "classes.txt"  # instead of a yaml, as Label Studio exports it

# A fraction further outside of [0, 1] is an error: most likely it is in pixels.
_LEAST, _MOST = -0.05, 1.05


def splits(spec: Spec) -> list[str]:
    """The splits of a dataset; [] for a folder with ``classes.txt``.

    Raises:
        FileNotFoundError, ValueError: as `read`.
    """
    return list(_Description(spec).splits)


def read(spec: Spec) -> Content:
    """Read one split; the size of each image is read from its header.

    Raises:
        FileNotFoundError: the yaml, an image folder, a list or a listed image does not exist.
        ValueError: a file cannot be read; one line that names the file and the line.
    """
    description = _Description(spec)
    split = choose_split(spec, description.splits)
    collector = Collector(description.folder, description.names, description.path, first_id=0)
    collector.uses(description.path)
    images = sorted(dict.fromkeys(description.images(split, collector)))
    if not images:
        where = list_names(description.splits[split] if split else [description.folder])
        raise ValueError(f"{description.path}: there is no image in {where}: check its paths")
    labels = [_label_file(image) for image in images]
    present = _existing(labels)
    if not present:
        raise FileNotFoundError(
            f"{description.path}: none of the {len(images)} images has a label file: the one of "
            f"{images[0]} would be {labels[0]}"
        )
    sizes = image_sizes(images)
    collector.uses(*images, *sorted({os.path.dirname(path) for path in (*images, *present)}))
    for image, label, (height, width) in zip(images, labels, sizes, strict=True):
        image_id = collector.image(_relative(image, description.folder), height, width, image)
        if label in present:
            collector.uses(label)
            _read_labels(label, image_id, height, width, description, collector)
    return collector.finish()


class _Description:
    """The content of ``data.yaml``.

    Attributes:
        path: the file.
        folder: the folder that its paths are relative to.
        names: the names of the classes, by index.
        splits: name of a split -> its folders and lists.
        keypoints: numbers behind each box, those of keypoints.
    """

    def __init__(self, spec: Spec):
        self.path = _find_yaml(spec)
        self.splits: dict[str, list[str]] = {}
        self.keypoints = 0
        if os.path.basename(self.path) == _CLASSES:
            self.folder = os.path.dirname(self.path)
            self.names = [line.strip() for line in read_text(self.path).splitlines()]
            while self.names and not self.names[-1]:
                self.names.pop()
            self._check_names()
            return
        try:
            data = yaml.safe_load(read_text(self.path))
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.path}: not a yaml file ({reason}): correct it") from error
        if not isinstance(data, Mapping):
            raise ValueError(f"{self.path}: holds no keys: a data.yaml has train, val and names")
        self.names = _class_names(data, self.path)
        self._check_names()
        for key in _SPLIT_KEYS:
            value = data.get(key)
            paths = [value] if isinstance(value, str) else value
            if not paths:
                continue
            if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
                raise ValueError(
                    f"{self.path}: {key} is {shorten(value)}: give a folder, a list of images, or "
                    "several of them"
                )
            self.splits[key] = paths
        if not self.splits:
            raise ValueError(f"{self.path}: has no key train or val: name the folders of images")
        shape = data.get("kpt_shape")
        if isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape):
            self.keypoints = shape[0] * shape[1]
        root = data.get("path")
        if root is not None and not isinstance(root, str):
            raise ValueError(f"{self.path}: path is {shorten(root)}: give a folder")
        self._candidates = _roots(root, os.path.dirname(os.path.abspath(self.path)))
        found = [self._locate(path) for paths in self.splits.values() for path in paths]
        self.folder = next((folder for folder, _ in filter(None, found)), self._candidates[0])

    def images(self, split: str, collector: Collector) -> list[str]:
        """The paths of the images of a split, in the order of its folders and lists."""
        if not split:
            folder = os.path.join(self.folder, "images")
            folder = folder if os.path.isdir(folder) else self.folder
            return _images_in(folder, collector)
        images: list[str] = []
        for path in self.splits[split]:
            found = self._locate(path)
            if found is None:
                tried = ", ".join(dict.fromkeys(os.path.join(r, path) for r in self._candidates))
                raise FileNotFoundError(
                    f"{self.path}: {split} is {path}, which does not exist (tried {tried}): "
                    "correct it or the key path"
                )
            root, path = found
            if os.path.isdir(path):
                images += _images_in(path, collector)
            elif is_image_file(path):
                images.append(path)
            else:
                collector.uses(path)
                images += self._listed(path, root)
        return images

    def _listed(self, path: str, root: str) -> list[str]:
        images = []
        folders = (os.path.dirname(path), root, os.curdir)
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            if not (name := os.path.expanduser(line.strip())):
                continue
            name = name.replace("\\", os.sep)
            found = [p for p in (os.path.join(f, name) for f in folders) if os.path.isfile(p)]
            if not found:
                raise FileNotFoundError(
                    f"{path}, line {number}: the image {line.strip()} does not exist: correct or "
                    "remove the line"
                )
            images.append(os.path.normpath(found[0]))
        return images

    def _locate(self, path: str) -> tuple[str, str] | None:
        """(root, path) of a folder or list; Roboflow writes ``../train`` for ``train``."""
        path = os.path.expanduser(path).replace("\\", os.sep)
        names = [path] + [path[3:]] * path.startswith(f"..{os.sep}")
        for root in self._candidates:
            for name in names:
                if os.path.exists(found := os.path.normpath(os.path.join(root, name))):
                    return root, found
        return None

    def _check_names(self) -> None:
        if not self.names or not all(self.names):
            raise ValueError(f"{self.path}: names no classes: list them under names")
        check_classes(self.names, self.path)


def _find_yaml(spec: Spec) -> str:
    """The file that describes a dataset; ``spec.path`` may be the folder that has it."""
    path = spec.path
    if os.path.isfile(path):
        return path
    if path.lower().endswith((".yaml", ".yml")):
        raise FileNotFoundError(f"{path}: no such file: check the dataset {spec.text!r}")
    names = os.listdir(existing_folder(path, spec.text))
    found = [name for name in (*_YAML_NAMES, _CLASSES) if name in names]
    found += sorted(n for n in names if n.lower().endswith((".yaml", ".yml")) and n not in found)
    if not found:
        raise FileNotFoundError(f"{path}: there is no data.yaml in this folder: name the file")
    return os.path.join(path, found[0])


def _class_names(data: Mapping[str, Any], path: str) -> list[str]:
    names, number = data.get("names"), data.get("nc")
    if isinstance(names, Mapping):
        names = {int(k) if str(k).isdecimal() else k: name for k, name in names.items()}
        if names.keys() != set(range(len(names))):
            raise ValueError(
                f"{path}: the keys of names are {list_names(names)}: number the classes from 0"
            )
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path}: has no list of classes: add names, as in names: [cat, dog]")
    if number is not None and number != len(names):
        raise ValueError(
            f"{path}: nc is {shorten(number)}, but names has {len(names)} classes: correct one of"
            " them"
        )
    return [str(name).strip() if name is not None else "" for name in names]


def _roots(root: str | None, folder: str) -> list[str]:
    """The folders that paths of a yaml may be relative to, the most likely first."""
    if root is None:
        return [folder]
    root = os.path.expanduser(root).replace("\\", os.sep)
    datasets = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    roots = [os.path.join(base, root) for base in (folder, os.getcwd(), datasets)]
    return list(dict.fromkeys([*map(os.path.normpath, roots), folder]))


def _images_in(folder: str, collector: Collector) -> list[str]:
    names = find_files(folder, collector)
    return [os.path.join(folder, name) for name in names if is_image_file(name)]


def _relative(path: str, folder: str) -> str:
    """A path relative to a folder if it is below it, else absolute."""
    relative = os.path.relpath(path, folder)
    return os.path.abspath(path) if relative.startswith(os.pardir) else relative


def _label_file(image: str) -> str:
    """The last folder named ``images`` becomes ``labels``; without one, the file is beside."""
    folder, name = os.path.split(os.path.abspath(image))
    parts = folder.split(os.sep)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return os.path.join(os.sep.join(parts), f"{os.path.splitext(name)[0]}.txt")


def _existing(paths: list[str]) -> set[str]:
    """Those that exist; each folder is listed once."""
    listings: dict[str, set[str]] = {}
    found = set()
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listings:
            listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name in listings[folder]:
            found.add(path)
    return found


def _read_labels(
    path: str, image_id: str, height: int, width: int, data: _Description, collector: Collector
) -> None:
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not (words := line.split()):
            continue
        source = f"{path}, line {number}"
        try:
            index, *values = map(float, words)
        except ValueError as error:
            raise ValueError(
                f"{source}: {shorten(line.strip())} is not a row of numbers: correct or remove it"
            ) from error
        if not index.is_integer():  # NaN and infinity are not
            raise ValueError(f"{source}: the class is {words[0]}: write its index, from 0")
        if not 0 <= index < len(data.names):
            raise ValueError(
                f"{source}: the class is {words[0]}, but {data.path} has {len(data.names)} classes,"
                f" 0 to {len(data.names) - 1}: correct the row or add the class"
            )
        if data.keypoints and len(values) == 4 + data.keypoints:
            values = values[:4]
            collector.count("objects with keypoints, of which the box is read", source)
        # NaN may pass min and max, but not a sum.
        within = values and min(values) >= _LEAST and max(values) <= _MOST
        if values and not (within and math.isfinite(sum(values))):
            bad = next(value for value in values if not _LEAST <= value <= _MOST)
            raise ValueError(
                f"{source}: the coordinate {bad:g} is not in [0, 1]: write fractions of the width "
                "and the height of the image"
            )
        name = data.names[int(index)]
        if len(values) == 4:
            cx, cy, w, h = values
            box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
            collector.add(image_id, name, source, box=box)
        elif len(values) >= 6 and len(values) % 2 == 0:
            xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
            polygon = [0.0] * len(values)
            polygon[::2], polygon[1::2] = xs, ys
            x, y = min(xs), min(ys)
            box = [x, y, max(xs) - x, max(ys) - y]
            collector.add(image_id, name, source, box=box, mask=[polygon])
        else:
            raise ValueError(
                f"{source}: has {len(words)} numbers: write class cx cy w h, or class and at least "
                "three points x y of a polygon"
            )
