"""The analysis of an AP against scenes with one error of each kind."""

import copy

import numpy as np
import pycocotools.mask as mask_util
import pytest

from crossmae_det.detection import error_analysis
from crossmae_det.detection.coco_backends import evaluate, summarize
from crossmae_det.detection.detections import Detections
from crossmae_det.detection.error_analysis import analyze

A, B = 0, 1
SIDE = 200
NAMES = ["A", "B", "all"]
# Class, x, y, width, height, crowd.
OBJECTS = {
    "found": (A, 0, 0, 20, 20, 0),
    "badly found": (A, 50, 0, 20, 20, 0),
    "of class B": (B, 100, 0, 20, 20, 0),
    "missed": (A, 0, 100, 20, 20, 0),
    "crowd": (A, 150, 150, 50, 50, 1),
}
# Class, x, y, width, height, score. 10 pixels beside: an IoU of a third.
FOUND = {
    "right": (A, 0, 0, 20, 20, 0.95),
    "duplicate": (A, 1, 0, 20, 20, 0.92),
    "localization": (A, 60, 0, 20, 20, 0.85),
    "classification": (A, 100, 0, 20, 20, 0.75),
    "both": (A, 110, 0, 20, 20, 0.65),
    "background": (A, 150, 60, 20, 20, 0.55),
    "in the crowd": (A, 160, 160, 20, 20, 0.98),
    "unsure": (B, 0, 150, 20, 20, 0.05),
}


def run_lengths(x, y, w, h):
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    return mask_util.encode(mask)


def truth_of(objects):
    annotations = [
        {
            "id": number,
            "image_id": 1,
            "category_id": category + 1,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": crowd,
            "segmentation": run_lengths(*box),
        }
        for number, (category, *box, crowd) in enumerate(objects, start=1)
    ]
    sizes = {"height": SIDE, "width": SIDE}
    images = [{"id": i, "file_name": f"{i}.jpg", **sizes} for i in (1, 2)]
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def detections_of(found, task="bbox"):
    masks = [run_lengths(*box) for _, *box, _ in found] if task == "segm" else None
    return Detections(
        images=np.ones(len(found), np.int64),
        boxes=np.array([box for _, *box, _ in found], np.float64).reshape(-1, 4),
        scores=np.array([entry[-1] for entry in found], np.float64),
        classes=np.array([entry[0] for entry in found], np.int64),
        masks=masks,
        areas=np.array([400.0] * len(found)),
    )


def analysis_of(objects=OBJECTS, found=FOUND, task="bbox", backend="hotcoco", max_dets=100):
    truth = truth_of(objects.values())
    detections = detections_of(found.values(), task)
    evaluation = evaluate(backend, task, copy.deepcopy(truth), detections, max_dets)
    return analyze(
        task, evaluation, truth, detections, image_ids=["first", "second"], max_dets=max_dets
    )


def ap50(objects, found):
    truth, detections = truth_of(objects.values()), detections_of(found.values())
    return summarize(evaluate("pycocotools", "bbox", truth, detections, 100), NAMES, 100)["AP50"]


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_counts_one_error_of_each_type(task):
    tide = analysis_of(task=task)["tide"]
    assert tide["counts"] == {
        "classification": 1,
        "localization": 1,
        "both": 1,
        "duplicate": 1,
        "background": 2,
        "missed": 1,
    }


def test_an_error_costs_the_ap50_that_its_correction_brings():
    tide = analysis_of()["tide"]
    base = ap50(OBJECTS, FOUND)
    assert tide["base_ap50"] == pytest.approx(base) and 0 < base < 50

    def without(*names):
        return {name: values for name, values in FOUND.items() if name not in names}

    corrected = {
        "classification": (OBJECTS, {**FOUND, "classification": (B, *FOUND["classification"][1:])}),
        "localization": (OBJECTS, {**FOUND, "localization": (A, 50, 0, 20, 20, 0.85)}),
        "both": (OBJECTS, without("both")),
        "duplicate": (OBJECTS, without("duplicate")),
        "background": (OBJECTS, without("background", "unsure")),
        "missed": ({k: v for k, v in OBJECTS.items() if k != "missed"}, FOUND),
        "false_positives": (OBJECTS, {k: FOUND[k] for k in ("right", "in the crowd")}),
    }
    for name, scene in corrected.items():
        assert tide["delta_ap"][name] == pytest.approx(ap50(*scene) - base), name
        assert tide["delta_ap"][name] >= 0
    assert tide["delta_ap"]["localization"] > 1 and tide["delta_ap"]["missed"] > 1
    assert tide["delta_ap"]["false_negatives"] > tide["delta_ap"]["missed"]


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_confusions_have_true_classes_in_rows_and_background_last(task):
    """Of sure detections; what lies in a crowd region is neither right nor wrong."""
    matrix = analysis_of(task=task)["confusion_matrix"]
    assert matrix["classes"] == NAMES
    assert matrix["matrix"] == [
        [1, 0, 0, 2],
        [1, 0, 0, 0],
        [0, 0, 0, 0],
        [4, 0, 0, 0],
    ]


def test_no_matrix_of_very_many_classes(monkeypatch):
    monkeypatch.setattr(error_analysis, "LARGEST_MATRIX", 2)
    assert analysis_of()["confusion_matrix"] is None


def test_a_low_limit_on_detections_is_that_of_each_class():
    """With one detection per image and class, only that in the crowd counts, and that of B."""
    found = {**FOUND, "other": (B, 100, 0, 20, 20, 0.9)}
    analysis = analysis_of(found=found, max_dets=1)
    assert analysis["confusion_matrix"]["matrix"][B] == [0, 1, 0, 0]
    assert analysis["images"][0]["true_positives"] == 1


def test_calibration_compares_scores_with_precision():
    calibration = analysis_of()["calibration"]
    bins = {round(entry["low"], 1): entry for entry in calibration["bins"]}
    assert len(bins) == 10
    expected = {0.0: (1, 0.05, 0), 0.5: (1, 0.55, 0), 0.6: (1, 0.65, 0), 0.7: (1, 0.75, 0)}
    expected |= {0.8: (1, 0.85, 0), 0.9: (2, 0.935, 0.5)}
    for low, entry in bins.items():
        assert entry["high"] == pytest.approx(low + 0.1)
        count, confidence, accuracy = expected.get(low, (0, 0, 0))
        assert entry["count"] == count
        if count:
            assert entry["confidence"] == pytest.approx(confidence)
            assert entry["accuracy"] == pytest.approx(accuracy)
    errors = [0.05, 0.55, 0.65, 0.75, 0.85, 0.435]
    counts = [1, 1, 1, 1, 1, 2]
    assert calibration["expected_calibration_error"] == pytest.approx(np.dot(errors, counts) / 7)
    assert calibration["maximum_calibration_error"] == pytest.approx(0.85)


def test_no_calibration_of_scores_outside_of_0_to_1():
    assert analysis_of(found={**FOUND, "logit": (A, 0, 0, 9, 9, 3.5)})["calibration"] is None


def test_classes_and_curves():
    analysis = analysis_of()
    rows = analysis["per_class"]
    assert list(rows) == NAMES
    assert [rows["A"][key] for key in ("images", "annotations", "detections")] == [1, 3, 7]
    assert [rows["B"][key] for key in ("images", "annotations", "detections")] == [1, 1, 1]
    assert rows["B"]["AP"] == rows["B"]["AR"] == 0 and np.isnan(rows["all"]["AP"])
    # One of three objects is found, with the highest score: a third of the recalls has precision 1.
    assert rows["A"]["AP50"] == pytest.approx(100 * 34 / 101)
    assert rows["A"]["AR"] == pytest.approx(100 / 3)
    curves = analysis["precision_recall"]
    assert len(curves["recall"]) == 101 and curves["recall"][34] == 0.34
    assert curves["precision"]["A"] == [1] * 34 + [0] * 67
    assert curves["precision"]["B"] == [0] * 101
    assert curves["precision"]["all"] == [0.5] * 34 + [0] * 67  # of the classes with objects
    assert curves["precision"]["all (class)"] is None


def test_images_are_listed_with_their_errors():
    (image,) = analysis_of()["images"]  # the second one is empty
    assert image["image_id"] == "first" and image["file_name"] == "1.jpg"
    counts = ("true_positives", "false_positives", "false_negatives")
    assert [image[key] for key in counts] == [1, 5, 3]
    assert image["f1"] == pytest.approx(2 / (2 + 5 + 3))
    assert 0 <= image["score"] <= 1


def test_only_the_worst_and_the_best_of_many_images_are_listed(monkeypatch):
    monkeypatch.setattr(error_analysis, "LISTED_IMAGES", 2)
    summary = {
        number: {"tp": number, "fp": 10 - number, "fn": 0, "f1": number / 10, "ap": 0.5}
        for number in range(1, 10)
    }
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(1, 11)]
    rows = error_analysis._images({"img_summary": summary}, images, list(range(10, 0, -1)))
    assert [row["image_id"] for row in rows] == [10, 9, 3, 2]


@pytest.mark.parametrize("found", [FOUND, {}], ids=["some", "none"])
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_the_analysis_does_not_depend_on_the_backend(task, found):
    ours = analysis_of(found=found, task=task)
    other = analysis_of(found=found, task=task, backend="pycocotools")
    np.testing.assert_equal(ours, other)
    assert ours["tide"]["counts"]["missed"] == (1 if found else 4)
