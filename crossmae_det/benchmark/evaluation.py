"""Time of COCO evaluation from the last image to the table, with and without hotcoco.

The data are made up: images with objects like those of COCO in number and size, and detections
around them and elsewhere. Nothing is drawn; only annotations and run lengths exist.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.benchmark import timer

from crossmae_det.benchmark.measuring import Spread, interleaved, ratios
from crossmae_det.benchmark.report import Column, Section
from crossmae_det.detection import COCOEvaluator, resolve_name
from crossmae_det.detection.coco_backends import resolve_backend
from crossmae_det.detection.detections import ImageDetections, as_text
from crossmae_det.utils.files import write_json

HEIGHT, WIDTH = 480, 640
CLASSES = 80
# About as in COCO: 7 objects per image, in 3 classes, a third of them each small, medium and large.
MEAN_OBJECTS = 7.3
CLASSES_PER_IMAGE = 3
RADII = 5.0, 160.0
VERTICES = 24
CROWD = 0.01
# Detections close to an object; the others are anywhere. Most scores are low.
CLOSE = 0.5

TASKS = {"bbox": "boxes", "segm": "masks"}


class MadeUpData:
    """Annotations, and the detections of a model, for images that do not exist.

    Args:
        folder: where the json is written.
        images: number of images.
        detections: number of detections in each image.
        seed: of everything random.

    Attributes:
        name: of the dataset, as ``JSON:IMAGE_FOLDER``.
        content: of the json.
        detections: image id -> its detections, with masks.
    """

    def __init__(self, folder: Path, images: int, detections: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        entries: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        self.detections: dict[int, ImageDetections] = {}
        for image_id in range(1, images + 1):
            entries.append(
                {
                    "id": image_id,
                    "file_name": f"{image_id:012}.jpg",
                    "height": HEIGHT,
                    "width": WIDTH,
                }
            )
            count = int(rng.poisson(MEAN_OBJECTS))
            shapes = _shapes(rng, count)
            classes = rng.choice(rng.integers(0, CLASSES, CLASSES_PER_IMAGE), count)
            annotations += _annotations(rng, image_id, shapes, classes, len(annotations))
            self.detections[image_id] = _detections(rng, shapes, classes, detections)
        categories = [{"id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)]
        self.content = {"images": entries, "annotations": annotations, "categories": categories}
        path = folder / "made_up.json"
        write_json(path, self.content)
        self.name = resolve_name(f"{path}:{folder}")

    def results(self, task: str) -> list[dict[str, Any]]:
        """The detections in COCO's result format, as pycocotools loads them for a task."""
        return [
            {"image_id": image_id, "category_id": k + 1, "score": score}
            | ({"bbox": box} if task == "bbox" else {"segmentation": mask})
            for image_id, found in self.detections.items()
            for k, score, box, mask in zip(
                found.classes.tolist(),
                found.scores.tolist(),
                found.boxes.tolist(),
                found.masks or [],
                strict=True,
            )
        ]


def _shapes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Center, two radii and angle of ellipses, (count, 5); radii are log-uniform."""
    low, high = np.log(RADII)
    size = np.exp(rng.uniform(low, high, count))
    aspect = np.exp(rng.normal(0, 0.4, count) / 2)
    center = rng.uniform((0, 0), (WIDTH, HEIGHT), (count, 2))
    return np.column_stack([center, size * aspect, size / aspect, rng.uniform(0, np.pi, count)])


def _polygons(rng: np.random.Generator, shapes: np.ndarray) -> list[list[float]]:
    """Outlines x, y, x, y, ... of uneven ellipses, inside of the image."""
    angles = np.linspace(0, 2 * np.pi, VERTICES, endpoint=False)
    x, y, a, b, turn = shapes.T[..., None]
    radius = rng.uniform(0.8, 1.2, (len(shapes), VERTICES))
    along, across = a * radius * np.cos(angles), b * radius * np.sin(angles)
    xs = np.clip(x + along * np.cos(turn) - across * np.sin(turn), 0, WIDTH)
    ys = np.clip(y + along * np.sin(turn) + across * np.cos(turn), 0, HEIGHT)
    return np.stack([xs, ys], axis=-1).reshape(len(shapes), 2 * VERTICES).round(2).tolist()


def _annotations(
    rng: np.random.Generator, image_id: int, shapes: np.ndarray, classes: np.ndarray, before: int
) -> list[dict[str, Any]]:
    annotations: list[dict[str, Any]] = []
    for polygon, category in zip(_polygons(rng, shapes), classes.tolist(), strict=True):
        (mask,) = mask_util.frPyObjects([polygon], HEIGHT, WIDTH)
        area = float(mask_util.area(mask))
        if not area:
            continue
        crowd = rng.random() < CROWD
        annotations.append(
            {
                "id": before + len(annotations) + 1,
                "image_id": image_id,
                "category_id": category + 1,
                "bbox": mask_util.toBbox(mask).tolist(),
                "area": area,
                "iscrowd": int(crowd),
                "segmentation": as_text(mask) if crowd else [polygon],
            }
        )
    return annotations


def _detections(
    rng: np.random.Generator, shapes: np.ndarray, classes: np.ndarray, count: int
) -> ImageDetections:
    close = rng.random(count) < (CLOSE if len(shapes) else 0)
    found, labels = _shapes(rng, count), rng.integers(0, CLASSES, count)
    of = rng.integers(0, max(len(shapes), 1), count)[close]
    found[close], labels[close] = shapes[of], classes[of]
    found[:, :2] += rng.normal(0, 0.08, (count, 2)) * found[:, 2:4] * close[:, None]
    found[:, 2:4] *= np.exp(rng.normal(0, 0.08, (count, 2)) * close[:, None])
    masks = mask_util.frPyObjects(_polygons(rng, found), HEIGHT, WIDTH) if count else []
    boxes = np.array([mask_util.toBbox(mask) for mask in masks]).reshape(-1, 4)
    boxes += rng.normal(0, 1, boxes.shape)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], 1)
    scores = rng.random(count) ** np.where(close, 2, 6)
    return ImageDetections(
        boxes=boxes.astype(np.float32).astype(np.float64),
        scores=scores.astype(np.float32).astype(np.float64),
        classes=labels.astype(np.int64),
        masks=[as_text(mask) for mask in masks],
        areas=np.array([mask_util.area(mask) for mask in masks], np.float64),
    )


def check_numbers(images: int, detections: int) -> None:
    """Check what to measure.

    Raises:
        ValueError: a number is not positive, or hotcoco is not installed.
    """
    if min(images, detections) < 1:
        raise ValueError(
            f"--evaluation: the numbers must be at least 1, got {images} and {detections}"
        )
    resolve_backend("hotcoco")


def evaluation_times(images: int, detections: int, repeats: int) -> Iterator[Section]:
    """Tables of the time to evaluate a dataset, and to take in the masks of an image.

    Args:
        images: number of images, at least 1.
        detections: number of detections per image, at least 1.
        repeats: rounds, each with every way to evaluate.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet():
        data = MadeUpData(Path(folder), images, detections)
        for task in TASKS:
            yield _evaluation_section(data, Path(folder), task, repeats)
    yield _encoding_section(detections, repeats)


def _evaluation_section(data: MadeUpData, folder: Path, task: str, repeats: int) -> Section:
    ways: dict[str, Callable[[], Any]] = {
        "crossmae_det, hotcoco, with analysis": _evaluator(data, folder, task, "hotcoco", True),
        "crossmae_det, hotcoco": _evaluator(data, folder, task, "hotcoco", False),
        "crossmae_det, pycocotools": _evaluator(data, folder, task, "pycocotools", False),
        "pycocotools alone": partial(_pycocotools, data.content, data.results(task), task),
    }
    measures = [partial(_seconds, way) for way in ways.values()]
    times = interleaved(measures, repeats, TASKS[task])
    alone = times[-1]
    evaluator = times[-2]
    count = sum(map(len, data.detections.values()))
    return Section(
        key=f"evaluation_{task}",
        title=f"COCO evaluation of {TASKS[task]}: {len(data.detections)} images, {count}"
        " detections",
        columns=[
            Column("evaluation", "evaluation"),
            Column("s (range)", "seconds"),
            Column("evaluator with pycocotools: times as long", "evaluator", ".1f"),
            Column("pycocotools alone: times as long", "alone", ".1f"),
        ],
        records=[
            {
                "evaluation": name,
                "seconds": Spread.of(seconds),
                "evaluator": ratios(evaluator, seconds),
                "alone": ratios(alone, seconds),
            }
            for name, seconds in zip(ways, times, strict=True)
        ],
        notes=[
            f"{repeats} interleaved repeats; range: lowest to highest. hotcoco"
            f" {version('hotcoco')}, pycocotools {version('pycocotools')}.",
            "crossmae_det: from the last image to the table, with the files of detections and"
            " results.",
            "pycocotools alone: loadRes, evaluate, accumulate and summarize, without any file.",
        ],
        values={
            "images": len(data.detections),
            "detections": count,
            "seconds": dict(zip(ways, times, strict=True)),
        },
    )


def _evaluator(
    data: MadeUpData, folder: Path, task: str, backend: str, analysis: bool
) -> Callable[[], Any]:
    output = folder / f"{task}_{backend}_{analysis}"
    evaluator = COCOEvaluator(
        data.name,
        tasks=[task],
        distributed=False,
        output_dir=str(output),
        backend=backend,
        analysis=analysis,
    )
    for image_id, found in data.detections.items():
        if task == "bbox":
            found = ImageDetections(found.boxes, found.scores, found.classes)
        evaluator.add(image_id, found)
    return evaluator.evaluate


def _pycocotools(content: dict[str, Any], results: list[dict[str, Any]], task: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        # loadRes adds keys to what it is given.
        evaluation = COCOeval(truth, truth.loadRes([dict(entry) for entry in results]), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()


def _encoding_section(detections: int, repeats: int) -> Section:
    rng = np.random.default_rng(0)
    shapes = _shapes(rng, detections)
    masks = mask_util.decode(mask_util.frPyObjects(_polygons(rng, shapes), HEIGHT, WIDTH))
    found = Instances((HEIGHT, WIDTH))
    found.pred_boxes = Boxes(torch.zeros(detections, 4))
    found.scores = torch.zeros(detections)
    found.pred_classes = torch.zeros(detections, dtype=torch.int64)
    found.pred_masks = torch.as_tensor(np.ascontiguousarray(masks.transpose(2, 0, 1))) > 0

    def ours() -> None:
        ImageDetections.from_instances(found).to_json(1, [1])

    usual = partial(instances_to_coco_json, found, 1)
    ours_times, usual_times = interleaved(
        [partial(_seconds, way) for way in (ours, usual)], 5 * repeats, "run lengths"
    )
    return Section(
        key="evaluation_encoding",
        title=f"Run lengths and JSON of the {detections} masks of an image of {WIDTH} x {HEIGHT}",
        columns=[
            Column("evaluator", "evaluator"),
            Column("ms (range)", "seconds", ".1f"),
            Column("detectron2: times as long", "ratio", ".1f"),
        ],
        records=[
            {
                "evaluator": name,
                "seconds": Spread.of([1000 * value for value in seconds]),
                "ratio": ratios(usual_times, seconds),
            }
            for name, seconds in (("crossmae_det", ours_times), ("detectron2", usual_times))
        ],
        notes=[
            f"{5 * repeats} interleaved repeats; range: lowest to highest. detectron2 makes the"
            " run lengths alone, and the JSON after the last image."
        ],
        values={"crossmae_det_seconds": ours_times, "detectron2_seconds": usual_times},
    )


def _seconds(way: Callable[[], Any]) -> float:
    start = timer()
    way()
    return timer() - start


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tables of the evaluators on the terminal, which are made all the same."""
    logger = logging.getLogger("crossmae_det.detection")
    propagate, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.propagate = propagate
