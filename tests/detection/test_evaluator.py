"""COCO evaluation: values, backends, subsets, results files and tables."""

import contextlib
import io
import json
import logging
import math
import os
import sys
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detections import (
    CATEGORY_IDS,
    HEIGHT,
    WIDTH,
    assert_same,
    both_backends,
    instances,
    make_dataset,
    perturbed,
    rectangle,
    run,
)
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator as Detectron2COCOEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm, logger
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from crossmae_det.detection import COCOEvaluator, format_table, write_results
from crossmae_det.detection.evaluation_results import format_per_class

SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def direct_stats(json_file, results_file, task, image_ids):
    """COCO's evaluation with pycocotools alone."""
    detections = json.loads(Path(results_file).read_text())
    if task == "segm":
        detections = [{k: v for k, v in d.items() if k != "bbox"} for d in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(json_file)
        evaluation = COCOeval(truth, truth.loadRes(detections), task)
        evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats * 100


@both_backends
def test_equals_pycocotools_used_directly(register_json, tmp_path, backend):
    name = register_json(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    results = run(name, inputs, outputs, output_dir=str(tmp_path), backend=backend)
    assert set(results) == {"bbox", "segm"}
    for task, values in results.items():
        stats = direct_stats(
            MetadataCatalog.get(name).json_file,
            tmp_path / "coco_instances_results.json",
            task,
            [record["image_id"] for record in inputs],
        )
        expected = [*stats[:6], stats[8]]
        measured = [values[key] for key in (*SUMMARY, "AR@100")]
        np.testing.assert_allclose(measured, np.where(np.array(expected) < 0, np.nan, expected))
        assert 5 < values["AP"] < 95


def test_backends_agree_on_random_detections(register_json):
    for seed in range(3):
        name = register_json(make_dataset(seed), f"test_coco_evaluation_{seed}")
        inputs, outputs = perturbed(DatasetCatalog.get(name), seed)
        fast = run(name, inputs, outputs, backend="hotcoco")
        assert_same(fast, run(name, inputs, outputs, backend="pycocotools"))
        assert fast["segm"]["AP-class3"] > 0


def test_backends_agree_on_real_annotations(register_json, shared_data):
    json_file = shared_data / "coco" / "annotations" / "instances_val2017.json"
    content = json.loads(json_file.read_text())
    content["images"] = content["images"][:25]
    wanted = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in wanted]
    name = register_json(content, "test_coco_evaluation_real")
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    fast = run(name, inputs, outputs, backend="hotcoco")
    assert_same(fast, run(name, inputs, outputs, backend="pycocotools"))
    assert 10 < fast["bbox"]["AP"] < 90


@both_backends
def test_a_subset_counts_only_its_own_images(register_json, tmp_path, backend):
    name = register_json(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    subset = run(name, inputs[:3], outputs[:3], output_dir=str(tmp_path), backend=backend)
    stats = direct_stats(
        MetadataCatalog.get(name).json_file,
        tmp_path / "coco_instances_results.json",
        "bbox",
        [record["image_id"] for record in inputs[:3]],
    )
    assert subset["bbox"]["AP"] == pytest.approx(stats[0])
    assert subset["bbox"]["AP"] != pytest.approx(run(name, inputs, outputs)["bbox"]["AP"])


@both_backends
def test_requested_images_without_detections_lower_the_score(register_json, backend):
    name = register_json(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    evaluator = COCOEvaluator(name, backend=backend)
    evaluator.process(inputs[:3], outputs[:3])
    some = evaluator.evaluate()["bbox"]["AR@100"]
    assert evaluator.evaluate([r["image_id"] for r in inputs])["bbox"]["AR@100"] < some
    assert evaluator.evaluate()["bbox"]["AR@100"] == some


@both_backends
def test_the_size_of_a_mask_is_its_own_and_not_that_of_its_box(register_json, backend):
    """A false positive of 800 pixels in a box of 1600 counts among the small masks (below 1024)."""
    content = make_dataset()
    content["images"] = content["images"][:1]
    truth = {"id": 1, "image_id": 10, "category_id": 3, "bbox": [5, 5, 40, 40], "area": 800}
    truth |= {"iscrowd": 0, "segmentation": [[5, 5, 45, 5, 5, 45]]}
    content["annotations"] = [truth]
    name = register_json(content)
    triangle = mask_util.decode(mask_util.frPyObjects(truth["segmentation"], HEIGHT, WIDTH))[..., 0]
    found = instances(
        [[5, 5, 45, 45], [65, 45, 105, 85]],
        [0.5, 0.9],
        [0, 0],
        [triangle, np.roll(triangle, (40, 60), (0, 1))],
    )
    results = run(name, DatasetCatalog.get(name), [{"instances": found}], backend=backend)
    assert results["segm"]["APs"] == pytest.approx(50)
    assert results["segm"]["AP"] == pytest.approx(50)
    assert np.isnan(results["segm"]["APm"])


@both_backends
def test_no_detection_at_all_scores_zero(register_json, tmp_path, backend):
    name = register_json(make_dataset())
    inputs = DatasetCatalog.get(name)
    outputs = [{"instances": instances([], [], [], masks=[])} for _ in inputs]
    results = run(name, inputs, outputs, output_dir=str(tmp_path), backend=backend)
    for task in ("bbox", "segm"):
        assert results[task]["AP"] == 0
        assert results[task]["AP-class3"] == 0
        assert np.isnan(results[task]["AP-class9"])
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == []


def test_perfect_detections_score_100(register_json):
    name = register_json(make_dataset())
    inputs = DatasetCatalog.get(name)
    outputs = []
    for record in inputs:
        objects = [a for a in record["annotations"] if not a["iscrowd"]]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in objects)]
        masks = [rectangle(*a["bbox"]) for a in objects]
        classes = [a["category_id"] for a in objects]
        outputs.append({"instances": instances(corners, [0.9] * len(objects), classes, masks)})
    results = run(name, inputs, outputs)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)


def test_writes_only_plain_coco_results(register_json, tmp_path):
    name = register_json(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    folder = tmp_path / "inference"
    run(name, inputs, outputs, output_dir=str(folder))
    assert sorted(path.name for path in folder.iterdir()) == [
        "coco_instances_results.json",
        "results.json",
    ]
    detections = json.loads((folder / "coco_instances_results.json").read_text())
    assert len(detections) == sum(len(output["instances"]) for output in outputs)
    assert {d["category_id"] for d in detections} <= set(CATEGORY_IDS)
    first = outputs[0]["instances"]
    x0, y0, x1, y1 = first.pred_boxes.tensor[0].tolist()
    np.testing.assert_allclose(detections[0]["bbox"], [x0, y0, x1 - x0, y1 - y0], rtol=1e-5)
    np.testing.assert_array_equal(
        mask_util.decode(detections[0]["segmentation"]).astype(bool), first.pred_masks[0].numpy()
    )


def test_repeated_images_and_repeated_evaluation_change_nothing(register_json):
    name = register_json(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    expected = run(name, inputs, outputs)
    evaluator = COCOEvaluator(name)
    evaluator.process(inputs, outputs)
    evaluator.process(inputs[:2], outputs[:2])
    assert_same(evaluator.evaluate(), expected)
    assert_same(evaluator.evaluate(), expected)
    evaluator.reset()
    assert evaluator.evaluate() == {}


def test_gathers_the_detections_of_all_processes(register_json, monkeypatch):
    name = register_json(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    expected = run(name, inputs, outputs)
    other = COCOEvaluator(name)
    other.process(inputs[4:], outputs[4:])
    monkeypatch.setattr(comm, "gather", lambda own, dst: [own, other._predictions])
    assert_same(run(name, inputs[:4], outputs[:4]), expected)
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert run(name, inputs[:4], outputs[:4]) == {}


@both_backends
def test_limit_on_detections(register_json, backend):
    name = register_json(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    limited = run(name, inputs, outputs, max_dets_per_image=1, backend=backend)["bbox"]
    best = []
    for output in outputs:
        found = output["instances"]
        keep = [
            int(torch.where(found.pred_classes == c, found.scores, -1.0).argmax())
            for c in found.pred_classes.unique()
        ]
        best.append({"instances": found[torch.tensor(keep)]})
    expected = run(name, inputs, best, backend="pycocotools")["bbox"]
    assert limited["AP"] == pytest.approx(expected["AP"])
    assert limited["AR@1"] == pytest.approx(expected["AR@100"])
    with pytest.raises(ValueError, match="max_dets_per_image must be a positive integer, not 0"):
        COCOEvaluator(name, max_dets_per_image=0)


def test_proposals(register_json, tmp_path):
    """Recall of proposals, equal to that of detectron2's evaluator."""
    name = register_json(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    for output in outputs:
        found = output.pop("instances")
        proposals = Instances(found.image_size, proposal_boxes=found.pred_boxes)
        proposals.objectness_logits = found.scores
        output["proposals"] = proposals
    results = run(name, inputs, outputs, output_dir=str(tmp_path / "ours"))
    expected = Detectron2COCOEvaluator(name, output_dir=str(tmp_path), use_fast_impl=False)
    expected.reset()
    expected.process(inputs, outputs)
    assert_same(results, expected.evaluate())
    assert 0 < results["box_proposals"]["AR@100"] < 100
    assert (tmp_path / "ours" / "box_proposals.pkl").is_file()


def test_bfloat16_scores(register_json):
    name = register_json(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    expected = run(name, inputs, outputs)
    for output in outputs:
        output["instances"].scores = output["instances"].scores.bfloat16()
    assert run(name, inputs, outputs)["bbox"]["AP50"] == pytest.approx(
        expected["bbox"]["AP50"], 0.2
    )


def test_auto_prefers_the_fast_backend_and_logs_it_once(register_json, caplog, monkeypatch):
    name = register_json(make_dataset())
    logger._LOG_COUNTER.clear()
    with caplog.at_level(logging.INFO):
        assert COCOEvaluator(name)._backend == "hotcoco"
        COCOEvaluator(name)
    assert caplog.text.count("COCO evaluation uses hotcoco") == 1
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with caplog.at_level(logging.INFO):
        assert COCOEvaluator(name)._backend == "pycocotools"
    assert caplog.text.count("COCO evaluation uses pycocotools") == 1
    with pytest.raises(ValueError, match="pip install hotcoco"):
        COCOEvaluator(name, backend="hotcoco")
    with pytest.raises(ValueError, match="'fast'"):
        COCOEvaluator(name, backend="fast")


def test_prints_nothing_and_logs_the_tables(register_json, caplog, capsys):
    name = register_json(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    capsys.readouterr()
    with caplog.at_level(logging.INFO):
        for backend in ("hotcoco", "pycocotools"):
            run(name, inputs, outputs, backend=backend)
    assert capsys.readouterr().out == ""
    assert "on 8 of the 8 images" in caplog.text
    assert "| category" in caplog.text
    assert "class9" in caplog.text


# Results files and tables


def test_results_keep_full_precision_and_become_null_where_not_finite(tmp_path):
    path = tmp_path / "deep" / "results.json"
    results = {
        "bbox": {"AP": 1 / 3, "APs": math.nan, "APl": np.float32(math.inf)},
        "n": np.int64(4),
    }
    context = {"checkpoint": Path("a/model.pth"), "seconds": math.nan, "sizes": (1, np.float64(2))}
    write_results(path, results, context=context)
    assert json.loads(path.read_text()) == {
        "results": {"bbox": {"AP": 1 / 3, "APs": None, "APl": None}, "n": 4},
        "context": {"checkpoint": "a/model.pth", "seconds": None, "sizes": [1, 2.0]},
    }
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_results(path, {"bbox": {"AP": 1.0}}, context={})
    old = path.read_text()

    def broken(*_args, **_kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="no space left"):
        write_results(path, {"bbox": {"AP": 2.0}}, context={})
    assert path.read_text() == old
    assert list(tmp_path.iterdir()) == [path]


def test_table_has_a_row_per_task_and_no_classes():
    table = format_table(
        {
            "bbox": {"AP": 27.204, "AP50": 40.0, "AP-cat": 3.0},
            "segm": {"AP": 21.4, "AP50": math.nan},
        }
    )
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()] == [
        ["", "AP", "AP50"],
        [":-----", "------:", "-------:"],
        ["bbox", "27.20", "40.00"],
        ["segm", "21.40", "-"],
    ]


def test_table_of_nested_results():
    values = {"bbox": {"AP": 2.0, "AP-cat": 3.0}, "segm": {"AP": None}}
    lines = format_table({"bbox": {"AP": 1.0}, "ema": values}).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert cells == [["bbox", "1.00"], ["ema bbox", "2.00"], ["ema segm", "-"]]


def test_table_without_numbers():
    assert format_table({}) == "no results"
    assert format_table({"bbox": {}}) == "no results"


def test_per_class_table_shows_every_class_once():
    names = [f"thing {i}" for i in range(20)]
    results = {
        "bbox": {"AP": 1.0, **{f"AP-{name}": float(i) for i, name in enumerate(names)}},
        "segm": {"AP": 1.0, **{f"AP-{name}": math.nan for name in names}},
    }
    lines = format_per_class(results).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [cell.strip() for line in lines[2:] for cell in line.split("|")[1:-1]]
    for i, name in enumerate(names):
        at = cells.index(name)
        assert cells.count(name) == 1
        assert cells[at + 1 : at + 3] == [f"{i:.2f}", "-"]
    assert format_per_class({"bbox": {"AP": 1.0}}) == ""
