"""The images of a report, as data in its page: predictions beside ground truth, reconstructions."""

import base64
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances

from crossmae_det.detection.coco import describe, get_dataset_dicts
from crossmae_det.detection.evaluator import DETECTIONS_FILE
from crossmae_det.detection.visualizer import draw_ground_truth, draw_predictions
from crossmae_det.report.run_files import Run
from crossmae_det.utils.image_reading import read_image

logger = logging.getLogger(__name__)

CELL_SIDE = 420  # pixels, of the longer side of a drawing
SHEET_SIDE = 1000  # of the width of a sheet that the run has drawn
JPEG_QUALITY = 82

WORST, BEST = 6, 4  # images of either kind
RECONSTRUCTIONS = 3  # sheets at most: the last one and earlier ones


@dataclass(frozen=True)
class Drawing:
    """An image: data URI, size in pixels, and text for those who do not see it."""

    source: str
    width: int
    height: int
    text: str


@dataclass(frozen=True)
class Comparison:
    """Ground truth and predictions of an image, with what the evaluation says of it."""

    file_name: str
    truth: Drawing
    predicted: Drawing
    f1: float | None
    counts: str


def drawing(image_bgr: np.ndarray, text: str) -> Drawing:
    """An image, (H, W, 3) uint8 in BGR, as a JPEG in a data URI."""
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
    _, data = cv2.imencode(".jpg", image_bgr, options)
    encoded = base64.b64encode(data.tobytes()).decode()
    height, width = image_bgr.shape[:2]
    return Drawing(f"data:image/jpeg;base64,{encoded}", width, height, text)


def sheet(path: Path, text: str) -> Drawing:
    """An image that the run has drawn, at most :data:`SHEET_SIDE` pixels wide.

    Raises:
        ValueError, OSError: it cannot be read.
    """
    image = read_image(str(path), "BGR")
    height, width = image.shape[:2]
    if width > SHEET_SIDE:
        size = (SHEET_SIDE, max(1, round(height * SHEET_SIDE / width)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return drawing(image, text)


def reconstructions(folder: Path) -> list[tuple[int, Drawing]]:
    """(iteration, sheet) of a pretraining run, the last one first, then earlier ones.

    Raises:
        ValueError, OSError: a sheet cannot be read.
    """
    paths = sorted(p for p in folder.glob("reconstructions/*.png") if p.stem.isdigit())
    if len(paths) > RECONSTRUCTIONS:  # evenly spaced, with the first and the last
        steps = np.linspace(0, len(paths) - 1, RECONSTRUCTIONS).round().astype(int)
        paths = [paths[step] for step in steps]
    text = "original, masked and reconstructed images after {:,} iterations"
    return [(int(p.stem), sheet(p, text.format(int(p.stem)))) for p in reversed(paths)]


def choose(images: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any]]:
    """The worst and the best images by F1; no image is in both."""
    scored = [image for image in images if isinstance(image.get("f1"), int | float)]
    # At equal F1, the image with more objects says more.
    size = "true_positives", "false_negatives", "false_positives"
    ordered = sorted(
        scored, key=lambda image: (image["f1"], -sum(image.get(key) or 0 for key in size))
    )
    worst = ordered[: min(WORST, (len(ordered) + 1) // 2)]
    rest = ordered[len(worst) :]
    best = sorted(rest, key=lambda i: (-i["f1"], -sum(i.get(key) or 0 for key in size)))[:BEST]
    return worst, best


def compare_with_truth(
    run: Run, chosen: Sequence[Mapping[str, Any]], score_threshold: float
) -> dict[Any, Comparison]:
    """Draw images of the test set, with ground truth and with predictions.

    Args:
        run: its results name the dataset, and its folder has the detections.
        chosen: dicts with "image_id", "file_name", "f1" and the numbers of right and wrong objects.
        score_threshold: detections below it are not drawn.

    Returns:
        Image id -> drawings, of the images that can be read.

    Raises:
        ValueError, OSError: the dataset or the detections are not accessible, or no image is.
    """
    name = run.results[""].get("context", {}).get("dataset")
    if not isinstance(name, str):
        raise ValueError("results.json does not name the dataset")
    detections = run.folder / "inference" / DETECTIONS_FILE
    if not detections.is_file():
        raise ValueError(f"{detections} is missing")
    wanted = [image["image_id"] for image in chosen]
    categories = describe(name).categories
    crowd = run.option("dataloader.test.dataset.crowd")
    records = get_dataset_dicts(
        name,
        filter_empty=False,
        invalid_annotations="skip",
        crowd=crowd if crowd in ("ignore", "keep") else "ignore",
    )
    by_id = {record["image_id"]: record for record in records if record["image_id"] in wanted}
    predicted: dict[Any, list[dict[str, Any]]] = {image_id: [] for image_id in wanted}
    for detection in json.loads(detections.read_text(encoding="utf-8")):
        if detection["image_id"] in predicted and detection["score"] >= score_threshold:
            predicted[detection["image_id"]].append(detection)
    metadata = Metadata(thing_classes=list(categories.values()))
    indices = {category: index for index, category in enumerate(categories)}
    found, failure = {}, f"the images of the results are not in '{name}'"
    for image in chosen:
        record = by_id.get(image["image_id"])
        if record is None:
            continue
        try:
            pixels = read_image(record["file_name"], "BGR")
            scale = CELL_SIDE / max(pixels.shape[:2])
            truth = draw_ground_truth(pixels, record, metadata, scale=scale)
            instances = _instances(predicted[image["image_id"]], pixels.shape[:2], indices)
            drawn = draw_predictions(
                pixels, instances, metadata, score_threshold=score_threshold, scale=scale
            )
        except (ValueError, OSError) as error:
            failure = str(error)
            logger.debug("Not drawn: %s", error)
            continue
        file_name = Path(str(record["file_name"])).name
        found[image["image_id"]] = Comparison(
            file_name,
            drawing(truth, f"ground truth of {file_name}"),
            drawing(drawn, f"predictions on {file_name}"),
            image.get("f1"),
            _counts(image),
        )
    if not found:
        raise ValueError(failure)
    return found


def _counts(image: Mapping[str, Any]) -> str:
    names = {"true_positives": "found", "false_negatives": "missed", "false_positives": "wrong"}
    return ", ".join(f"{image[key]} {name}" for key, name in names.items() if key in image)


def _instances(
    detections: Sequence[Mapping[str, Any]], size: tuple[int, int], indices: Mapping[int, int]
) -> Instances:
    """Detections in COCO's result format, of an image of size (height, width)."""
    known = [detection for detection in detections if detection["category_id"] in indices]
    boxes = torch.tensor([detection["bbox"] for detection in known]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    instances = Instances(
        size,
        pred_boxes=Boxes(boxes),
        scores=torch.tensor([float(detection["score"]) for detection in known]),
        pred_classes=torch.tensor(
            [indices[detection["category_id"]] for detection in known], dtype=torch.int64
        ),
    )
    if known and all("segmentation" in detection for detection in known):
        masks = [pycocotools.mask.decode(detection["segmentation"]) for detection in known]
        instances.pred_masks = torch.from_numpy(np.stack(masks).astype(bool))
    return instances
