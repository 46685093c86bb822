"""Timing of the evaluation: the data are like COCO's, and every way gives the same AP."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from crossmae_det.benchmark import evaluation
from crossmae_det.benchmark.evaluation import MadeUpData, check_numbers, evaluation_times


@pytest.fixture
def data(tmp_path):
    made = MadeUpData(tmp_path, 12, 20)
    yield made
    DatasetCatalog.remove(made.name)
    MetadataCatalog.remove(made.name)


def test_the_data_are_sound_and_seeded(data, tmp_path):
    (tmp_path / "again").mkdir()
    again = MadeUpData(tmp_path / "again", 12, 20)
    assert again.content == data.content
    assert again.results("segm") == data.results("segm")
    areas = [annotation["area"] for annotation in data.content["annotations"]]
    assert min(areas) < 32**2 and max(areas) > 96**2
    for found in data.detections.values():
        assert len(found) == len(found.masks) == 20
        np.testing.assert_array_equal(found.areas, [mask_util.area(m) for m in found.masks])
        assert found.scores.min() >= 0 and found.scores.max() <= 1


def test_every_way_to_evaluate_gives_the_same_ap(data, tmp_path):
    for task in evaluation.TASKS:
        results = [
            evaluation._evaluator(data, tmp_path, task, backend, analysis)()
            for backend, analysis in (("hotcoco", True), ("hotcoco", False), ("pycocotools", False))
        ]
        assert results[0] == results[1] == results[2]
        assert 1 < results[0][task]["AP"] < 99
        written = json.loads((tmp_path / f"{task}_hotcoco_True" / "results.json").read_text())
        assert written["analysis"].keys() == {task}


def test_tables_of_times(monkeypatch):
    monkeypatch.setattr(evaluation, "_seconds", lambda way: way() and 2.0 or 2.0)
    boxes, masks, encoding = evaluation_times(3, 4, 1)
    for section in (boxes, masks):
        assert section.values["images"] == 3 and section.values["detections"] == 12
        assert [row[2] for row in section.rows] == ["1.0 (1.0 to 1.0)"] * 4
    assert encoding.rows[1] == ["detectron2", "2000.0 (2000.0 to 2000.0)", "1.0 (1.0 to 1.0)"]


@pytest.mark.parametrize("numbers", [(0, 5), (5, -1)])
def test_numbers_that_are_not_positive_are_rejected(numbers):
    with pytest.raises(ValueError, match="--evaluation"):
        check_numbers(*numbers)
