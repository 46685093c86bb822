"""Targets compared to those of detectron2's own mapper, object by object."""

import copy

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from image_files import encode, photo
from shorthand import one_line

from crossmae_det.detection import DetectionMapper, targets
from crossmae_det.detection.targets import make_instances

HEIGHT, WIDTH = 90, 130


def star(rng, points=9):
    """A polygon around a random center, partly outside of the image; it may intersect itself."""
    center = rng.uniform(0, (WIDTH, HEIGHT))
    radius = rng.uniform(2, 60, (points, 1))
    angle = rng.uniform(0, 2 * np.pi, points) if rng.random() < 0.3 else np.arange(points) * 0.7
    around = np.stack([np.cos(angle), np.sin(angle)], 1)
    return (center + radius * around).reshape(-1).tolist()


def annotation(rng, kind):
    if kind == "run lengths":
        blob = np.zeros((HEIGHT, WIDTH), np.uint8)
        top, left = rng.integers(0, (HEIGHT - 2, WIDTH - 2))
        blob[top : top + rng.integers(1, 50), left : left + rng.integers(1, 60)] = 1
        blob &= rng.random(blob.shape) < 0.9
        blob[top, left] = 1
        segmentation = mask_util.encode(np.asfortranarray(blob))
    else:
        segmentation = [star(rng) for _ in range(rng.integers(1, 4))]
    x, y = rng.uniform(0, (WIDTH - 5, HEIGHT - 5)).tolist()
    box = [x, y, rng.uniform(1, WIDTH - x), rng.uniform(1, HEIGHT - y)]
    value = {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": int(rng.integers(80))}
    return {**value, "segmentation": segmentation, "iscrowd": int(rng.random() < 0.1)}


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(encode(photo(HEIGHT, WIDTH)))
    return {"file_name": str(path), "height": HEIGHT, "width": WIDTH, "image_id": 1}


def augmentations(size, pad):
    return [
        T.RandomFlip(),
        T.RandomFlip(horizontal=False, vertical=True),
        T.ResizeScale(0.1, 2.0, *size),
        T.FixedSizeCrop(size, pad=pad),
    ]


@pytest.mark.parametrize("recompute_boxes", [False, True])
@pytest.mark.parametrize(
    ("kinds", "pad"),  # detectron2 pads masks with 255, which counts as inside
    [
        (["polygons"], False),
        (["polygons"], True),
        (["run lengths"], False),
        (["polygons", "run lengths"], False),
    ],
)
def test_the_targets_are_those_of_detectron2(record, monkeypatch, kinds, recompute_boxes, pad):
    monkeypatch.setattr(targets, "DECODED_BYTES", 3 * HEIGHT * WIDTH)  # three masks at a time
    steps = augmentations((64, 80), pad)
    options = {"use_instance_mask": True, "recompute_boxes": recompute_boxes}
    ours = DetectionMapper(True, augmentations=steps, image_format="RGB", **options)
    options["instance_mask_format"] = "bitmask" if "run lengths" in kinds else "polygon"
    usual = DatasetMapper(True, augmentations=steps, image_format="RGB", **options)
    objects = 0
    for seed in range(25):
        rng = np.random.default_rng(seed)
        count = int(rng.integers(0, 12))
        record["annotations"] = [annotation(rng, kinds[i % len(kinds)]) for i in range(count)]
        if "run lengths" in kinds:  # otherwise, without any, the masks are polygons
            record["annotations"].append({**annotation(rng, "run lengths"), "iscrowd": 0})
        elif all(a["iscrowd"] for a in record["annotations"]):
            continue  # detectron2 has no masks then
        before = copy.deepcopy(record)
        np.random.seed(seed)
        made = ours(record)
        assert record == before
        np.random.seed(seed)
        expected = usual(record)
        assert made.keys() == expected.keys()
        a, b = made["instances"], expected["instances"]
        assert a.image_size == b.image_size == tuple(made["image"].shape[1:])
        assert set(a.get_fields()) == set(b.get_fields())
        assert torch.equal(a.gt_boxes.tensor, b.gt_boxes.tensor)
        assert torch.equal(a.gt_classes, b.gt_classes)
        objects += len(a)
        if "run lengths" in kinds:
            assert torch.equal(a.gt_masks.tensor, b.gt_masks.tensor.bool())
            continue
        for polygons, others in zip(a.gt_masks.polygons, b.gt_masks.polygons, strict=True):
            for polygon, other in zip(polygons, others, strict=True):
                np.testing.assert_array_equal(polygon, other)
    assert objects > 40


@pytest.mark.parametrize("kind", ["polygons", "run lengths"])
def test_a_transform_of_another_kind_moves_each_object(kind):
    rng = np.random.default_rng(0)
    objects = [{**annotation(rng, kind), "iscrowd": 0} for _ in range(6)]
    turn = T.RotationTransform(HEIGHT, WIDTH, 30, expand=False)
    transforms = T.TransformList([turn, T.CropTransform(20, 15, 90, 70)])
    options = {"masks": True, "recompute_boxes": False}
    made = make_instances(objects, transforms, (HEIGHT, WIDTH), (70, 90), **options)
    expected = [
        utils.transform_instance_annotations(copy.deepcopy(each), transforms, (70, 90))
        for each in objects
    ]
    mask_format = "polygon" if kind == "polygons" else "bitmask"
    expected = utils.annotations_to_instances(expected, (70, 90), mask_format)
    expected = utils.filter_empty_instances(expected)
    assert len(made) == len(expected) > 1
    torch.testing.assert_close(made.gt_boxes.tensor, expected.gt_boxes.tensor)
    if kind == "run lengths":
        assert torch.equal(made.gt_masks.tensor, expected.gt_masks.tensor.bool())
    else:
        for polygons, others in zip(
            made.gt_masks.polygons, expected.gt_masks.polygons, strict=True
        ):
            for polygon, other in zip(polygons, others, strict=True):
                np.testing.assert_allclose(polygon, other)


def test_box_formats_may_be_mixed():
    boxes = [
        {"bbox": [1, 2, 30, 40], "bbox_mode": BoxMode.XYWH_ABS},
        {"bbox": np.array([1.5, 2.0, 31.0, 42.0]), "bbox_mode": BoxMode.XYXY_ABS},
        {"bbox": (0.0, 0.0, 500.0, 9.0), "bbox_mode": BoxMode.XYXY_ABS},
    ]
    objects = [{**box, "category_id": 3} for box in boxes]
    none = T.TransformList([T.NoOpTransform()])
    options = {"masks": True, "recompute_boxes": True}
    made = make_instances(objects, none, (HEIGHT, WIDTH), (HEIGHT, WIDTH), **options)
    expected = [[1, 2, 31, 42], [1.5, 2, 31, 42], [0, 0, WIDTH, 9]]
    assert made.gt_boxes.tensor.tolist() == expected and not made.has("gt_masks")


@pytest.mark.parametrize("mode", [BoxMode.XYXY_ABS, BoxMode.XYWH_ABS])
def test_boxes_of_every_format_are_those_of_detectron2(mode):
    rng = np.random.default_rng(0)
    boxes = rng.uniform((0, 0, 50, 50), (40, 40, 90, 80), (200, 4)).tolist()
    objects = [{"bbox": box, "bbox_mode": mode, "category_id": 0} for box in boxes]
    transforms = T.TransformList([T.ScaleTransform(HEIGHT, WIDTH, 7 * HEIGHT, 7 * WIDTH)])
    size = (7 * HEIGHT, 7 * WIDTH)
    made = make_instances(
        objects, transforms, (HEIGHT, WIDTH), size, masks=False, recompute_boxes=False
    )
    expected = [
        utils.transform_instance_annotations(dict(each), transforms, size) for each in objects
    ]
    expected = utils.annotations_to_instances(expected, size)
    assert torch.equal(made.gt_boxes.tensor, expected.gt_boxes.tensor)


def test_boxes_stand_in_for_missing_masks():
    rng = np.random.default_rng(5)
    box = {"bbox": [10.0, 10.0, 30.0, 20.0], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    none = T.TransformList([T.NoOpTransform()])
    for kind, masks in (("polygons", PolygonMasks), ("run lengths", BitMasks)):
        objects = [{**annotation(rng, kind), "iscrowd": 0}, box]
        made = make_instances(
            objects,
            none,
            (HEIGHT, WIDTH),
            (HEIGHT, WIDTH),
            masks=True,
            recompute_boxes=True,
        )
        assert isinstance(made.gt_masks, masks)
        assert made.gt_has_mask.tolist() == [True, False]
        assert made.gt_boxes.tensor[1].tolist() == [10, 10, 40, 30]
        assert made.gt_masks[1:].get_bounding_boxes().tensor.tolist() == [[10, 10, 40, 30]]


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (mask_util.encode(np.ones((5, 7), np.uint8, order="F")), "is 7x5 pixels.* 130x90"),
        ("polygons", "is a str"),
        ([[1.0, 1.0, 2.0, 2.0]], "at least"),
    ],
)
def test_a_segmentation_that_cannot_be_used_names_the_file(record, segmentation, message):
    rng = np.random.default_rng(0)
    record["annotations"] = [{**annotation(rng, "polygons"), "iscrowd": 0}]
    record["annotations"][0]["segmentation"] = segmentation
    steps = augmentations((64, 64), False)
    made = DetectionMapper(True, augmentations=steps, image_format="RGB", use_instance_mask=True)
    with pytest.raises(ValueError, match=message) as error:
        made(record)
    assert one_line(error).startswith(record["file_name"])
