"""What an AP is made of: error types, confusions, curves, calibration, and the images behind them.

hotcoco computes it from the same matches as the AP. Numbers called AP are in percent, all others
are fractions in [0, 1] or counts.

Legend: K classes, T IoU thresholds, R recall thresholds, A areas.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crossmae_det.detection.coco_backends import (
    Evaluation,
    hotcoco_truth,
    load_hotcoco,
    percent,
    run_hotcoco,
)
from crossmae_det.detection.detections import Detections

IOU_THRESHOLD = 0.5
# Detections that count as such in the confusion matrix and per image: what `predict` draws.
SCORE_THRESHOLD = 0.5
BINS = 10
# Images with the lowest and with the highest F1 that are listed, each.
LISTED_IMAGES = 50
# A matrix of more classes is not readable, and takes megabytes.
LARGEST_MATRIX = 300

ERROR_TYPES = {
    "Cls": "classification",
    "Loc": "localization",
    "Both": "both",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed",
    "FP": "false_positives",
    "FN": "false_negatives",
}


def analyze(
    task: str,
    evaluation: Evaluation,
    ground_truth: dict[str, Any],
    detections: Detections,
    *,
    image_ids: Sequence[int | str],
    max_dets: int,
) -> dict[str, Any]:
    """Explain an evaluation. Needs hotcoco.

    Args:
        task: "bbox" or "segm".
        evaluation: the numbers to explain.
        ground_truth: as in `coco_backends.evaluate`, before pycocotools modified it.
        detections: as in `coco_backends.evaluate`; scores in [0, 1].
        image_ids: the id of each image in the dataset, in the order of their numbers.
        max_dets: number of detections per image and class that count.

    Returns:
        - "per_class": name -> "AP", "AP50", "AP75", "AR" (percent, NaN without ground truth), and
            the number of "images" with the class, of its "annotations" (without crowd regions) and
            of its "detections".
        - "tide": the error types of TIDE (Bolya et al., 2020) at an IoU of 0.5: "base_ap50", and
            for each type the AP50 that its errors cost ("delta_ap") and their number ("counts").
        - "precision_recall": the precision at 101 values of recall, of "all" classes and of each
            class by its name; None for a class without ground truth.
        - "calibration": confidence and precision in bins of the score.
        - "confusion_matrix": rows are true classes, columns predicted ones, the last row and
            column are background; of detections with a score of at least 0.5. None if there are
            more than 300 classes.
        - "images": the images with the lowest and the highest F1 at a score of 0.5, worst first,
            each with its AP50 as a fraction ("score"). Images without objects and without such
            detections are left out.
    """
    names = [category["name"] for category in ground_truth["categories"]]
    full = evaluation.hotcoco
    if full is None:
        full = run_hotcoco(task, hotcoco_truth(ground_truth), detections, max_dets)
    truth = full.coco_gt
    sure = detections.select(detections.scores >= SCORE_THRESHOLD)
    diagnostics = run_hotcoco(task, truth, sure, max_dets).image_diagnostics(iou_thr=IOU_THRESHOLD)
    return {
        "per_class": _per_class(evaluation, ground_truth, detections, names),
        "tide": _tide(full),
        "precision_recall": _precision_recall(evaluation, names),
        "calibration": _calibration(full, detections.scores),
        "confusion_matrix": _confusion_matrix(task, truth, sure, diagnostics, names, max_dets),
        "images": _images(diagnostics, ground_truth["images"], image_ids),
    }


def _per_class(
    evaluation: Evaluation,
    ground_truth: Mapping[str, Any],
    detections: Detections,
    names: Sequence[str],
) -> dict[str, dict[str, float | int]]:
    objects = [a for a in ground_truth["annotations"] if not a["iscrowd"]]
    classes = np.array([a["category_id"] for a in objects], np.int64) - 1
    pairs = {(a["image_id"], a["category_id"]) for a in objects}
    images = np.array([category for _, category in pairs], np.int64) - 1
    counts = {
        "images": np.bincount(images, minlength=len(names)),
        "annotations": np.bincount(classes, minlength=len(names)),
        "detections": np.bincount(detections.classes, minlength=len(names)),
    }
    precision, recall = evaluation.precision[..., 0], evaluation.recall[..., 0]
    return {
        name: {
            "AP": percent(precision[:, :, k]),
            "AP50": percent(precision[0, :, k]),
            "AP75": percent(precision[5, :, k]),
            "AR": percent(recall[:, k]),
            **{key: int(values[k]) for key, values in counts.items()},
        }
        for k, name in enumerate(names)
    }


def _tide(evaluation: Any) -> dict[str, Any]:
    errors = evaluation.tide_errors(pos_thr=IOU_THRESHOLD)
    delta, counts = errors["delta_ap"], errors["counts"]
    return {
        "iou_threshold": IOU_THRESHOLD,
        "base_ap50": errors["ap_base"] * 100,
        "delta_ap": {name: delta[key] * 100 for key, name in ERROR_TYPES.items()},
        "counts": {name: counts[key] for key, name in ERROR_TYPES.items() if key in counts},
    }


def _precision_recall(evaluation: Evaluation, names: Sequence[str]) -> dict[str, Any]:
    curves = evaluation.precision[0, :, :, 0]  # (R, K)
    defined = np.all(curves > -1, axis=0)
    rounded = np.round(curves, 4)
    overall = np.round(curves[:, defined].mean(axis=1), 4).tolist() if defined.any() else None
    by_class = {
        f"{name} (class)" if name == "all" else name: rounded[:, k].tolist() if defined[k] else None
        for k, name in enumerate(names)
    }
    return {
        "iou_threshold": IOU_THRESHOLD,
        "recall": np.round(np.linspace(0, 1, len(curves)), 2).tolist(),
        "precision": {"all": overall, **by_class},
    }


def _calibration(evaluation: Any, scores: np.ndarray) -> dict[str, Any] | None:
    if np.any((scores < 0) | (scores > 1)):
        return None
    found = evaluation.calibration(n_bins=BINS, iou_threshold=IOU_THRESHOLD)
    return {
        "iou_threshold": IOU_THRESHOLD,
        "bins": [
            {
                "low": entry["bin_lower"],
                "high": entry["bin_upper"],
                "confidence": entry["avg_confidence"],
                "accuracy": entry["avg_accuracy"],
                "count": entry["count"],
            }
            for entry in found["bins"]
        ],
        "expected_calibration_error": found["ece"],
        "maximum_calibration_error": found["mce"],
    }


def _confusion_matrix(
    task: str,
    truth: Any,
    detections: Detections,
    diagnostics: Mapping[str, Any],
    names: Sequence[str],
    max_dets: int,
) -> dict[str, Any] | None:
    if len(names) > LARGEST_MATRIX:
        return None
    # Detections in crowd regions have no status: COCO ignores them, the matrix would not.
    counted = np.zeros(len(detections), bool)
    counted[np.array(list(diagnostics["dt_status"]), np.int64) - 1] = True
    counted_only = detections.select(counted)
    evaluation = load_hotcoco(task, truth, counted_only, max_dets)
    # Without a limit of its own: that of COCO is for each class, this would be for each image.
    found = evaluation.confusion_matrix(iou_thr=IOU_THRESHOLD, max_det=len(detections))
    assert found["cat_ids"] == list(range(1, len(names) + 1))
    return {
        "iou_threshold": IOU_THRESHOLD,
        "score_threshold": SCORE_THRESHOLD,
        "classes": list(names),
        "matrix": found["matrix"].tolist(),
    }


def _images(
    diagnostics: Mapping[str, Any],
    images: Sequence[Mapping[str, Any]],
    image_ids: Sequence[int | str],
) -> list[dict[str, Any]]:
    summary = diagnostics["img_summary"]
    rows = []
    for image in images:
        values = summary.get(image["id"])
        if values is None or not values["tp"] + values["fp"] + values["fn"]:
            continue
        rows.append(
            {
                "image_id": image_ids[image["id"] - 1],
                "file_name": image["file_name"],
                "f1": values["f1"],
                "true_positives": values["tp"],
                "false_positives": values["fp"],
                "false_negatives": values["fn"],
                "score": values["ap"],
            }
        )
    rows.sort(key=lambda r: (r["f1"], -r["false_positives"] - r["false_negatives"]))
    if len(rows) <= 2 * LISTED_IMAGES:
        return rows
    return rows[:LISTED_IMAGES] + rows[-LISTED_IMAGES:]
