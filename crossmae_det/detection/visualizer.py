"""Drawing predictions and ground truth, alone or side by side.

Built on detectron2's ``Visualizer``, with three additions. Colors belong to classes: predictions
and ground truth agree, and the objects of one class get shades of its color. Labels avoid each
other and the border. Small images are enlarged, so that their labels can be read.
"""

import colorsys
import itertools
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from detectron2.data import Metadata, MetadataCatalog
from detectron2.structures import BoxMode, Instances
from detectron2.utils.events import EventStorage
from detectron2.utils.visualizer import GenericMask, VisImage, Visualizer
from matplotlib.transforms import Bbox
from torch import nn
from torch.utils.data import DataLoader

from crossmae_det.detection.coco import get_dataset_dicts
from crossmae_det.utils.files import write_image
from crossmae_det.utils.image_reading import read_image

logger = logging.getLogger(__name__)

Color = tuple[float, float, float]

# Added to the lightness of a class's color for its first, second, ... object in an image.
SHADES = (0.0, -0.18, 0.14, -0.09, 0.07, -0.27)

# Pixels: smaller images are enlarged to this short side, up to this long side.
SHORT_SIDE = 480
LONG_SIDE = 1600

# Pixels of a comparison sheet.
CELL_SIDE = 480
GAP = 12
WHITE = (255, 255, 255)

# detectron2 takes a mask of this width for a polygon, so no masks are drawn.
WIDTH_WITHOUT_MASKS = 2


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
        self.data_loader = data_loader
        self.dataset_name = dataset_name
        self.count = count
        self.score_threshold = score_threshold
        self.categories = categories

    def compute(self, model: nn.Module) -> list[tuple[np.ndarray, dict[str, Any], Instances]]:
        """(image in BGR, dataset dict, instances on the CPU) of the images to draw."""
        loaded = get_dataset_dicts(
            self.dataset_name,
            categories=self.categories,
            filter_empty=False,
            invalid_annotations="skip",
        )
        dicts = {record["image_id"]: record for record in loaded}
        samples = itertools.chain.from_iterable(self.data_loader)
        annotated = (sample for sample in samples if dicts[sample["image_id"]]["annotations"])
        rows = []
        for sample in itertools.islice(annotated, self.count):
            instances = model([sample])[0]["instances"].to("cpu")
            rows.append(
                (read_image(sample["file_name"], "BGR"), dicts[sample["image_id"]], instances)
            )
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


def draw_predictions(
    image_bgr: np.ndarray,
    instances: Instances,
    metadata: Any,
    *,
    score_threshold: float = 0.5,
    scale: float | None = None,
) -> np.ndarray:
    """Draw the masks, boxes, class names and scores of a model's output.

    If there is nothing to draw, a note says so, with the best score below the threshold.

    Args:
        image_bgr: (H, W, 3) uint8, BGR.
        instances: of image size (H, W), on any device, with ``pred_boxes``, ``pred_classes``, and
            optionally ``scores`` and ``pred_masks`` (D, H, W) bool.
        metadata: detectron2's metadata of the dataset, for ``thing_classes`` and ``thing_colors``;
            classes without a name are numbered.
        score_threshold: instances with a lower score are left out. In [0, 1].
        scale: size of the result relative to the image. None: 1, but images with a short side below
            480 pixels are enlarged to 480 (at most to 1600 on the long side).

    Returns:
        (H * scale, W * scale, 3) uint8, BGR.

    Raises:
        ValueError: the instances do not have the size of the image.
    """
    _check_size("instances", instances.image_size, image_bgr)
    instances = instances.to("cpu")
    labels = [_class_name(index, metadata) for index in instances.pred_classes.tolist()]
    note = "no object"
    if instances.has("scores"):
        note += f" with score \N{GREATER-THAN OR EQUAL TO} {score_threshold:g}"
        if len(instances):
            # Rounded down, so that 0.499 is not shown as 0.5; 0.32 in float32 is 0.31999999.
            note += f", best {math.floor(100 * instances.scores.max().item() + 1e-3) / 100:.2f}"
        scores = instances.scores.tolist()
        labels = [f"{label} {score:.0%}" for label, score in zip(labels, scores, strict=True)]
        kept = [index for index, score in enumerate(scores) if score >= score_threshold]
        labels, instances = [labels[index] for index in kept], instances[kept]
    boxes = instances.pred_boxes.tensor.tolist()
    colors = _object_colors(instances.pred_classes.tolist(), metadata)
    masks = np.asarray(instances.pred_masks) if instances.has("pred_masks") else [None] * len(boxes)
    return _draw(image_bgr, map(_Object, boxes, labels, colors, masks), scale, note)


def draw_ground_truth(
    image_bgr: np.ndarray,
    dataset_dict: Mapping[str, Any],
    metadata: Any,
    *,
    scale: float | None = None,
) -> np.ndarray:
    """Draw the annotations of an image, crowd regions with a dashed box, or a note without any.

    Args:
        image_bgr: (H, W, 3) uint8, BGR, of the size that the annotations are for.
        dataset_dict: in detectron2's dataset format, before any mapper; masks may be polygons, RLE
            or absent.
        metadata: as in :func:`draw_predictions`.
        scale: as in :func:`draw_predictions`.

    Returns:
        (H * scale, W * scale, 3) uint8, BGR.

    Raises:
        ValueError: the annotations are for an image of another size.
    """
    if "height" in dataset_dict and "width" in dataset_dict:
        size = (dataset_dict["height"], dataset_dict["width"])
        _check_size(str(dataset_dict.get("file_name", "dataset_dict")), size, image_bgr)
    annotations = dataset_dict.get("annotations", ())
    colors = _object_colors([a["category_id"] for a in annotations], metadata)
    objects = []
    for annotation, color in zip(annotations, colors, strict=True):
        crowd = bool(annotation.get("iscrowd", 0))
        label = _class_name(annotation["category_id"], metadata) + (" (crowd)" if crowd else "")
        box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        segmentation = annotation.get("segmentation")
        mask = GenericMask(segmentation, *image_bgr.shape[:2]).mask if segmentation else None
        objects.append(_Object([float(value) for value in box], label, color, mask, crowd))
    return _draw(image_bgr, objects, scale, "no annotated object")


def comparison_sheet(
    rows: Sequence[tuple[np.ndarray, Mapping[str, Any], Instances]],
    metadata: Any,
    path: str | os.PathLike[str],
    *,
    score_threshold: float = 0.5,
) -> None:
    """Write an image with predictions beside the ground truth, atomically.

    Every image is fitted into a cell of 480 x 480 pixels. Up to three images are stacked; from four
    images on, two share a row.

    Args:
        rows: at least one (image, dataset dict, predicted instances), as in the functions above.
        metadata: as in :func:`draw_predictions`.
        path: a file with the suffix of an image format, ``.png`` for the sharpest text.
        score_threshold: as in :func:`draw_predictions`.

    Raises:
        ValueError: there is no row, or a size does not match (see the functions above).
        OSError: the file cannot be written.
    """
    if not rows:
        raise ValueError(f"{path}: there is no image to draw: the list of rows is empty")
    per_line = 2 if len(rows) < 4 else 4
    titles = [
        "ground truth",
        f"predictions, score \N{GREATER-THAN OR EQUAL TO} {score_threshold:g}",
    ]
    cells = [_text(title, 34, 19) for title in titles * (per_line // 2)]
    for image_bgr, dataset_dict, instances in rows:
        scale = CELL_SIDE / max(image_bgr.shape[:2])
        truth = draw_ground_truth(image_bgr, dataset_dict, metadata, scale=scale)
        predicted = draw_predictions(
            image_bgr, instances, metadata, score_threshold=score_threshold, scale=scale
        )
        caption = os.path.basename(str(dataset_dict.get("file_name", "")))
        for cell, text in ((truth, caption), (predicted, "")):
            cell = _pad(cell, cell.shape[0], CELL_SIDE)
            cells.append(np.vstack([cell, _text(text, 24 + GAP, 13)]))
    lines = []
    for start in range(0, len(cells), per_line):
        line = cells[start : start + per_line]
        height = max(cell.shape[0] for cell in line)
        line += [_text("", height, 13)] * (per_line - len(line))
        lines.append(np.hstack([_pad(cell, height, CELL_SIDE + GAP) for cell in line]))
    write_image(path, np.vstack(lines))


def class_color(index: int, metadata: Any) -> Color:
    """The color of a class, RGB in [0, 1].

    Args:
        index: contiguous class index.
        metadata: its ``thing_colors`` are used if they include the class; otherwise hues are spread
            by the golden ratio, which keeps neighboring indices apart for any number of classes.
    """
    colors = metadata.get("thing_colors") or ()
    if index < len(colors):
        red, green, blue = (channel / 255 for channel in colors[index])
        return red, green, blue
    hue = (0.56 + index * (math.sqrt(5) - 1) / 2) % 1
    return colorsys.hsv_to_rgb(hue, 0.75 if index % 2 == 0 else 0.55, 0.95)


def _object_colors(classes: Sequence[int], metadata: Any) -> Iterator[Color]:
    """The color of each object: that of its class for the first one, then shades of it."""
    seen: Counter[int] = Counter()
    for index in classes:
        color = class_color(index, metadata)
        if shade := SHADES[seen[index] % len(SHADES)]:
            hue, lightness, saturation = colorsys.rgb_to_hls(*color)
            color = colorsys.hls_to_rgb(hue, min(max(lightness + shade, 0.15), 0.9), saturation)
        seen[index] += 1
        yield color


def _class_name(index: int, metadata: Any) -> str:
    names = metadata.get("thing_classes") or ()
    return names[index] if index < len(names) else f"class {index}"


def _check_size(what: str, size: Sequence[int], image_bgr: np.ndarray) -> None:
    height, width = image_bgr.shape[:2]
    if tuple(size) != (height, width):
        raise ValueError(
            f"{what}: made for an image of {size[1]}x{size[0]} pixels, but the image has"
            f" {width}x{height}"
        )


@dataclass
class _Object:
    """An object to draw: box (x0, y0, x1, y1) in pixels, mask (H, W)."""

    box: Sequence[float]
    label: str
    color: Color
    mask: np.ndarray | None = None
    dashed: bool = False

    @property
    def area(self) -> float:
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


def _draw(
    image_bgr: np.ndarray, objects: Iterable[_Object], scale: float | None, note: str
) -> np.ndarray:
    """The objects drawn on the image; without any, ``note`` in its corner."""
    if scale is None:
        short, long = sorted(image_bgr.shape[:2])
        scale = max(1.0, min(SHORT_SIDE / short, LONG_SIDE / long))
    canvas = _Canvas(image_bgr[:, :, ::-1], scale=scale)
    canvas.draw_objects(list(objects), note)
    return np.ascontiguousarray(canvas.output.get_image()[:, :, ::-1])


class _Canvas(Visualizer):
    """detectron2's ``Visualizer`` with smooth resizing and labels that avoid each other."""

    def __init__(self, image_rgb: np.ndarray, scale: float):
        super().__init__(image_rgb, scale=scale)
        self.size = self.output.canvas.get_width_height()  # of the result, in pixels
        self.labels: list[Bbox] = []
        if scale != 1:  # nearest pixels would show blocks or aliasing
            image = self.output.ax.images[0]
            image.set_interpolation("bicubic" if scale > 1 else "antialiased")

    def draw_objects(self, objects: list[_Object], note: str) -> None:
        # From the largest to the smallest, so that no object hides another.
        objects = sorted(objects, key=lambda item: -item.area)
        for item in objects:
            if item.mask is not None and self.output.width != WIDTH_WITHOUT_MASKS:
                self.draw_binary_mask(
                    item.mask, item.color, edge_color=item.color, alpha=0.45, area_threshold=0
                )
        for item in objects:
            style = "--" if item.dashed else "-"
            self.draw_box(item.box, alpha=0.9, edge_color=item.color, line_style=style)
        line_width = _points(2 if min(self.size) > 360 else 1.5, self.output)
        for patch in self.output.ax.patches:
            patch.set_linewidth(line_width)
        # Large objects leave more space for a label elsewhere: small ones choose first.
        for item in reversed(objects):
            self.draw_label(item.label, item.color, item.box)
        if not objects:
            self.draw_label(note, (0.0, 0.0, 0.0), (0, 0, 0, 0))

    def draw_label(self, label: str, color: Color, box: Sequence[float]) -> None:
        """Write a label at the position around its box where it covers the fewest other labels."""
        output, (canvas_width, canvas_height) = self.output, self.size
        pixels = float(np.clip(min(self.size) / 38, 11.5, 20))
        size = _points(pixels, output) / output.scale
        self.draw_text(label, (0, 0), font_size=size, horizontal_alignment="left")
        text = output.ax.texts[-1]
        text.set_parse_math(False)
        text.set_color("black" if np.dot(color, (0.299, 0.587, 0.114)) > 0.45 else "white")
        margin = pixels / 6
        background = {"facecolor": color, "alpha": 0.85, "pad": _points(margin, output)}
        text.set_bbox({**background, "edgecolor": "none"})
        renderer = output.canvas.get_renderer()
        extent = text.get_window_extent(renderer).padded(margin)
        if extent.width > canvas_width:
            text.set_fontsize(text.get_fontsize() * 0.97 * canvas_width / extent.width)
            extent = text.get_window_extent(renderer).padded(margin)
        width, height = extent.width, extent.height

        x0, y0, x1, y1 = (value * output.scale for value in box)
        positions = [
            *((x0, y0 - height), (x0, y0), (x0, y1), (x1 - width, y0), (x1 - width, y1 - height)),
            *((x0, y1 - height), (x0, (y0 + y1 - height) / 2), (x1, y0)),
        ]
        places = []
        for x, y in positions:
            left = float(np.clip(x, 0, max(canvas_width - width, 0)))
            top = float(np.clip(y, 0, max(canvas_height - height, 0)))
            places.append(Bbox.from_bounds(left, top, width, height))
        place = min(places, key=self._covered)
        self.labels.append(place)
        # The text is anchored at its top left corner, in pixels of the image.
        text.set_position(((place.x0 + margin) / output.scale, (place.y0 + margin) / output.scale))

    def _covered(self, place: Bbox) -> float:
        """The area of other labels below a label, in square pixels."""
        overlaps = (Bbox.intersection(place, label) for label in self.labels)
        return sum(overlap.width * overlap.height for overlap in overlaps if overlap is not None)


def _points(pixels: float, output: VisImage) -> float:
    return pixels * 72 / output.dpi


def _text(text: str, height: int, pixels: float) -> np.ndarray:
    """A white strip of the width of a cell with a line of text, BGR."""
    strip = VisImage(np.full((height, CELL_SIDE, 3), WHITE, dtype=np.uint8))
    size = _points(pixels, strip)
    # "$" in class names and file names must not start a formula.
    strip.ax.text(2, 1.3 * pixels, text, size=size, va="baseline", parse_math=False)
    return strip.get_image()[:, :, ::-1]


def _pad(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The image at the top and in the middle of a white canvas."""
    left = (width - image.shape[1]) // 2
    right, bottom = width - image.shape[1] - left, height - image.shape[0]
    return cv2.copyMakeBorder(image, 0, bottom, left, right, cv2.BORDER_CONSTANT, value=WHITE)
