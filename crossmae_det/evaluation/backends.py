"""COCO's evaluation by faster-coco-eval or by pycocotools.

Dimensions of the arrays that COCO's evaluation accumulates: T IoU thresholds (0.50 to 0.95),
R recall thresholds, K categories, A areas (all, small, medium, large).
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from crossmae_det.evaluation.results import PER_CLASS_PREFIX

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "faster-coco-eval", "pycocotools")


def resolve_backend(backend: str) -> str:
    """The backend that ``backend`` stands for; the choice is logged once.

    Args:
        backend: one of ``BACKENDS``.

    Returns:
        "faster-coco-eval" or "pycocotools".

    Raises:
        ValueError: the name is unknown, or the backend is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"COCO evaluation backend '{backend}' is unknown; it may be {', '.join(BACKENDS)}"
        )
    chosen = "pycocotools"
    if backend != "pycocotools":
        try:
            _classes("faster-coco-eval")
            chosen = "faster-coco-eval"
        except ImportError as error:
            if backend != "auto":
                raise ValueError(
                    f"COCO evaluation backend '{backend}' is not installed ({error}); "
                    f"pip install faster-coco-eval, or use backend='pycocotools'"
                ) from error
    _announce(chosen)
    return chosen


def accumulate(
    backend: str,
    task: str,
    ground_truth: dict[str, Any],
    detections: list[dict[str, Any]],
    max_dets: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Runs COCO's evaluation. Both arguments that hold annotations are written into.

    Args:
        backend: a backend as ``resolve_backend`` returns it.
        task: "bbox" or "segm".
        ground_truth: the content of a COCO annotation file: "images", "annotations", "categories".
        detections: in COCO's result format, for images of ``ground_truth``; may be empty.
        max_dets: how many detections of an image and category count.

    Returns:
        The precision (T, R, K, A) and the recall (T, K, A) in [0, 1], -1 where there is no ground
        truth; the categories by ascending id.
    """
    coco_class, evaluation_class = _classes(backend)
    # pycocotools prints its progress.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco_class()
        truth.dataset = ground_truth
        truth.createIndex()
        if detections:
            found = truth.loadRes(detections)
        else:
            # pycocotools cannot load an empty list.
            found = coco_class()
            found.dataset = {**ground_truth, "annotations": []}
            found.createIndex()
        evaluation = evaluation_class(truth, found, task)
        evaluation.params.maxDets = [max_dets]
        evaluation.evaluate()
        evaluation.accumulate()
    assert list(evaluation.params.areaRngLbl) == ["all", "small", "medium", "large"]
    # The last dimension is the limit on detections, of which there is one.
    precision = np.asarray(evaluation.eval["precision"])[..., 0]
    recall = np.asarray(evaluation.eval["recall"])[..., 0]
    return precision, recall


def metrics(
    precision: np.ndarray, recall: np.ndarray, class_names: Sequence[str], max_dets: int
) -> dict[str, float]:
    """COCO's metrics in percent, NaN where there is no ground truth.

    Args:
        precision: (T, R, K, A) as from ``accumulate``.
        recall: (T, K, A) as from ``accumulate``.
        class_names: K distinct names.
        max_dets: the limit that ``accumulate`` was given, for the name of the recall.

    Returns:
        "AP", "AP50", "AP75", "APs", "APm", "APl", "AR@<max_dets>" and an "AP-<name>" per class.
    """
    results = {
        "AP": _percent(precision[:, :, :, 0]),
        "AP50": _percent(precision[0, :, :, 0]),
        "AP75": _percent(precision[5, :, :, 0]),
        "APs": _percent(precision[:, :, :, 1]),
        "APm": _percent(precision[:, :, :, 2]),
        "APl": _percent(precision[:, :, :, 3]),
        f"AR@{max_dets}": _percent(recall[:, :, 0]),
    }
    for index, name in enumerate(class_names):
        results[PER_CLASS_PREFIX + name] = _percent(precision[:, :, index, 0])
    return results


@functools.cache
def _announce(backend: str) -> None:
    logger.info("COCO evaluation uses %s.", backend)


def _classes(backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if backend == "faster-coco-eval":
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, functools.partial(COCOeval_faster, print_function=logger.debug)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval


def _percent(values: np.ndarray) -> float:
    valid = values[values > -1]
    return float(valid.mean() * 100) if valid.size else float("nan")
