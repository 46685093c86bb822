"""Images of a report: the worst and the best of an evaluation, and what cannot be drawn."""

import base64
import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import GenericMask
from html_pages import Page
from sample_runs import detection_metrics, write_lines

from crossmae_det.detection import COCOEvaluator, get_dataset_dicts, shapes
from crossmae_det.report.images import choose
from crossmae_det.report.page import write_run_page

IMAGES = 12


def noisy_detections(record, generator):
    """Detections that are right in some images and wrong in others."""
    annotations = record["annotations"]
    size = record["height"], record["width"]
    masks = [GenericMask(annotation["segmentation"], *size).mask for annotation in annotations]
    boxes = torch.tensor(
        [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    )
    classes = torch.tensor([annotation["category_id"] for annotation in annotations])
    quality = torch.rand(1, generator=generator)
    noise = torch.rand(len(classes), generator=generator)
    wrong = noise > quality
    return Instances(
        size,
        pred_boxes=Boxes(boxes + 4 * (torch.rand(boxes.shape, generator=generator) - 0.5)),
        pred_classes=torch.where(wrong, (classes + 1) % 3, classes),
        pred_masks=torch.from_numpy(np.stack(masks)).bool(),
        scores=(0.95 - 0.6 * noise).clamp(0.05, 0.99),
    )


def evaluate_noise(root, folder):
    """Write metrics and the results of COCO's evaluation of noisy detections."""
    data = shapes.build(root, num_train=1, num_val=IMAGES, image_size=96)
    dataset = f"{data}/annotations/instances_val.json:{data}/val"
    write_lines(folder, detection_metrics())
    evaluator = COCOEvaluator(dataset, output_dir=folder / "inference", distributed=False)
    generator = torch.Generator().manual_seed(3)
    for record in get_dataset_dicts(dataset, filter_empty=False):
        evaluator.process([record], [{"instances": noisy_detections(record, generator)}])
    evaluator.evaluate()
    return data


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluated")
    return evaluate_noise(root / "data", root / "run"), root / "run"


def page_of(folder):
    write_run_page(folder, folder / "report.html")
    return Page(folder / "report.html")


def test_worst_and_best_images_are_drawn_beside_the_truth(evaluated):
    _, folder = evaluated
    page = page_of(folder)
    analysis = json.loads((folder / "inference/results.json").read_text())["analysis"]["segm"]
    scores = sorted(image["f1"] for image in analysis["images"])
    shown = [float(text.split()[1]) for text in page.texts if text.startswith("F1 ")]
    assert shown[:6] == pytest.approx(scores[:6], abs=0.006)
    assert shown[6:] == pytest.approx(scores[:-5:-1], abs=0.006)
    drawings = page.having("img")
    assert len(drawings) == 20
    assert drawings[0]["alt"].startswith("ground truth of ")
    assert drawings[1]["alt"].startswith("predictions on ")
    for drawing in drawings:
        data = base64.b64decode(drawing["src"].removeprefix("data:image/jpeg;base64,"))
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert image.shape[:2] == (int(drawing["height"]), int(drawing["width"]))
        assert max(image.shape) == 420 and image.std() > 10
    assert (folder / "report.html").stat().st_size < 3e6


def test_the_analysis_of_an_evaluation_is_shown(evaluated):
    _, folder = evaluated
    page = page_of(folder)
    links = [a["href"] for a in page.having("a")]
    assert {"#errors", "#classes", "#images", "#data"} <= set(links)
    assert "cannot be made" not in page.text
    analysis = json.loads((folder / "inference/results.json").read_text())["analysis"]["segm"]
    matrix = analysis["confusion_matrix"]["matrix"]
    names = analysis["confusion_matrix"]["classes"]
    (row,) = (r for r in page.rows if r[0] == names[0] and len(r) == len(names) + 2)
    assert row[1:] == [str(value or "·") for value in matrix[0]]


def test_without_its_dataset_the_reason_is_given(evaluated, tmp_path):
    data, folder = evaluated
    results = (folder / "inference/results.json").read_text()
    write_lines(tmp_path, detection_metrics())
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference/results.json").write_text(results)
    page = page_of(tmp_path)
    assert not page.having("img") and "coco_instances_results.json is missing" in page.text
    (tmp_path / "inference/coco_instances_results.json").write_text("[]")
    moved = results.replace(str(data), str(data) + "_moved")
    (tmp_path / "inference/results.json").write_text(moved)
    page = page_of(tmp_path)
    assert not page.having("img") and "instances_val.json" in page.text
    assert "Total loss" in page.texts


def test_predictions_of_the_run_stand_in(tmp_path):
    write_lines(tmp_path, detection_metrics())
    cv2.imwrite(str(tmp_path / "predictions.png"), np.full((50, 80, 3), 90, np.uint8))
    (drawing,) = page_of(tmp_path).having("img")
    assert (drawing["width"], drawing["height"]) == ("80", "50")


def test_no_image_is_both_worst_and_best():
    images = [{"image_id": i, "f1": i / 10, "true_positives": i} for i in range(7)]
    worst, best = choose([*images, {"image_id": 99, "f1": None}])
    assert [image["image_id"] for image in worst] == [0, 1, 2, 3]
    assert [image["image_id"] for image in best] == [6, 5, 4]
    assert choose([]) == ([], [])
    worst, best = choose(images[:1])
    assert len(worst) == 1 and best == []
