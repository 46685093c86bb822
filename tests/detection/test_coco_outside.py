"""Boxes, masks and numbers that are not inside of their images; images that share a file."""

import logging

import pytest
from coco_json_files import SQUARE, annotation, example, write
from shorthand import one_line

from crossmae_det.detection import get_dataset_dicts
from crossmae_det.detection.coco_json import load

FAR_AWAY = {
    "box to the right": {"bbox": [24, 2, 8, 8], "segmentation": None},
    "box above": {"bbox": [2, -8, 8, 8], "segmentation": None},
    "mask": {"segmentation": [[x + 30 for x in SQUARE[0]]]},
    "masks on two sides": {
        "segmentation": [[-x for x in SQUARE[0]], [x + 30 for x in SQUARE[0]]],
    },
}


def assert_names(line, *texts):
    for text in texts:
        assert text in line


@pytest.mark.parametrize("name", FAR_AWAY)
def test_what_is_outside_of_its_image_is_not_lost_without_a_word(tmp_path, name, caplog):
    content = example()
    content["annotations"].append(annotation(15, 7, 9, **FAR_AWAY[name]))
    spec = write(tmp_path, content)
    with pytest.raises(ValueError) as raised:
        get_dataset_dicts(spec)
    line = one_line(raised)
    assert_names(line, "annotation 15", "outside", "24x16", "invalid_annotations=skip")
    with caplog.at_level(logging.WARNING):
        records = get_dataset_dicts(spec, invalid_annotations="skip")
    assert [len(record["annotations"]) for record in records] == [2, 1]
    assert any("left out 1 annotations" in r.getMessage() for r in caplog.records)


def test_what_is_partly_inside_is_kept(tmp_path):
    content = example()
    content["annotations"][0].update(
        bbox=[-1, -1, 4, 4], segmentation=[[-9, -9, -5, -9, -5, -5], [-1, -1, 3, -1, 3, 3]]
    )
    file = load(write(tmp_path, content).split(":")[0])
    assert not file.faults and not file.info.repairs


def test_boxes_that_are_corners_are_counted(tmp_path):
    content = example()
    for value in content["annotations"][:2]:
        value["bbox"] = [12, 6, 20, 14]
    (line,) = load(write(tmp_path, content).split(":")[0]).info.repairs
    assert "x, y, width, height" in line and ": 2 (first: annotation 11)" in line


def test_images_that_share_a_file_are_counted(tmp_path):
    content = example()
    content["images"].append({**content["images"][0], "id": 70})
    (line,) = load(write(tmp_path, content).split(":")[0]).info.repairs
    assert line.endswith(": 1 (first: image 70)")


@pytest.mark.parametrize("value", [10**30, 1e30, 1e300])
@pytest.mark.parametrize("side", range(4))
def test_boxes_beyond_all_numbers_are_named(tmp_path, value, side):
    content = example()
    content["annotations"][0]["bbox"][side] = value
    with pytest.raises(ValueError) as raised:
        get_dataset_dicts(write(tmp_path, content))
    line = one_line(raised)
    assert_names(line, "annotation 11", "four finite numbers")


def test_a_category_id_of_another_type_is_named(tmp_path):
    content = example()
    content["annotations"][0]["category_id"] = "nine"
    with pytest.raises(ValueError) as raised:
        get_dataset_dicts(write(tmp_path, content))
    line = one_line(raised)
    assert_names(line, "annotation 11", "'nine'")
