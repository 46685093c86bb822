"""Columns of detections, against detectron2's list of dicts."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detections import HEIGHT, WIDTH, instances, rectangle
from detectron2.evaluation.coco_evaluation import instances_to_coco_json

from crossmae_det.detection.detections import Detections, ImageDetections, encode_masks


def example(masks=True):
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 40, (5, 4)) + [0, 0, 41, 41]
    bitmaps = rng.random((5, HEIGHT, WIDTH)) < 0.1
    bitmaps[1] = False
    bitmaps[2] = True
    bitmaps[3] = rectangle(3, 4, 20, 30)
    return instances(corners, rng.random(5), [0, 2, 1, 1, 0], bitmaps if masks else None)


@pytest.mark.parametrize("masks", [True, False])
def test_writes_the_json_of_detectron2(masks):
    found = ImageDetections.from_instances(example(masks))
    expected = instances_to_coco_json(example(masks), "photo 1")
    for record in expected:
        record["category_id"] = [7, 3, 9][record["category_id"]]
    assert json.loads(b"[" + found.to_json("photo 1", [7, 3, 9]) + b"]") == expected


def test_columns_of_all_types_of_tensors():
    found = example()
    found.scores, found.pred_masks = found.scores.bfloat16(), found.pred_masks.float()
    columns = ImageDetections.from_instances(found)
    assert len(columns) == 5
    assert columns.boxes.dtype == columns.scores.dtype == columns.areas.dtype == np.float64
    np.testing.assert_array_equal(columns.scores, found.scores.float().numpy())
    np.testing.assert_array_equal(columns.areas, found.pred_masks.sum((1, 2)))
    np.testing.assert_array_equal(columns.classes, [0, 2, 1, 1, 0])


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (33, 65)])
def test_run_lengths_are_those_of_pycocotools(size):
    masks = torch.rand(4, *size, generator=torch.Generator().manual_seed(0)) < 0.5
    for given in (masks, masks.transpose(1, 2).contiguous().transpose(1, 2), masks[::2]):
        encoded, areas = encode_masks(given)
        expected = [mask_util.encode(np.asfortranarray(m.numpy().view(np.uint8))) for m in given]
        assert [m["counts"].encode() for m in encoded] == [m["counts"] for m in expected]
        assert all(m["size"] == list(size) for m in encoded)
        np.testing.assert_array_equal(areas, given.sum((1, 2)))
    assert encode_masks(masks[:0]) == ([], pytest.approx(np.zeros(0)))


def test_values_that_are_not_finite_cannot_be_written():
    found = example(masks=False)
    found.scores[2] = torch.nan
    with pytest.raises(ValueError, match="image 12 has a detection .* not finite"):
        ImageDetections.from_instances(found).to_json(12, [7, 3, 9])


def test_join_and_select():
    first = ImageDetections.from_instances(example())
    none = ImageDetections.from_instances(example()[:0])
    joined = Detections.join([(4, first), (2, none), (1, first)])
    assert len(joined) == len(joined.masks) == 10
    np.testing.assert_array_equal(joined.images, [4] * 5 + [1] * 5)
    chosen = joined.select(joined.classes == 2)
    np.testing.assert_array_equal(chosen.images, [4, 1])
    assert chosen.masks == [first.masks[1]] * 2
    records = chosen.records()
    assert [record["bbox"] for record in chosen.without_masks().records()] == chosen.boxes.tolist()
    assert [record["category_id"] for record in records] == [3, 3]
    assert all("bbox" not in record for record in records)
    assert len(Detections.join([(1, none)])) == len(Detections.join([]).records()) == 0
