"""COCO's precision and recall, computed by hotcoco or by pycocotools with equal numbers.

Legend: T IoU thresholds (0.50 to 0.95), R recall thresholds (0 to 1), K classes, A areas (all,
small, medium, large).
"""

import contextlib
import importlib.util
import io
import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.utils.logger import log_first_n

from crossmae_det.detection.detections import Detections

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "hotcoco", "pycocotools")
PER_CLASS_PREFIX = "AP-"
IOU_THRESHOLDS = tuple(0.5 + 0.05 * i for i in range(10))


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What COCO's evaluation accumulates.

    Attributes:
        precision: (T, R, K, A), -1 where there is no ground truth.
        recall: (T, K, A), -1 where there is no ground truth.
        scores: (T, R, K, A), score at which each recall is reached.
        hotcoco: its evaluation, for further analysis; None if pycocotools computed this one.
    """

    precision: np.ndarray
    recall: np.ndarray
    scores: np.ndarray
    hotcoco: Any = None


def has_hotcoco() -> bool:
    """Whether hotcoco is installed."""
    return importlib.util.find_spec("hotcoco") is not None


def resolve_backend(backend: str) -> str:
    """The backend that ``backend`` stands for; the choice is logged once.

    Args:
        backend: one of ``BACKENDS``; "auto" is hotcoco where it is installed.

    Returns:
        "hotcoco" or "pycocotools".

    Raises:
        ValueError: the name is unknown, or the backend is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "hotcoco" and not has_hotcoco():
        raise ValueError(
            "backend 'hotcoco' is not installed: pip install hotcoco, or use backend='pycocotools'"
        )
    chosen = "hotcoco" if backend != "pycocotools" and has_hotcoco() else "pycocotools"
    log_first_n(logging.INFO, f"COCO evaluation uses {chosen}", key="message")
    return chosen


def evaluate(
    backend: str,
    task: str,
    ground_truth: dict[str, Any],
    detections: Detections,
    max_dets: int,
) -> Evaluation:
    """Run COCO's evaluation.

    Args:
        backend: as `resolve_backend` returns it. hotcoco rejects scores that are not numbers:
            pycocotools evaluates those.
        task: "bbox" or "segm".
        ground_truth: the content of a COCO json, as `GroundTruth.dataset` makes it: images,
            annotations and categories numbered from 1. pycocotools modifies it.
        detections: with masks for "segm"; may be empty.
        max_dets: number of detections per image and category that count.
    """
    if backend == "hotcoco" and detections.has_nan():
        logger.warning("Some scores are NaN: evaluated by pycocotools")
    elif backend == "hotcoco":
        evaluation = run_hotcoco(task, hotcoco_truth(ground_truth), detections, max_dets)
        evaluation.accumulate()
        return _accumulated(evaluation.eval, evaluation)
    return _run_pycocotools(task, ground_truth, detections, max_dets)


def hotcoco_truth(ground_truth: dict[str, Any]) -> Any:
    """The content of a COCO json as a ``hotcoco.COCO``, a copy."""
    import hotcoco

    return hotcoco.COCO(ground_truth)


def run_hotcoco(task: str, truth: Any, detections: Detections, max_dets: int) -> Any:
    """As `load_hotcoco`, after its ``evaluate``."""
    evaluation = load_hotcoco(task, truth, detections, max_dets)
    evaluation.evaluate()
    return evaluation


def load_hotcoco(task: str, truth: Any, detections: Detections, max_dets: int) -> Any:
    """A ``hotcoco.COCOeval``.

    Args:
        task, detections, max_dets: as in `evaluate`.
        truth: as `hotcoco_truth` returns it.
    """
    import hotcoco

    columns = [detections.images, detections.boxes, detections.scores, detections.classes + 1]
    rows = np.column_stack([np.asarray(column, np.float64) for column in columns])
    if task == "segm" and len(detections):
        found = truth.load_res(rows, segmentation=detections.masks)
        # Beside a box, COCO takes the size of that: here the size of a mask is its own.
        found.update_anns(ids=np.arange(1, len(detections) + 1), area=detections.areas)
    else:
        found = truth.load_res(rows)
    evaluation = hotcoco.COCOeval(truth, found, task)
    evaluation.params.max_dets = [max_dets]
    return evaluation


def _run_pycocotools(
    task: str, ground_truth: dict[str, Any], detections: Detections, max_dets: int
) -> Evaluation:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth, found = COCO(), COCO()
        truth.dataset = ground_truth
        truth.createIndex()
        if len(detections):
            found = truth.loadRes(detections.records())
        else:  # loadRes fails on an empty list
            found.dataset = {**ground_truth, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, task)
        evaluation.params.maxDets = [max_dets]
        evaluation.evaluate()
        evaluation.accumulate()
    return _accumulated(evaluation.eval)


def _accumulated(values: dict[str, Any], evaluation: Any = None) -> Evaluation:
    return Evaluation(
        precision=np.asarray(values["precision"])[..., 0],
        recall=np.asarray(values["recall"])[..., 0],
        scores=np.asarray(values["scores"])[..., 0],
        hotcoco=evaluation,
    )


def summarize(evaluation: Evaluation, names: list[str], max_dets: int) -> dict[str, float]:
    """COCO's summary of an evaluation, in percent; NaN where there is no ground truth.

    Args:
        evaluation: its numbers.
        names: the names of the classes, distinct.
        max_dets: number of detections per image and category that counted.

    Returns:
        "AP", "AP50", "AP75", "APs", "APm", "APl", "AR@<max_dets>" and an "AP-<name>" for each
        class.
    """
    precision, recall = evaluation.precision, evaluation.recall
    values = {
        "AP": precision[:, :, :, 0],
        "AP50": precision[0, :, :, 0],
        "AP75": precision[5, :, :, 0],
        "APs": precision[:, :, :, 1],
        "APm": precision[:, :, :, 2],
        "APl": precision[:, :, :, 3],
        f"AR@{max_dets}": recall[:, :, 0],
    }
    for index, name in enumerate(names):
        values[PER_CLASS_PREFIX + name] = precision[:, :, index, 0]
    return {name: percent(value) for name, value in values.items()}


def percent(values: np.ndarray) -> float:
    """The mean, in percent, of the values that are defined (not -1); NaN without any."""
    defined = values[values > -1]
    return float(defined.mean() * 100) if defined.size else math.nan
