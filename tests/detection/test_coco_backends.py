"""hotcoco gives the precision, recall and scores of pycocotools, without tolerance."""

import copy
import json
import logging

import numpy as np
import pycocotools.mask as mask_util
import pytest

from crossmae_det.detection.coco_backends import evaluate
from crossmae_det.detection.detections import Detections

CASES = 150


class RandomCase:
    """A few small images with random objects and detections; what is rare in COCO is frequent here.

    Attributes:
        truth: the content of a COCO json, with ids from 1.
        boxes, masks: the same detections for both tasks.
        max_dets: the limit of the evaluation.
    """

    def __init__(self, seed):
        self.rng = rng = np.random.default_rng(seed)
        self.classes = int(rng.integers(1, 5))
        self.whole = rng.random() < 0.5  # whole pixels: equal IoUs
        self.levels = int(rng.choice([2, 5, 2**20]))  # of scores: few give ties
        self.max_dets = int(rng.choice([100, 100, 1, 3, 10]))
        annotated = int(rng.integers(1, self.classes + 1))  # the other classes have no objects
        images, annotations, rows = [], [], []
        for image_id in range(1, int(rng.integers(2, 6))):
            h, w = (int(v) for v in rng.integers(12, rng.choice([30, 70, 140]), 2))
            name = f"{image_id}.jpg"
            images.append({"id": image_id, "file_name": name, "height": h, "width": w})
            objects = []
            for _ in range(rng.choice([0, 1, 3, 8])):
                repeated = objects and rng.random() < 0.2
                box = objects[-1][0] if repeated else self.box(h, w)
                objects.append((box, int(rng.integers(annotated))))
                annotations.append(self.annotation(image_id, *objects[-1], h, w))
                annotations[-1]["id"] = len(annotations)
            for _ in range(rng.choice([0, 2, 10, 30, 130], p=[0.15, 0.2, 0.3, 0.3, 0.05])):
                rows.append((image_id, *self.detection(objects, h, w)))
        names = [f"class {k}" for k in range(self.classes)]
        self.truth = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": k, "name": name} for k, name in enumerate(names, start=1)],
        }
        numbers, boxes, scores, classes, masks = zip(*rows, strict=True) if rows else [()] * 5
        columns = (
            np.array(numbers, np.int64),
            np.array(boxes, np.float64).reshape(-1, 4),
            np.array(scores, np.float64),
            np.array(classes, np.int64),
        )
        areas = np.array([mask_util.area(mask) for mask in masks], np.float64)
        self.boxes = Detections(*columns)
        self.masks = Detections(*columns, list(masks), areas)

    def box(self, height, width):
        rng = self.rng
        w, h = rng.uniform(1, width), rng.uniform(1, height)
        if rng.random() < 0.1:  # exactly between small and medium
            w = h = 32
        box = np.array(
            [rng.uniform(0, max(width - w, 1)), rng.uniform(0, max(height - h, 1)), w, h]
        )
        return np.round(box) if self.whole else box

    def annotation(self, image_id, box, category, height, width):
        rng = self.rng
        x, y, w, h = box.tolist()
        crowd = rng.random() < 0.2
        polygons = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        if rng.random() < 0.3:
            polygons.append([x, y, x + w / 2, y, x, y + h / 2])
        as_polygons = rng.random() < (0.1 if crowd else 0.6)
        area = float(rng.choice([1024, 9216, 5000, 100])) if rng.random() < 0.3 else w * h
        stated = rng.uniform(-9, 50, 4).tolist() if rng.random() < 0.1 else [x, y, w, h]
        return {
            "image_id": image_id,
            "category_id": category + 1,
            "bbox": stated,
            "area": area,
            "iscrowd": int(crowd),
            "segmentation": polygons if as_polygons else self.mask(box, height, width),
        }

    def detection(self, objects, height, width):
        """Box, score, class, mask: some equal to an object, some of negative size or outside."""
        rng = self.rng
        if objects and rng.random() < 0.7:
            box, category = objects[rng.integers(len(objects))]
            if rng.random() < 0.7:
                box = box + rng.normal(0, 2, 4)
            if rng.random() < 0.2:
                category = int(rng.integers(self.classes))
        else:
            box, category = self.box(height, width), int(rng.integers(self.classes))
        mask = self.mask(box, height, width)
        if rng.random() < 0.05:
            box = rng.uniform(-100, 100, 4)
        score = rng.integers(self.levels) / self.levels
        if rng.random() < 0.02:
            score = rng.choice([-np.inf, np.inf, -0.5, 7.0])
        return np.float32(box), score, category, mask

    def mask(self, box, height, width):
        mask = np.zeros((height, width), np.uint8)
        x, y, w, h = box
        mask[max(int(y), 0) : max(int(y + h), 0), max(int(x), 0) : max(int(x + w), 0)] = 1
        if self.rng.random() < 0.3:
            mask &= self.rng.random((height, width)) < 0.7
        encoded = mask_util.encode(np.asfortranarray(mask))
        return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def test_equals_pycocotools_without_tolerance():
    seen = {"crowd": 0, "many": 0, "empty": 0, "tied": 0, "without objects": 0, "between": 0}
    for seed in range(CASES):
        case = RandomCase(seed)
        for task, found in (("bbox", case.boxes), ("segm", case.masks)):
            settings = (task, copy.deepcopy(case.truth), found, case.max_dets)
            expected = evaluate("pycocotools", *copy.deepcopy(settings))
            measured = evaluate("hotcoco", *settings)
            for name in ("precision", "recall", "scores"):
                message = f"seed {seed}, {task}: {name}"
                np.testing.assert_array_equal(
                    getattr(measured, name), getattr(expected, name), message
                )
            seen["between"] += 0 < expected.precision[..., 0].max(initial=0) <= 1
        per_image = np.bincount(case.boxes.images, minlength=2)
        seen["crowd"] += any(a["iscrowd"] for a in case.truth["annotations"])
        seen["many"] += per_image.max() > 100
        seen["empty"] += not per_image[1:].all()
        seen["tied"] += len(np.unique(case.boxes.scores)) < len(case.boxes)
        seen["without objects"] += len({a["category_id"] for a in case.truth["annotations"]}) < (
            case.classes
        )
    assert min(seen.values()) > 5, seen


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_real_annotations_give_equal_numbers(shared_data, task):
    path = shared_data / "coco" / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    images = content["images"][:20]
    number = {image["id"]: i for i, image in enumerate(images, start=1)}
    size = {image["id"]: (image["height"], image["width"]) for image in images}
    category = {entry["id"]: k for k, entry in enumerate(content["categories"], start=1)}
    truth, found = [], []
    rng = np.random.default_rng(0)
    for annotation in content["annotations"]:
        if annotation["image_id"] not in number:
            continue
        made = {"image_id": number[annotation["image_id"]], "id": len(truth) + 1}
        truth.append({**annotation, **made, "category_id": category[annotation["category_id"]]})
        mask = annotation["segmentation"]
        if isinstance(mask, list):
            mask = mask_util.merge(mask_util.frPyObjects(mask, *size[annotation["image_id"]]))
            box = annotation["bbox"] + rng.normal(0, 3, 4)
            found.append((made["image_id"], box, rng.integers(9) / 9, truth[-1], mask))
    detections = Detections(
        images=np.array([entry[0] for entry in found]),
        boxes=np.array([entry[1] for entry in found]),
        scores=np.array([entry[2] for entry in found]),
        classes=np.array([entry[3]["category_id"] - 1 for entry in found]),
        masks=[entry[4] for entry in found] if task == "segm" else None,
        areas=np.array([mask_util.area(entry[4]) for entry in found], np.float64),
    )
    ground_truth = {
        "images": [{**image, "id": number[image["id"]]} for image in images],
        "annotations": truth,
        "categories": [{"id": k, "name": str(k)} for k in category.values()],
    }
    expected = evaluate("pycocotools", task, copy.deepcopy(ground_truth), detections, 100)
    measured = evaluate("hotcoco", task, ground_truth, detections, 100)
    np.testing.assert_array_equal(measured.precision, expected.precision)
    np.testing.assert_array_equal(measured.recall, expected.recall)
    assert expected.recall[0].max() > 0.5


def test_scores_that_are_not_numbers_are_evaluated_by_pycocotools(caplog):
    case = RandomCase(3)
    assert len(case.boxes) > 1
    case.boxes.scores[0] = np.nan
    with caplog.at_level(logging.WARNING):
        measured = evaluate("hotcoco", "bbox", copy.deepcopy(case.truth), case.boxes, 100)
    assert "NaN" in caplog.text and measured.hotcoco is None
    expected = evaluate("pycocotools", "bbox", copy.deepcopy(case.truth), case.boxes, 100)
    np.testing.assert_array_equal(measured.precision, expected.precision)
