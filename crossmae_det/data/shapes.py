"""The built-in data set: textured shapes with exact masks, generated once, in COCO format.

One variant is one folder, whose name holds the version of the generator and every parameter, so
that variants lie side by side. A folder that is there is complete:

    ROOT/shapes_v1_128px_4000_150_seed0/
        train/000001.jpg ...              also a plain image folder, for pretraining
        val/000001.jpg ...
        annotations/instances_train.json
        annotations/instances_val.json
        shapes.json                       the parameters

An image holds one to six shapes of six classes on a textured ground; ``scenes.py`` draws it. A mask
is what is to be seen of its shape, and every shape that is drawn has its annotation.
"""

import json
import logging
import os
import shutil
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock
from PIL import Image
from pycocotools import mask as mask_util

from crossmae_det.data.scenes import CLASSES, SPLITS, render

logger = logging.getLogger(__name__)

# Part of the folder's name: raise it with every change to what is drawn or written.
_VERSION = 1
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class _Variant:
    """The parameters of :func:`build`, checked."""

    num_train: int = 4000
    num_val: int = 150
    image_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_train", 1), ("num_val", 1), ("image_size", 32), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"shapes: {name} must be a whole number >= {least}, not {value!r}")

    @property
    def folder_name(self) -> str:
        return (
            f"shapes_v{_VERSION}_{self.image_size}px_{self.num_train}_{self.num_val}"
            f"_seed{self.seed}"
        )

    @property
    def description(self) -> dict[str, Any]:
        return {"generator": "crossmae_det.data.shapes", "version": _VERSION, **asdict(self)}


def folder(root: str | os.PathLike[str] | None = None, **parameters: int) -> Path:
    """The folder of one variant, whether it has been built or not.

    Args:
        root: data folder; None for the environment's ``DETECTRON2_DATASETS``, or else ``datasets``.
        parameters: as in :func:`build`.

    Raises:
        ValueError: for a parameter out of range.
    """
    return _data_folder(root) / _variant(parameters).folder_name


def build(
    root: str | os.PathLike[str] | None = None,
    *,
    num_train: int = 4000,
    num_val: int = 150,
    image_size: int = 128,
    seed: int = 0,
) -> Path:
    """Write the data set, unless it is there already.

    It is written to a hidden folder beside its own and renamed, so that a build that is killed or
    fails leaves nothing under its name. Processes that build the same variant at once wait for the
    first. The same versions of NumPy, OpenCV and Pillow write the same bytes.

    Args:
        root: data folder, made if missing; None as in :func:`folder`.
        num_train: training images, at least 1.
        num_val: held-out images, at least 1.
        image_size: side of the square images in pixels, at least 32.
        seed: at least 0. An image depends only on the seed, its split, its number and its size.

    Returns:
        The folder of this variant.

    Raises:
        ValueError: for a parameter out of range.
        OSError: when ``root`` cannot be written, or something else lies where the variant should.
    """
    variant = _Variant(num_train, num_val, image_size, seed)
    target = _data_folder(root) / variant.folder_name
    if _is_built(target, variant):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(target.with_name("." + target.name))):
            if not target.exists():  # another process may have built it meanwhile
                _build(target, variant)
    except OSError as error:
        raise OSError(
            f"{target}: cannot write the built-in data set here ({error.strerror or error}); "
            "choose a data folder that can be written (environment variable DETECTRON2_DATASETS)"
        ) from error
    return target


def register(root: str | os.PathLike[str] | None = None, **parameters: int) -> tuple[str, str]:
    """Register ``shapes_train`` and ``shapes_val`` in detectron2, to be built when first asked for.

    The metadata is there at once; images and annotations are there after ``DatasetCatalog.get``.
    Masks are run-length encoded. A later call with other arguments replaces an earlier one.

    Args:
        root: data folder; None as in :func:`folder`, read now.
        parameters: as in :func:`build`.

    Returns:
        The two names.

    Raises:
        ValueError: for a parameter out of range, or when one of the names is taken by other data.
    """
    data_folder = _data_folder(root)
    variant = _variant(parameters)
    target = data_folder / variant.folder_name
    names = ("shapes_train", "shapes_val")
    for name in names:
        if name in DatasetCatalog and getattr(DatasetCatalog[name], "func", None) is not _load:
            raise ValueError(
                f"{name}: a data set of this name is registered already; give it another name"
            )
    for name, split in zip(names, SPLITS, strict=True):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            # The metadata of a name cannot be changed, only dropped.
            MetadataCatalog.remove(name)
        DatasetCatalog.register(name, partial(_load, name, split, data_folder, variant))
        MetadataCatalog.get(name).set(
            json_file=str(_annotation_file(target, split)),
            image_root=str(target / split),
            evaluator_type="coco",
            thing_classes=list(CLASSES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
        )
    return names


def _data_folder(root: str | os.PathLike[str] | None) -> Path:
    if root is None:
        root = os.getenv("DETECTRON2_DATASETS", "datasets")
    return Path(root).expanduser()


def _variant(parameters: dict[str, int]) -> _Variant:
    unknown = parameters.keys() - asdict(_Variant()).keys()
    if unknown:
        raise ValueError(
            f"shapes: no parameter {', '.join(sorted(unknown))}; "
            f"there are {', '.join(asdict(_Variant()))}"
        )
    return _Variant(**parameters)


def _annotation_file(target: Path, split: str) -> Path:
    return target / "annotations" / f"instances_{split}.json"


def _is_built(target: Path, variant: _Variant) -> bool:
    """Whether the variant is there.

    Raises:
        FileExistsError: when something else is there.
    """
    if not target.exists():
        return False
    parameters = target / "shapes.json"
    try:
        found = json.loads(parameters.read_text()) if parameters.is_file() else None
    except ValueError:
        found = None
    if found != variant.description:
        raise FileExistsError(
            f"{target}: not the built-in data set of this name; move it away, and it is built again"
        )
    return True


def _build(target: Path, variant: _Variant) -> None:
    """Write to a folder beside ``target``, then rename it. The caller holds the lock."""
    partial_folder = target.with_name(f".{target.name}.partial")
    if partial_folder.exists():  # left by a build that was killed
        shutil.rmtree(partial_folder)
    total = variant.num_train + variant.num_val
    logger.info("Building the shapes data set of %d images at %s", total, target)
    start = time.perf_counter()
    try:
        (partial_folder / "annotations").mkdir(parents=True)
        for split, count in zip(SPLITS, (variant.num_train, variant.num_val), strict=True):
            content = _write_split(partial_folder / split, split, count, variant)
            _annotation_file(partial_folder, split).write_text(json.dumps(content))
        (partial_folder / "shapes.json").write_text(json.dumps(variant.description, indent=2))
        partial_folder.rename(target)
    except BaseException:
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise
    logger.info("Built %d images in %.1f s", total, time.perf_counter() - start)


def _write_split(images: Path, split: str, count: int, variant: _Variant) -> dict[str, Any]:
    """Write the images of one split and return their annotations in COCO format."""
    images.mkdir()
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        scene = render(split, number, image_size=variant.image_size, seed=variant.seed)
        name = f"{number:06d}.jpg"
        # Full colour resolution: halved, it would blur the edges that the masks are exact about.
        Image.fromarray(scene.image).save(images / name, quality=_JPEG_QUALITY, subsampling=0)
        size = variant.image_size
        records.append({"id": number, "file_name": name, "height": size, "width": size})
        for k, category in enumerate(scene.categories, start=1):
            mask = (scene.owners == k).astype(np.uint8)
            encoded = mask_util.encode(np.asfortranarray(mask))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category + 1,
                    "bbox": [int(value) for value in cv2.boundingRect(mask)],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {
                        "size": encoded["size"],
                        "counts": encoded["counts"].decode("ascii"),
                    },
                }
            )
    return {
        "info": {"description": f"crossmae_det shapes, {split}", **variant.description},
        "images": records,
        "categories": [
            {"id": i + 1, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASSES)
        ],
        "annotations": annotations,
    }


def _load(name: str, split: str, data_folder: Path, variant: _Variant) -> list[dict[str, Any]]:
    """Build if need be, and read in detectron2's format."""
    target = build(data_folder, **asdict(variant))
    return load_coco_json(str(_annotation_file(target, split)), str(target / split), name)
