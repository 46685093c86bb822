"""What a reader of a layout collects: a dataset in COCO's format, and where each object is from."""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from crossmae_det.utils.image_files import is_image_file, walk_folders
from crossmae_det.utils.image_reading import UndecodableImageError, image_size
from crossmae_det.utils.messages import list_names, shorten

# Threads that read image headers, and how many each reads at a time. On network storage, the time
# goes into waiting.
_THREADS = 16
_HEADERS = 32

# Files that list the classes of a folder, one a line.
CLASS_FILES = ("labels.txt", "classes.txt", "labelmap.txt")

# Lines of these files that are no classes: labelme's and CVAT's background.
_NO_CLASSES = ("__ignore__", "_background_", "background")


@dataclass
class Content:
    """A dataset in COCO's format.

    Attributes:
        image_root: the folder that the paths of the images are relative to.
        images, annotations: as in a COCO json. The id of an image is its path, so that it can be
            found in the results; annotations are numbered from 1 in their order.
        categories: name -> id. Of inferred classes, the ids follow the order of the names.
        sources: where each annotation is from, in their order: a file and a line or an object.
        files: files and folders of the dataset; it changes only if one of them does.
        notes: what was left out, one line for each kind.
    """

    image_root: str
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    categories: dict[str, int] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_coco(self) -> dict[str, Any]:
        """The content of a COCO json."""
        return {
            "images": self.images,
            "annotations": self.annotations,
            "categories": [{"id": id_, "name": name} for name, id_ in self.categories.items()],
        }

    def as_json(self) -> dict[str, Any]:
        """Every attribute; ``Content(**value)`` reads it."""
        return {name: getattr(self, name) for name in asdict(Content(""))}


class Collector:
    """Builds a `Content`.

    Args:
        image_root: the folder that the paths of the images are relative to.
        classes: the names of the classes in the order of their ids; None infers them from the
            objects.
        class_source: the file that has ``classes``, for messages.
        first_id: id of the first class.
    """

    def __init__(
        self,
        image_root: str,
        classes: Sequence[str] | None = None,
        class_source: str = "",
        first_id: int = 1,
    ):
        self.content = Content(image_root)
        self._ids: dict[str, int] | None = None
        if classes is not None:
            self._ids = {name: index for index, name in enumerate(classes, start=first_id)}
        self._class_source = class_source
        self._found: set[str] = set()
        self._images: dict[str, str] = {}  # id -> source
        self._counts: dict[str, tuple[int, str]] = {}

    def uses(self, *paths: str) -> None:
        """Note files and folders that the dataset depends on."""
        self.content.files.extend(paths)

    def image(self, file_name: str, height: int, width: int, source: str) -> str:
        """Add an image.

        Args:
            file_name: its path relative to the folder of the images.
            height, width: in pixels.
            source: the file that describes it.

        Returns:
            Its id.

        Raises:
            ValueError: the image was added before.
        """
        id_ = file_name.replace(os.sep, "/")
        if (other := self._images.setdefault(id_, source)) is not source:
            raise ValueError(
                f"{source}: describes the image {file_name}, as {other} does: remove one of them"
            )
        self.content.images.append(
            {"id": id_, "file_name": file_name, "height": height, "width": width}
        )
        return id_

    def see_class(self, name: Any, source: str) -> str:
        """Note that a class exists, in this split or in another one.

        Raises:
            ValueError: it is no text, or the classes are listed and this is none of them.
        """
        if not isinstance(name, str) or not name.strip():
            found = "no class"
            if name is not None and not isinstance(name, str):
                found = f"the class {shorten(name)}, which is not text"
            raise ValueError(f"{source} has {found}: give it the name of one")
        name = name.strip()
        if self._ids is not None and name not in self._ids:
            raise ValueError(
                f"{source} has the class {name!r}, which is not among the "
                f"{list_names(self._ids)} of {self._class_source}: correct it or add the class"
            )
        self._found.add(name)
        return name

    def add(
        self,
        image_id: str,
        name: str,
        source: str,
        *,
        box: Sequence[float] | None = None,
        mask: list | dict | None = None,
        crowd: bool = False,
    ) -> None:
        """Add an object.

        Args:
            image_id: from `image`.
            name: its class.
            source: where it is from, for messages: a file and a line or an object.
            box: x, y, width, height in pixels; None computes it from the mask.
            mask: polygons or compressed run lengths.
            crowd: whether it is ignored as COCO ignores crowd regions.

        Raises:
            ValueError: as `see_class`.
        """
        name = self.see_class(name, source)
        annotations = self.content.annotations
        made: dict[str, Any] = {"id": len(annotations) + 1, "image_id": image_id}
        made["category_id"] = name if self._ids is None else self._ids[name]
        made["bbox"] = list(box) if box is not None else box_around(mask or [])
        made["iscrowd"] = int(crowd)
        if mask:
            made["segmentation"] = mask
        annotations.append(made)
        self.content.sources.append(source)

    def count(self, kind: str, source: str, number: int = 1) -> None:
        """Count something that is left out, for the log."""
        before, first = self._counts.get(kind, (0, source))
        self._counts[kind] = before + number, first

    def finish(self) -> Content:
        """The content; inferred classes get their ids.

        Raises:
            ValueError: classes are inferred, and there is no object.
        """
        content = self.content
        if self._ids is None and not self._found:
            raise ValueError(
                f"{content.image_root}: none of the {len(content.images)} images has an object: "
                "annotate some of them"
            )
        if self._ids is None:
            content.categories = {n: i for i, n in enumerate(sorted(self._found), start=1)}
            for annotation in content.annotations:
                annotation["category_id"] = content.categories[annotation["category_id"]]
        else:
            content.categories = dict(self._ids)
        content.notes = [
            f"{kind}: {number} (first: {first})" for kind, (number, first) in self._counts.items()
        ]
        return content


# Geometry


def box_around(mask: list | Mapping[str, Any]) -> list[float]:
    """The box x, y, width, height around polygons or run lengths."""
    if isinstance(mask, Mapping):
        return mask_util.toBbox(mask).tolist()
    xs = [x for polygon in mask for x in polygon[::2]]
    ys = [y for polygon in mask for y in polygon[1::2]]
    if not xs or not ys:
        return [0.0, 0.0, 0.0, 0.0]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def union_box(boxes: Iterable[Sequence[float]]) -> list[float]:
    """The box x, y, width, height around others."""
    corners = [(x, y, x + width, y + height) for x, y, width, height in boxes]
    x0, y0, x1, y1 = zip(*corners, strict=True)
    return [min(x0), min(y0), max(x1) - min(x0), max(y1) - min(y0)]


def ellipse_polygon(
    cx: float, cy: float, rx: float, ry: float, degrees: float = 0.0, points: int = 64
) -> list[float]:
    """An ellipse as a polygon x, y, x, y, ...; ``degrees`` turns it clockwise in the image."""
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    x, y = rx * np.cos(angles), ry * np.sin(angles)
    turn = np.deg2rad(degrees)
    xs = cx + x * np.cos(turn) - y * np.sin(turn)
    ys = cy + x * np.sin(turn) + y * np.cos(turn)
    return np.stack([xs, ys], axis=1).ravel().tolist()


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Compressed run lengths of a mask (H, W), as a COCO json has them."""
    lengths = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(lengths["size"]), "counts": lengths["counts"].decode()}


def merge_masks(masks: Sequence[list | dict], height: int, width: int) -> list | dict:
    """The union of masks of one object: polygons if all are polygons, else run lengths."""
    if all(isinstance(mask, list) for mask in masks):
        return [polygon for mask in masks for polygon in mask]
    parts: list[Any] = []
    for mask in masks:
        parts += [mask] if isinstance(mask, dict) else mask_util.frPyObjects(mask, height, width)
    lengths = mask_util.merge(parts)
    return {"size": list(lengths["size"]), "counts": lengths["counts"].decode()}


# Files


def read_text(path: str) -> str:
    """The content of a text file in UTF-8, with or without byte order mark.

    Raises:
        OSError: it does not exist or cannot be read.
        ValueError: it is not in UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file: check the path") from error
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror}): check the file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8 ({error}): save it again") from error


def read_classes(folder: str) -> tuple[list[str] | None, str]:
    """The classes that a file of a folder lists, see `CLASS_FILES`, and that file.

    Returns:
        None, "" without such a file. Of CVAT's ``labelmap.txt``, the text before the first colon.

    Raises:
        ValueError: the file lists no class, or one twice.
    """
    for name in CLASS_FILES:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        lines = [line.strip() for line in read_text(path).splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
        if name == "labelmap.txt":
            lines = [line.partition(":")[0].strip() for line in lines]
        classes = [line for line in lines if line not in _NO_CLASSES]
        if not classes:
            raise ValueError(f"{path}: lists no class: write one a line or remove the file")
        check_classes(classes, path)
        return classes, path
    return None, ""


def check_classes(classes: Sequence[str], path: str) -> None:
    """Raise a ValueError if a class is listed twice."""
    for index, name in enumerate(classes):
        if name in classes[:index]:
            raise ValueError(f"{path}: lists the class {name!r} twice: rename one of them")


def find_files(folder: str, collector: Collector) -> list[str]:
    """The files in a folder at any depth, as sorted paths relative to it; hidden ones are skipped.

    The folders are noted in ``collector``.
    """
    found = []
    for parent, above, names in walk_folders(folder, hidden=False):
        collector.uses(parent)
        found += [os.path.join(*above, name) for name in names if not name.startswith(".")]
    return found


def by_stem(names: Iterable[str]) -> dict[str, str]:
    """Paths of the images among files, by their path without suffix; of several, the first."""
    images: dict[str, str] = {}
    for name in names:
        if is_image_file(name):
            images.setdefault(os.path.splitext(name)[0], name)
    return images


def image_sizes(paths: Sequence[str]) -> list[tuple[int, int]]:
    """(height, width) of upright images, from their headers, read in parallel.

    Raises:
        UndecodableImageError: an image cannot be read; one line.
    """
    # Reading a header changes the filters of warnings, which threads share: they are restored here.
    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
        chunks = [paths[i : i + _HEADERS] for i in range(0, len(paths), _HEADERS)]
        try:
            return list(chain.from_iterable(pool.map(lambda c: list(map(image_size, c)), chunks)))
        except UndecodableImageError as error:
            pool.shutdown(cancel_futures=True)
            raise UndecodableImageError(
                f"{error}: replace it, or remove it from the dataset", error.file_name
            ) from error


def existing_folder(path: str, text: str) -> str:
    """``path``, which must be a folder; ``text`` is the dataset, for messages."""
    if not os.path.isdir(path):
        found = "not a folder" if os.path.exists(path) else "no such folder"
        raise FileNotFoundError(f"{path}: {found}: check the dataset {text!r}")
    return path
