"""The built-in dataset: textured shapes with exact masks, generated on first use, in COCO format.

Each variant has its own folder, named by the version of the generator and every parameter. A folder
that exists is complete:

    ROOT/shapes_v2_128px_4000_150_seed0/
        train/000001.jpg ...              also a plain image folder, for pretraining
        val/000001.jpg ...
        annotations/instances_train.json, instances_val.json
        shapes.json                       the parameters

An image holds one to three shapes of six classes on a textured ground. Classes differ only in their
outline: size, tilt, color and texture are drawn from the same distributions. Later shapes hide
earlier ones; a shape that would make itself or another one hard to recognize is not drawn. A mask
is the visible part of its shape, and every shape has an annotation.

Legend: H x W pixels of an image or of a window in it. Pixel i extends from i to i + 1. Windows are
(x0, y0, x1, y1), the ends excluded.
"""

import colorsys
import json
import logging
import math
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as mask_util

logger = logging.getLogger(__name__)

Array = NDArray[Any]
Outline = list[Array]  # closed polygons of x, y; further ones are holes in the first
Window = tuple[int, int, int, int]

CLASSES = ("ellipse", "rectangle", "triangle", "star", "ring", "cross")
SPLITS = ("train", "val")

_DEFAULTS = {"num_train": 4000, "num_val": 150, "image_size": 128, "seed": 0}
_LEAST = {"num_train": 1, "num_val": 1, "image_size": 32, "seed": 0}

# Part of the folder's name: increment it with every change to what is drawn or written.
_VERSION = 2
_JPEG_QUALITY = 95
_MAX_OBJECTS = 3
_ATTEMPTS = 20
_SUPERSAMPLING = 4

# Side of the square of the same area as a shape, as a fraction of the image's side.
_SIDE = (0.3, 0.55)

# Largest tilt of a shape to either side, in degrees.
_TILT = 20

# Contrast of the textures: 1 is the full difference of two colors.
_GROUND_CONTRAST = 0.3
_SHAPE_CONTRAST = 0.5

# At least this fraction of a shape, and of the hole of a ring, stays visible, and at least this
# many pixels of a shape. With less, a ring looks like an ellipse, or a cross like a star.
_MIN_VISIBLE = 0.75
_MIN_PIXELS = 20


# The dataset


def folder(root: str | os.PathLike[str] | None = None, **parameters: int) -> Path:
    """The folder of a variant, whether or not it has been built.

    Args:
        root: data folder; None for the environment's ``DETECTRON2_DATASETS``, or else ``datasets``.
        parameters: as in :func:`build`.

    Raises:
        ValueError: a parameter is unknown or out of range.
    """
    if root is None:
        root = os.getenv("DETECTRON2_DATASETS", "datasets")
    p = _describe(parameters)
    name = f"shapes_v{_VERSION}_{p['image_size']}px_{p['num_train']}_{p['num_val']}_seed{p['seed']}"
    return Path(root).expanduser() / name


def build(root: str | os.PathLike[str] | None = None, **parameters: int) -> Path:
    """Write the dataset, unless it exists already.

    It is written to a hidden folder beside its own and renamed, so that a build that is killed or
    fails leaves nothing under the final name. Processes that build the same variant wait for the
    first. The same versions of NumPy, OpenCV and Pillow write the same bytes.

    Args:
        root: data folder, created if missing; None as in :func:`folder`.
        num_train: training images, at least 1; default 4000.
        num_val: validation images, at least 1; default 150.
        image_size: side of the square images in pixels, at least 32; default 128.
        seed: at least 0; default 0. An image depends only on the seed, its split, its number and
            its size.

    Returns:
        The folder of this variant.

    Raises:
        ValueError: a parameter is unknown or out of range.
        OSError: ``root`` cannot be written, or the folder of the variant has other content.
    """
    target, description = folder(root, **parameters), _describe(parameters)
    if target.exists():
        if not _is_built(target, description):
            raise FileExistsError(
                f"{target}: exists, but is not the built-in dataset: move it away to build that"
            )
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(target.with_name("." + target.name))):
            if not target.exists():  # another process may have built it meanwhile
                _build(target, description)
    except OSError as error:
        raise OSError(
            f"{target}: cannot write the built-in dataset ({error.strerror or error}): set "
            "DETECTRON2_DATASETS to a writable data folder"
        ) from error
    return target


def register(root: str | os.PathLike[str] | None = None, **parameters: int) -> tuple[str, str]:
    """Register ``shapes_train`` and ``shapes_val`` in detectron2, to be built on first use.

    The metadata are complete at once; ``DatasetCatalog.get`` writes images and annotations. Masks
    are run-length encoded. A later call with other arguments replaces an earlier one.

    Args:
        root: data folder; None as in :func:`folder`, read now.
        parameters: as in :func:`build`.

    Returns:
        The two names.

    Raises:
        ValueError: a parameter is unknown or out of range, or one of the names is taken by another
            dataset.
    """
    target = folder(root, **parameters)
    names = ("shapes_train", "shapes_val")
    for name in names:
        if name in DatasetCatalog and getattr(DatasetCatalog[name], "func", None) is not _load:
            raise ValueError(
                f"{name}: another dataset is registered under this name: rename that one"
            )
    for name, split in zip(names, SPLITS, strict=True):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)  # metadata cannot be modified, only replaced
        DatasetCatalog.register(name, partial(_load, name, split, target.parent, parameters))
        MetadataCatalog.get(name).set(
            json_file=str(_annotation_file(target, split)),
            image_root=str(target / split),
            evaluator_type="coco",
            thing_classes=list(CLASSES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
        )
    return names


def _load(name: str, split: str, root: Path, parameters: dict[str, int]) -> list[dict[str, Any]]:
    """Build the dataset unless it exists, and read it in detectron2's format."""
    target = build(root, **parameters)
    return load_coco_json(str(_annotation_file(target, split)), str(target / split), name)


def _annotation_file(target: Path, split: str) -> Path:
    return target / "annotations" / f"instances_{split}.json"


def _describe(parameters: dict[str, int]) -> dict[str, Any]:
    """The content of ``shapes.json``: all parameters, checked, with their defaults."""
    if unknown := parameters.keys() - _DEFAULTS:
        raise ValueError(f"shapes: unknown parameter {unknown}: choose from {', '.join(_DEFAULTS)}")
    complete = _DEFAULTS | parameters
    for name, value in complete.items():
        if not isinstance(value, int) or value < _LEAST[name]:
            raise ValueError(f"shapes: {name} must be an integer >= {_LEAST[name]}, not {value!r}")
    return {"generator": "crossmae_det.detection.shapes", "version": _VERSION, **complete}


def _is_built(target: Path, description: dict[str, Any]) -> bool:
    """Whether a folder holds this variant; this module had another name in earlier versions."""
    try:
        found = json.loads((target / "shapes.json").read_text())
    except (OSError, ValueError):
        return False
    same_name = {"generator": None}
    return isinstance(found, dict) and found | same_name == description | same_name


def _build(target: Path, description: dict[str, Any]) -> None:
    """Write to a folder beside ``target``, then rename it. The caller holds the lock."""
    partial_folder = target.with_name(f".{target.name}.partial")
    if partial_folder.exists():  # left by a build that was killed
        shutil.rmtree(partial_folder)
    logger.info("Building the shapes dataset in %s", target)
    try:
        (partial_folder / "annotations").mkdir(parents=True)
        for split in SPLITS:
            content = _write_split(partial_folder / split, split, description)
            _annotation_file(partial_folder, split).write_text(json.dumps(content))
        (partial_folder / "shapes.json").write_text(json.dumps(description, indent=2))
        partial_folder.rename(target)
    except BaseException:
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise


def _write_split(images: Path, split: str, description: dict[str, Any]) -> dict[str, Any]:
    """Write the images of one split and return their annotations in COCO format."""
    images.mkdir()
    size, seed = description["image_size"], description["seed"]
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, description[f"num_{split}"] + 1):
        scene = render(split, number, image_size=size, seed=seed)
        name = f"{number:06d}.jpg"
        # Full color resolution: subsampling would blur the edges that the masks follow.
        Image.fromarray(scene.image).save(images / name, quality=_JPEG_QUALITY, subsampling=0)
        records.append({"id": number, "file_name": name, "height": size, "width": size})
        for k, category in enumerate(scene.categories, start=1):
            mask = (scene.owners == k).astype(np.uint8)
            run_lengths = mask_util.encode(np.asfortranarray(mask))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category + 1,
                    "bbox": [int(value) for value in cv2.boundingRect(mask)],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {**run_lengths, "counts": run_lengths["counts"].decode()},
                }
            )
    return {
        "info": {"description": f"crossmae_det shapes, {split}", **description},
        "images": records,
        "categories": [
            {"id": i, "name": name, "supercategory": "shape"}
            for i, name in enumerate(CLASSES, start=1)
        ],
        "annotations": annotations,
    }


# The images


@dataclass(frozen=True)
class Scene:
    """One image and its objects.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        owners: (H, W) uint8: 0 where the ground is visible, k where object k is, counted from 1.
        categories: for object k, at k - 1, its index into ``CLASSES``.
    """

    image: Array
    owners: Array
    categories: tuple[int, ...]


def render(split: str, number: int, *, image_size: int = 128, seed: int = 0) -> Scene:
    """Draw one image of the dataset.

    Args:
        split: ``"train"`` or ``"val"``.
        number: the image's number, from 1.
        image_size: H = W in pixels.
        seed: that of the dataset.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, SPLITS.index(split), number]))
    ground_colors = _color_pair(rng, saturation=(0.05, 0.5), value=(0.25, 0.9))
    texture = _texture(rng, (0, 0, image_size, image_size), image_size)
    canvas = _paint(_GROUND_CONTRAST * texture, *ground_colors)
    ground = canvas.mean(axis=(0, 1))
    shadow_angle = rng.uniform(0, 2 * math.pi)

    owners = np.zeros((image_size, image_size), np.uint8)
    categories: list[int] = []
    # What must stay visible: the pixels of every body and hole, and how many of them at least.
    parts: list[tuple[Array, float]] = []
    count = rng.integers(1, _MAX_OBJECTS + 1)
    attempts = 0
    while len(categories) < count and (attempts < _ATTEMPTS or not categories):
        attempts += 1
        category = int(rng.integers(len(CLASSES)))
        side = image_size * math.exp(rng.uniform(*np.log(_SIDE)))
        outline = _place(rng, _outline(CLASSES[category], rng), side, image_size)
        window = _window(outline, side, image_size)
        x0, y0, x1, y1 = window
        alpha = _coverage(outline, window)
        body = np.zeros(owners.shape, bool)
        body[y0:y1, x0:x1] = alpha >= 0.5
        left = [(part & ~body, least) for part, least in parts]
        left.append((body, max(_MIN_PIXELS, _MIN_VISIBLE * side * side)))
        for inner in outline[1:]:
            hole = np.zeros(owners.shape, bool)
            hole[y0:y1, x0:x1] = _coverage([inner], window) >= 0.5
            left.append((hole, _MIN_VISIBLE * _area(inner)))
        if any(np.count_nonzero(part) < least for part, least in left):
            continue
        parts = left
        categories.append(category)
        owners[body] = len(categories)

        view = canvas[y0:y1, x0:x1]
        view *= 1 - 0.45 * _shadow(alpha, shadow_angle, side)[..., None]
        colors = _color_pair(rng, saturation=(0.2, 0.95), value=(0.35, 1.0), away_from=ground)
        paint = _paint(_SHAPE_CONTRAST * _texture(rng, window, image_size), *colors)
        view += alpha[..., None] * (paint - view)

    return Scene(_expose(rng, canvas), owners, tuple(categories))


def _regular(corners: int) -> Array:
    angles = np.arange(corners) * (2 * math.pi / corners)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _outline(name: str, rng: np.random.Generator) -> Outline:
    """The outline of a class about the origin, in a random variant."""
    if name == "ellipse":
        return [_regular(48) * (1.0, rng.uniform(0.65, 1.0))]
    if name == "rectangle":
        square = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
        return [square * (1.0, rng.uniform(0.6, 1.0))]
    if name == "triangle":
        return [_regular(3) * (1.0, rng.uniform(0.75, 1.25))]
    if name == "star":
        points = _regular(10) * (1.0, rng.uniform(0.85, 1.0))
        points[1::2] *= rng.uniform(0.36, 0.48)
        return [points]
    if name == "ring":
        outer = _regular(48) * (1.0, rng.uniform(0.75, 1.0))
        return [outer, outer * rng.uniform(0.45, 0.65)]
    a = rng.uniform(0.22, 0.36)  # a cross
    arm = np.array([(a, -a), (1.0, -a), (1.0, a)])
    quarter_turn = np.array([(0, 1), (-1, 0)])
    arms = [arm @ np.linalg.matrix_power(quarter_turn, k) for k in range(4)]
    return [np.concatenate(arms) * (1.0, rng.uniform(0.8, 1.0))]


def _area(polygon: Array) -> float:
    return float(cv2.contourArea(polygon.astype(np.float32)))


def _place(rng: np.random.Generator, outline: Outline, side: float, image_size: int) -> Outline:
    """Tilt, scale to an area of side x side (without holes) and move to pixel coordinates."""
    upright = -math.pi / 2  # the first corner of an outline is on the right
    angle = upright + math.radians(rng.uniform(-_TILT, _TILT))
    turn = np.array([(math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))])
    scale = side / math.sqrt(_area(outline[0]) - sum(map(_area, outline[1:])))
    margin = 0.4 * side
    center = rng.uniform(margin, image_size - margin, size=2)
    return [part @ turn * scale + center for part in outline]


def _window(outline: Outline, side: float, image_size: int) -> Window:
    """The part of the image that a shape and its shadow can touch."""
    margin = 0.25 * side + 2
    low = np.floor(outline[0].min(axis=0) - margin).clip(0, image_size - 1).astype(int)
    high = np.ceil(outline[0].max(axis=0) + margin).clip(1, image_size).astype(int)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def _coverage(outline: Outline, window: Window) -> Array:
    """The fraction of each pixel of the window inside the outline: (H, W) float32 in [0, 1]."""
    x0, y0, x1, y1 = window
    fine = np.zeros(((y1 - y0) * _SUPERSAMPLING, (x1 - x0) * _SUPERSAMPLING), np.uint8)
    fraction_bits = 4
    # OpenCV puts the center of pixel i at i.
    points = [
        np.round(((part - (x0, y0)) * _SUPERSAMPLING - 0.5) * 2**fraction_bits).astype(np.int32)
        for part in outline
    ]
    cv2.fillPoly(fine, points, 255, shift=fraction_bits)
    coarse = cv2.resize(fine, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA)
    return coarse.astype(np.float32) / 255


def _shadow(alpha: Array, angle: float, side: float) -> Array:
    """The blurred, shifted coverage: (H, W) float32 in [0, 1]."""
    x, y = 0.07 * side * math.cos(angle), 0.07 * side * math.sin(angle)
    shift = np.array([(1, 0, x), (0, 1, y)])
    moved = cv2.warpAffine(alpha, shift, alpha.shape[::-1])
    return cv2.GaussianBlur(moved, (0, 0), 0.05 * side + 0.5)


def _texture(rng: np.random.Generator, window: Window, image_size: int) -> Array:
    """A pattern for the window: (H, W) float32 in [0, 1], the weight of the second color."""
    x0, y0, x1, y1 = window
    angle = rng.uniform(0, 2 * math.pi)
    x = np.arange(x0, x1, dtype=np.float32)[None, :] / image_size - 0.5
    y = np.arange(y0, y1, dtype=np.float32)[:, None] / image_size - 0.5
    across = x * np.float32(math.cos(angle)) + y * np.float32(math.sin(angle))
    along = y * np.float32(math.cos(angle)) - x * np.float32(math.sin(angle))
    # Cycles per image. Finer ones, or a hard edge, would be lost in small images.
    turns = np.float32(2 * math.pi * rng.uniform(5, 14))
    phase = np.float32(rng.uniform(0, 2 * math.pi))
    kind = rng.choice(("gradient", "stripes", "checks", "dots", "noise"))
    if kind == "gradient":
        low, high = across.min(), across.max()
        return (across - low) / max(high - low, np.float32(1e-6))
    if kind == "noise":
        cells = int(rng.integers(3, 14))
        coarse = rng.random((cells, cells), dtype=np.float32)
        smooth = cv2.resize(coarse, (x1 - x0, y1 - y0), interpolation=cv2.INTER_CUBIC)
        return smooth.clip(0, 1)
    wave = np.sin(across * turns + phase)
    if kind == "checks":
        wave = wave * np.sin(along * turns)
    elif kind == "dots":
        wave = wave + np.sin(along * turns) - np.float32(0.8)
    return (0.5 + np.float32(rng.uniform(0.5, 3)) * wave).clip(0, 1)


def _color_pair(
    rng: np.random.Generator,
    *,
    saturation: tuple[float, float],
    value: tuple[float, float],
    away_from: Array | None = None,
) -> tuple[Array, Array]:
    """Two related RGB colors in [0, 1], whose mean stands out from ``away_from``."""

    def color(hue: float) -> Array:
        hsv = hue % 1, rng.uniform(*saturation), rng.uniform(*value)
        return np.array(colorsys.hsv_to_rgb(*hsv), np.float32)

    for _ in range(20):  # bounded; whatever the ground, a few draws suffice
        hue = rng.random()
        first, second = color(hue), color(hue + rng.uniform(-0.12, 0.12))
        if away_from is None or np.linalg.norm((first + second) / 2 - away_from) > 0.45:
            break
    return first, second


def _paint(texture: Array, first: Array, second: Array) -> Array:
    return first + texture[..., None] * (second - first)


def _expose(rng: np.random.Generator, canvas: Array) -> Array:
    """Add uneven light and sensor noise to colors in [0, 1]: (H, W, 3) uint8."""
    size = canvas.shape[0]
    corners = rng.uniform(0.7, 1.15, size=(2, 2)).astype(np.float32)
    light = cv2.resize(corners, (size, size), interpolation=cv2.INTER_LINEAR)
    noise = rng.standard_normal(canvas.shape, dtype=np.float32)
    exposed = canvas * light[..., None] + np.float32(rng.uniform(0.005, 0.03)) * noise
    return (exposed * 255 + 0.5).clip(0, 255).astype(np.uint8)
