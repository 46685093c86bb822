import copy
import json
import logging

import numpy as np
import pycocotools.mask as mask_util
import pytest
from coco_json_files import SQUARE, annotation, example, write
from shorthand import one_line

from crossmae_det.detection import describe, get_dataset_dicts


def change(key, index, **values):
    def apply(content):
        content[key][index].update(values)

    return apply


def drop(key, index, name):
    def apply(content):
        del content[key][index][name]

    return apply


nan, inf = float("nan"), float("inf")
BAD_CONTENT = {
    "no images key": (lambda c: c.pop("images"), "there is no 'images'"),
    "no categories key": (lambda c: c.pop("categories"), "there is no 'categories'"),
    "annotations a dict": (lambda c: c.update(annotations={}), "'annotations' is not a list"),
    "images of numbers": (lambda c: c.update(images=[1]), "'images' is not a list of objects"),
    "zero images": (lambda c: c.update(images=[], annotations=[]), "no images"),
    "zero categories": (lambda c: c.update(categories=[], annotations=[]), "no categories"),
    "image id twice": (change("images", 1, id=7), "two images have the id 7"),
    "image without name": (drop("images", 1, "file_name"), "file_name, but one is {'id': 3"),
    "image without size": (drop("images", 1, "height"), "image 3 needs a height and a width"),
    "category id twice": (change("categories", 1, id=9), "two categories have the id 9"),
    "category without name": (drop("categories", 1, "name"), "a name, but one is {'id': 2}"),
    "annotation id twice": (change("annotations", 1, id=11), "annotation 11 has an id that"),
    "absent image": (change("annotations", 1, image_id=99), "annotation 12 points to image 99"),
    "absent category": (change("annotations", 1, category_id=1), "12 points to category 1"),
    "no box": (drop("annotations", 1, "bbox"), "annotation 12 has no 'bbox'"),
    "no id": (drop("annotations", 1, "id"), "annotation number 1 of the list has no 'id'"),
    "id a list": (change("annotations", 1, image_id=[3]), "12 has a value of the wrong type"),
    "three numbers": (change("annotations", 1, bbox=[1, 2, 3]), "12 has the box [1, 2, 3]"),
    "box not finite": (change("annotations", 1, bbox=[1, 2, nan, 4]), "12 has the box"),
    "box of words": (change("annotations", 1, bbox=["a"] * 4), "12 has a value of the wrong"),
    "ignored": (change("annotations", 1, ignore=1), 'annotation 12 has "ignore"'),
    "flat polygon": (change("annotations", 1, segmentation=SQUARE[0]), "not a list of polygons"),
    "endless polygon": (change("annotations", 1, segmentation=[[inf, *SQUARE[0][1:]]]), "finite"),
    "mask of another size": (
        change("annotations", 3, segmentation={"size": [24, 16], "counts": [384]}),
        "annotation 14 has a mask of [24, 16] pixels, but its image has [16, 24]",
    ),
    "wrong run lengths": (
        change("annotations", 3, segmentation={"size": [16, 24], "counts": [1, 2]}),
        "annotation 14 has run lengths",
    ),
    "run lengths of nothing": (
        change("annotations", 3, segmentation={"size": [16, 24], "counts": 3}),
        'annotation 14 has "counts"',
    ),
}


@pytest.mark.parametrize("name", BAD_CONTENT)
def test_contradictions_are_named(tmp_path, name):
    damage, text = BAD_CONTENT[name]
    content = example()
    damage(content)
    spec = write(tmp_path, json.dumps(content))
    with pytest.raises(ValueError) as error:
        describe(spec)
    assert one_line(error).startswith(f"{tmp_path}/set.json: ") and text in one_line(error)


@pytest.mark.parametrize(
    "content, text",
    [
        (json.dumps(example())[:-30], "not a complete json file"),
        ("", "not a complete json file"),
        ("[]", "holds a list, as COCO result files do"),
        ("3", "holds a single value"),
    ],
)
def test_what_is_not_coco_is_named(tmp_path, content, text):
    with pytest.raises(ValueError) as error:
        get_dataset_dicts(write(tmp_path, content))
    assert one_line(error).startswith(f"{tmp_path}/set.json: ") and text in one_line(error)


def test_json_of_other_bytes(tmp_path):
    spec = write(tmp_path, example())
    (tmp_path / "set.json").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match="not a complete json file"):
        describe(spec)


def encode(mask):
    rle = mask_util.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


EMPTY = np.zeros((16, 24), np.uint8)
NO_AREA = {
    "flat box": ({"bbox": [2, 2, 8, 0]}, "its box has no area (width 8, height 0)"),
    "negative box": ({"bbox": [2, 2, -1, 4]}, "its box has no area"),
    "two points": ({"segmentation": [[1, 1, 5, 5]]}, "its mask has no area"),
    "odd polygon": ({"segmentation": [[1, 1, 5, 5, 1, 5, 3]]}, "its mask has no area"),
    "points on a line": ({"segmentation": [[0, 0, 0.1, 0.3, 0.2, 0.6, 1, 3]]}, "no area"),
    "one point": ({"segmentation": [[4, 4] * 5, [1, 1, 2, 2, 3, 3]]}, "no area"),
    "compressed": ({"segmentation": encode(EMPTY)}, "its mask has no area"),
    "run lengths": ({"segmentation": {"size": [16, 24], "counts": [384]}}, "no area"),
}


@pytest.mark.parametrize("name", NO_AREA)
def test_annotations_without_area(tmp_path, register, caplog, name):
    changes, text = NO_AREA[name]
    content = example()
    content["annotations"][2].update(copy.deepcopy(changes))
    spec = write(tmp_path, content)
    assert describe(spec).has_masks

    for options in ({}, {"invalid_annotations": "error"}):
        with pytest.raises(ValueError) as error:
            get_dataset_dicts(spec, **options)
        message = one_line(error)
        assert message.startswith(f"{tmp_path}/set.json: annotation 13 ") and text in message
        advice = "set dataloader.train.dataset.invalid_annotations=skip to leave such annotations"
        assert advice in message

    registered = register.coco("faulty", spec)
    for records in (
        lambda: get_dataset_dicts(spec, invalid_annotations="skip"),
        lambda: get_dataset_dicts(registered),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "crossmae_det"):
            counts = {r["image_id"]: len(r["annotations"]) for r in records()}
        assert counts == {3: 1, 7: 1}
        assert "left out 1 annotations" in caplog.text and "annotation 13" in caplog.text
    with pytest.raises(ValueError, match="annotation 13"):
        get_dataset_dicts(registered, invalid_annotations="error")


def test_the_first_fault_and_their_number_are_told(tmp_path):
    content = example()
    content["annotations"][0]["bbox"] = [0, 0, 0, 4]
    content["annotations"][1]["segmentation"] = [[1, 1, 5, 5]]
    spec = write(tmp_path, content)
    with pytest.raises(ValueError, match=r"annotation 11 cannot .* no area .* \(and 1 more\); "):
        get_dataset_dicts(spec)
    records = get_dataset_dicts(spec, invalid_annotations="skip")
    assert [record["image_id"] for record in records] == [3]
    with pytest.raises(ValueError, match="invalid_annotations='drop'"):
        get_dataset_dicts(spec, invalid_annotations="drop")


def test_masks_that_have_area_pass(tmp_path):
    mask = EMPTY.copy()
    mask[3, 4] = 1
    content = example()
    figure_of_eight = [0, 0, 4, 4, 4, 0, 0, 4]  # its signed area is 0
    content["annotations"] = [
        annotation(1, 3, 2, segmentation=encode(mask)),
        annotation(2, 3, 2, segmentation={"size": [16, 24], "counts": [5, 1, 378]}),
        annotation(3, 3, 2, segmentation=[figure_of_eight]),
        annotation(4, 3, 2, segmentation=[[1, 1, 2, 2], *SQUARE]),
        annotation(5, 3, 2, segmentation=[[0, 0, 1e-7, 0, 5, 5, 0, 5]]),
        annotation(6, 3, 2, segmentation=encode(EMPTY), iscrowd=1),
    ]
    assert len(get_dataset_dicts(write(tmp_path, content))[0]["annotations"]) == 6
