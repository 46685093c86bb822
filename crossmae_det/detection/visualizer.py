"""Colors of classes, and of the objects of one class.

Drawing predictions and ground truth, alone or side by side.

A color belongs to a class: what has one hue on the ground truth has the same hue on the
predictions. The objects of one class in an image are shades of it, so that they can be told apart.
"""

from __future__ import annotations

import colorsys
import itertools
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.data import Metadata, MetadataCatalog
from detectron2.structures import BoxMode, Instances
from detectron2.utils.events import EventStorage
from detectron2.utils.visualizer import GenericMask, VisImage, Visualizer
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from torch import nn
from torch.utils.data import DataLoader

from crossmae_det.detection.coco import get_dataset_dicts
from crossmae_det.utils.files import write_image
from crossmae_det.utils.image_reading import read_image

logger = logging.getLogger(__name__)


class PredictionVisualizer:
    """Draw predictions beside the ground truth as ``predictions.png`` after the last iteration.

    :class:`crossmae_det.engine.hooks.Visualization` calls it.

    Args:
        output_dir: the run's folder.
        data_loader: detectron2's test loader.
        dataset_name: the registered name of its dataset, or ``JSON:IMAGE_FOLDER``.
        count: number of images: the first ones with annotations.
        score_threshold: predictions below it are not drawn; in [0, 1].
        categories: id -> name in the order of the model's classes; None: those of the dataset.
    """

    period = 0  # after the last iteration only

    def __init__(
        self,
        output_dir: str,
        data_loader: DataLoader,
        dataset_name: str,
        count: int,
        score_threshold: float,
        categories: Mapping[int, str] | None = None,
    ):
        self.path = os.path.join(output_dir, "predictions.png")
        self.categories = categories
        self.data_loader = data_loader
        self.dataset_name = dataset_name
        self.count = count
        self.score_threshold = score_threshold

    def compute(self, model: nn.Module) -> list[tuple[np.ndarray, dict[str, Any], Instances]]:
        """(image in BGR, record, instances on the CPU) of the images to draw."""
        loaded = get_dataset_dicts(
            self.dataset_name,
            categories=self.categories,
            filter_empty=False,
            invalid_annotations="skip",
        )
        records = {record["image_id"]: record for record in loaded}
        samples = itertools.chain.from_iterable(self.data_loader)
        annotated = (sample for sample in samples if records[sample["image_id"]]["annotations"])
        rows = []
        for sample in itertools.islice(annotated, self.count):
            instances = model([sample])[0]["instances"].to("cpu")
            image = read_image(sample["file_name"], "BGR")
            rows.append((image, records[sample["image_id"]], instances))
        return rows

    def write(
        self,
        rows: list[tuple[np.ndarray, dict[str, Any], Instances]],
        iteration: int,
        storage: EventStorage,
    ) -> None:
        """Write the sheet."""
        if not rows:
            logger.warning("No image of '%s' has annotations to draw", self.dataset_name)
            return
        metadata = MetadataCatalog.get(self.dataset_name)
        if self.categories and list(self.categories.values()) != metadata.get("thing_classes"):
            metadata = Metadata(thing_classes=list(self.categories.values()))
        comparison_sheet(rows, metadata, self.path, score_threshold=self.score_threshold)
        logger.info("Predictions beside the ground truth are in %s", self.path)


# Lightness of the objects of one class, one after another, beside that of the class's color.
SHADES = (0.0, -0.18, 0.14, -0.09, 0.07, -0.27)


def class_color(index: int, metadata: Any) -> tuple[float, float, float]:
    """The color of a class, RGB in [0, 1].

    Args:
        index: contiguous class index.
        metadata: its ``thing_colors`` are used where there is one for the class; otherwise hues are
            spread by the golden ratio, which keeps neighboring indices apart for any number of
            classes.
    """
    colors = metadata.get("thing_colors") or ()
    if index < len(colors):
        red, green, blue = (channel / 255 for channel in colors[index])
        return red, green, blue
    hue = (0.56 + index * (math.sqrt(5) - 1) / 2) % 1
    return colorsys.hsv_to_rgb(hue, 0.75 if index % 2 == 0 else 0.55, 0.95)


class Colors:
    """The colors of the objects of an image, by their classes and their order."""

    def __init__(self, metadata: Any):
        self._metadata = metadata
        self._counts: Counter[int] = Counter()

    def next(self, index: int) -> tuple[float, float, float]:
        """The color of the next object of a class: the class's own first, then shades of it."""
        hue, lightness, saturation = colorsys.rgb_to_hls(*class_color(index, self._metadata))
        shade = SHADES[self._counts[index] % len(SHADES)]
        self._counts[index] += 1
        if not shade:
            return class_color(index, self._metadata)
        return colorsys.hls_to_rgb(hue, min(max(lightness + shade, 0.15), 0.9), saturation)


# A label of 12 pixels covers a small image: such an image is drawn on a larger canvas instead.
SHORT_SIDE = 480

LONG_SIDE = 1600

CELL_SIDE = 480

GAP = 12

PAPER = 255

# Columns of an image whose masks are not drawn: detectron2 takes them for polygons.
NO_MASK = 2


@dataclass
class _Object:
    """One instance to draw: box (x0, y0, x1, y1) in pixels, mask as detectron2's GenericMask."""

    box: Sequence[float]
    label: str
    color: tuple[float, float, float]
    mask: GenericMask | None = None
    dashed: bool = False


def draw_predictions(
    image_bgr: np.ndarray,
    instances: Instances,
    metadata: Any,
    *,
    score_threshold: float = 0.5,
    scale: float | None = None,
) -> np.ndarray:
    """Draws the masks, boxes, class names and scores of a model's output.

    A picture without any says so, with the best score that is below the threshold.

    Args:
        image_bgr: (H, W, 3) uint8, BGR.
        instances: of image size (H, W), on any device, with ``pred_boxes``, ``pred_classes``, and
            perhaps ``scores`` and ``pred_masks`` (D, H, W) bool.
        metadata: detectron2's metadata of the dataset, for ``thing_classes`` and ``thing_colors``;
            without them, classes are numbered and colored by their index.
        score_threshold: instances of a lower score are left out. In [0, 1].
        scale: size of the picture relative to the image. None: 1, but an image whose short side is
            less than 480 pixels is enlarged to 480 (at most to 1600 on the long side), so that its
            labels can be read.

    Returns:
        (H * scale, W * scale, 3) uint8, BGR.

    Raises:
        ValueError: the instances are not of the size of the image.
    """
    _check_size("instances", instances.image_size, image_bgr)
    objects = _predicted(instances.to("cpu"), metadata, score_threshold)
    note = "no object"
    if instances.has("scores"):
        note += f" with score \N{GREATER-THAN OR EQUAL TO} {score_threshold:g}"
        if len(instances):
            # Rounded down, or 0.499 would be said to reach 0.5; but 0.32 in float32 is 0.31999999.
            best = math.floor(100 * instances.scores.max().item() + 1e-3) / 100
            note += f", best {best:.2f}"
    return _draw(image_bgr, objects, _scale(image_bgr) if scale is None else scale, note)


def draw_ground_truth(
    image_bgr: np.ndarray,
    dataset_dict: Mapping[str, Any],
    metadata: Any,
    *,
    scale: float | None = None,
) -> np.ndarray:
    """Draws the annotations of an image, crowds with a dashed box; without any, it says so.

    Args:
        image_bgr: (H, W, 3) uint8, BGR, of the size that the annotations are for.
        dataset_dict: in detectron2's dataset format, before any mapper; masks are polygons or RLE
            or absent.
        metadata: as in ``draw_predictions``.
        scale: as in ``draw_predictions``.

    Returns:
        (H * scale, W * scale, 3) uint8, BGR.

    Raises:
        ValueError: the annotations are for an image of another size.
    """
    if "height" in dataset_dict and "width" in dataset_dict:
        size = (dataset_dict["height"], dataset_dict["width"])
        _check_size(str(dataset_dict.get("file_name", "dataset_dict")), size, image_bgr)
    objects = _annotated(dataset_dict, image_bgr.shape[:2], metadata)
    scale = _scale(image_bgr) if scale is None else scale
    return _draw(image_bgr, objects, scale, "no annotated object")


def comparison_sheet(
    rows: Sequence[tuple[np.ndarray, Mapping[str, Any], Instances]],
    metadata: Any,
    path: str | os.PathLike[str],
    *,
    score_threshold: float = 0.5,
) -> None:
    """Writes a picture of predictions beside ground truth, atomically.

    Every image is fitted into a cell 480 pixels wide and high. Up to three images stand one below
    the other; from four images on, two of them share a row.

    Args:
        rows: at least one (image, dataset dict, predicted instances), as in the functions above.
        metadata: as in ``draw_predictions``.
        path: a file with the suffix of an image format, ``.png`` for the sharpest text.
        score_threshold: as in ``draw_predictions``.

    Raises:
        ValueError: there is no row, or a size does not match (see the functions above).
        OSError: the file cannot be written.
    """
    if not rows:
        raise ValueError(f"{path}: there is no image to draw; the list of rows is empty")
    pairs_per_row = 1 if len(rows) < 4 else 2
    pairs = []
    for image_bgr, dataset_dict, instances in rows:
        scale = CELL_SIDE / max(image_bgr.shape[:2])
        truth = draw_ground_truth(image_bgr, dataset_dict, metadata, scale=scale)
        predicted = draw_predictions(
            image_bgr, instances, metadata, score_threshold=score_threshold, scale=scale
        )
        name = os.path.basename(str(dataset_dict.get("file_name", "")))
        pairs.append([_cell(truth, name), _cell(predicted, "")])

    titles = [
        "ground truth",
        f"predictions, score \N{GREATER-THAN OR EQUAL TO} {score_threshold:g}",
    ]
    header = _join([_text(title, 34, 19) for title in titles] * pairs_per_row)
    bands = [_space(header.shape[1], GAP), header]
    for start in range(0, len(pairs), pairs_per_row):
        cells = [cell for pair in pairs[start : start + pairs_per_row] for cell in pair]
        height = max(cell.shape[0] for cell in cells)
        cells += [_space(CELL_SIDE, height)] * (2 * pairs_per_row - len(cells))
        bands += [_join([_pad(cell, height) for cell in cells]), _space(header.shape[1], GAP)]
    write_image(path, np.concatenate(bands))


def _predicted(instances: Instances, metadata: Any, score_threshold: float) -> list[_Object]:
    scores = instances.scores.tolist() if instances.has("scores") else [None] * len(instances)
    boxes = instances.pred_boxes.tensor.tolist()
    classes = instances.pred_classes.tolist()
    drawn = instances.has("pred_masks") and instances.image_size[1] != NO_MASK
    masks = np.asarray(instances.pred_masks) if drawn else None
    objects = []
    colors = Colors(metadata)
    for i, (box, score, index) in enumerate(zip(boxes, scores, classes, strict=True)):
        if score is not None and score < score_threshold:
            continue
        name = _class_name(index, metadata)
        objects.append(
            _Object(
                box,
                name if score is None else f"{name} {score:.0%}",
                colors.next(index),
                None if masks is None else GenericMask(masks[i], *instances.image_size),
            )
        )
    return objects


def _annotated(
    dataset_dict: Mapping[str, Any], size: tuple[int, int], metadata: Any
) -> list[_Object]:
    objects = []
    colors = Colors(metadata)
    for annotation in dataset_dict.get("annotations", ()):
        index = annotation["category_id"]
        crowd = bool(annotation.get("iscrowd", 0))
        segmentation = annotation.get("segmentation")
        box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        objects.append(
            _Object(
                [float(value) for value in box],
                _class_name(index, metadata) + (" (crowd)" if crowd else ""),
                colors.next(index),
                GenericMask(segmentation, *size) if segmentation else None,
                dashed=crowd,
            )
        )
    return objects


def _draw(image_bgr: np.ndarray, objects: Sequence[_Object], scale: float, note: str) -> np.ndarray:
    """The objects on the image; where there are none, ``note`` in its corner."""
    visualizer = Visualizer(image_bgr[:, :, ::-1], scale=scale)
    output = visualizer.output
    if scale != 1:
        # With detectron2's nearest pixel, enlarged pixels are blocks and reduced ones alias.
        output.ax.images[0].set_interpolation("bicubic" if scale > 1 else "antialiased")
    # From the largest to the smallest, so that no object hides another.
    objects = sorted(objects, key=lambda o: -(o.box[2] - o.box[0]) * (o.box[3] - o.box[1]))
    for item in objects:
        if item.mask is not None and image_bgr.shape[1] != NO_MASK:
            visualizer.draw_binary_mask(
                item.mask.mask, item.color, edge_color=item.color, alpha=0.45, area_threshold=0
            )
    for item in objects:
        style = "--" if item.dashed else "-"
        visualizer.draw_box(item.box, alpha=0.9, edge_color=item.color, line_style=style)
    # Patches are drawn in units of the image, widths in points of the canvas.
    line_width = _points(output, 2 if min(output.height, output.width) * scale > 360 else 1.5)
    for patch in output.ax.patches:
        patch.set_linewidth(line_width)
    placed: list[Bbox] = []
    # Large objects have room elsewhere: small ones choose first.
    for item in reversed(objects):
        placed.append(_draw_label(visualizer, item, placed))
    if not objects:
        text, extent, margin = _write(visualizer, note, (0.0, 0.0, 0.0))
        text.set_position((margin / output.scale, margin / output.scale))
    return np.ascontiguousarray(output.get_image()[:, :, ::-1])


def _draw_label(visualizer: Visualizer, item: _Object, placed: Sequence[Bbox]) -> Bbox:
    """Writes a label where it covers the fewest others, and never beyond the canvas."""
    output = visualizer.output
    canvas_width, canvas_height = output.canvas.get_width_height()
    text, extent, margin = _write(visualizer, item.label, item.color)
    x0, y0, x1, y1 = (value * output.scale for value in item.box)
    candidates = [
        (x0, y0 - extent.height),
        (x0, y0),
        (x0, y1),
        (x1 - extent.width, y0),
        (x1 - extent.width, y1 - extent.height),
        (x0, y1 - extent.height),
        (x0, (y0 + y1 - extent.height) / 2),
        (x1, y0),
    ]
    best, least = None, math.inf
    for x, y in candidates:
        left = float(np.clip(x, 0, max(canvas_width - extent.width, 0)))
        top = float(np.clip(y, 0, max(canvas_height - extent.height, 0)))
        box = Bbox.from_bounds(left, top, extent.width, extent.height)
        covered = sum(_overlap(box, other) for other in placed)
        if covered < least:
            best, least = box, covered
        if covered == 0:
            break
    assert best is not None
    # The text is anchored at its top left corner, in pixels of the image.
    text.set_position(((best.x0 + margin) / output.scale, (best.y0 + margin) / output.scale))
    return best


def _write(
    visualizer: Visualizer, label: str, color: tuple[float, float, float]
) -> tuple[Text, Bbox, float]:
    """Writes a label on a background of a color, no wider than the canvas.

    Returns:
        The text, which is anchored at its top left corner; the extent of its background and the
        width of the background's margin, in pixels of the canvas.
    """
    output = visualizer.output
    canvas_width, canvas_height = output.canvas.get_width_height()
    pixels = float(np.clip(min(canvas_height, canvas_width) / 38, 11.5, 20))
    font_size = _points(output, pixels) / output.scale
    visualizer.draw_text(label, (0, 0), font_size=font_size, horizontal_alignment="left")
    text = output.ax.texts[-1]
    text.set_parse_math(False)
    luminance = float(np.dot(color, (0.299, 0.587, 0.114)))
    text.set_color("black" if luminance > 0.45 else "white")
    margin = pixels / 6
    background = {"facecolor": color, "alpha": 0.85, "pad": _points(output, margin)}
    text.set_bbox({**background, "edgecolor": "none"})
    renderer = output.canvas.get_renderer()
    extent = text.get_window_extent(renderer).padded(margin)
    if extent.width > canvas_width:
        text.set_fontsize(text.get_fontsize() * 0.97 * canvas_width / extent.width)
        extent = text.get_window_extent(renderer).padded(margin)
    return text, extent, margin


def _overlap(first: Bbox, second: Bbox) -> float:
    width = min(first.x1, second.x1) - max(first.x0, second.x0)
    height = min(first.y1, second.y1) - max(first.y0, second.y0)
    return max(width, 0) * max(height, 0)


def _points(output: VisImage, pixels: float) -> float:
    return pixels * 72 / output.dpi


def _scale(image_bgr: np.ndarray) -> float:
    short, long = sorted(image_bgr.shape[:2])
    return max(1.0, min(SHORT_SIDE / short, LONG_SIDE / long))


def _class_name(index: int, metadata: Any) -> str:
    names = metadata.get("thing_classes") or ()
    return names[index] if index < len(names) else f"class {index}"


def _check_size(what: str, size: Sequence[int], image_bgr: np.ndarray) -> None:
    height, width = image_bgr.shape[:2]
    if tuple(size) != (height, width):
        raise ValueError(
            f"{what}: made for an image of {size[1]}x{size[0]} pixels, but the image to draw on "
            f"has {width}x{height}"
        )


def _text(text: str, height: int, pixels: float) -> np.ndarray:
    """A white strip of the width of a cell with a line of text, BGR."""
    strip = VisImage(np.full((height, CELL_SIDE, 3), PAPER, dtype=np.uint8))
    # Class names and file names are text: "$" must not start a formula.
    strip.ax.text(
        2, height / 2, text, size=_points(strip, pixels), va="center_baseline", parse_math=False
    )
    return strip.get_image()[:, :, ::-1]


def _space(width: int, height: int) -> np.ndarray:
    return np.full((height, width, 3), PAPER, dtype=np.uint8)


def _cell(picture: np.ndarray, caption: str) -> np.ndarray:
    """``picture`` in the middle of the width of a cell, with a line of text below."""
    cell = _space(CELL_SIDE, picture.shape[0])
    left = (CELL_SIDE - picture.shape[1]) // 2
    cell[:, left : left + picture.shape[1]] = picture
    return np.concatenate([cell, _text(caption, 24, 13)])


def _pad(cell: np.ndarray, height: int) -> np.ndarray:
    return np.concatenate([cell, _space(CELL_SIDE, height - cell.shape[0])])


def _join(cells: Sequence[np.ndarray]) -> np.ndarray:
    """Cells of one height beside each other, with gaps around them."""
    gap = _space(GAP, cells[0].shape[0])
    parts = [gap]
    for cell in cells:
        parts += [cell, gap]
    return np.concatenate(parts, axis=1)
