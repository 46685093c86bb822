"""Reading a COCO json: what is repaired, what is a contradiction, what cannot be trained on."""

import json
import logging

import numpy as np
import pycocotools.mask as mask_util
import pytest
from coco_json_files import SQUARE, annotation, example, write
from detectron2.data import DatasetCatalog
from shorthand import one_line

from crossmae_det.detection import describe, get_dataset_dicts
from crossmae_det.detection.coco_annotations import run_lengths
from crossmae_det.detection.coco_json import load


def encode(mask):
    rle = mask_util.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


EMPTY = np.zeros((16, 24), np.uint8)
MASK = EMPTY.copy()
MASK[2:10, 2:10] = 1
RLE = encode(MASK)
nan, inf = float("nan"), float("inf")


def read(folder, content):
    """The clean form of a json with this content."""
    return load(write(folder, json.dumps(content)).split(":")[0])


def error_of(folder, content):
    """The error of a json, which must be one line that starts with the file."""
    with pytest.raises(ValueError) as error:
        describe(write(folder, content if isinstance(content, str) else json.dumps(content)))
    assert one_line(error).startswith(f"{folder}/set.json: ")
    return str(error.value)


# What is not a COCO json, or contradicts itself


@pytest.mark.parametrize(
    "content, text",
    [
        (json.dumps(example())[:-30], "complete json"),
        ("", "complete json"),
        ("[" * 100_000, "complete json"),
        ("[]", "a list"),
        ("3", "a single value"),
    ],
)
def test_files_that_are_not_coco(tmp_path, content, text):
    assert text in error_of(tmp_path, content)


def test_json_of_other_bytes(tmp_path):
    spec = write(tmp_path, example())
    (tmp_path / "set.json").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match="set.json"):
        describe(spec)


def remove(key, index=None, name=None):
    return lambda content: content.pop(key) if name is None else content[key][index].pop(name)


def change(key, index, **values):
    return lambda content: content[key][index].update(values)


@pytest.mark.parametrize(
    "damage, names",
    [
        (remove("images"), ["'images'"]),
        (remove("categories"), ["'categories'"]),
        (lambda c: c.update(annotations={}), ["'annotations'"]),
        (lambda c: c.update(images=[1]), ["'images'"]),
        (lambda c: c.update(images=[], annotations=[]), ["no images"]),
        (lambda c: c.update(categories=[], annotations=[]), ["no categories"]),
        (change("images", 1, id=7), ["images", "id 7"]),
        (change("images", 1, id=None), ["image", "3.png"]),
        (remove("images", 1, "file_name"), ["image", "'id': 3", "file_name"]),
        (remove("images", 1, "height"), ["image 3", "height"]),
        (change("images", 1, width=0), ["image 3", "width"]),
        (change("categories", 1, id=9), ["categories", "id 9"]),
        (change("categories", 1, name="nine"), ["categories 2 and 9", "'nine'"]),
        (remove("categories", 1, "name"), ["category", "'id': 2"]),
    ],
)
def test_contradictions_of_a_file_are_named(tmp_path, damage, names):
    content = example()
    damage(content)
    message = error_of(tmp_path, content)
    assert all(name in message for name in names), message


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"id": 11}, ["id 11"]),
        ({"image_id": 99}, ["12", "image 99"]),
        ({"image_id": [3]}, ["12", "image_id [3]"]),
        ({"category_id": 1}, ["12", "category 1"]),
        ({"category_id": "nine"}, ["12", "'nine'"]),
        ({"bbox": ...}, ["12", "'bbox'"]),
        ({"bbox": [1, 2, 3]}, ["12", "box [1, 2, 3]"]),
        ({"bbox": [1, 2, nan, 4]}, ["12", "box [1, 2, nan, 4]"]),
        ({"bbox": ["a"] * 4}, ["12", "box ['a', "]),
        *(({"bbox": [1, 10**30, 3, 4]}, ["12", "box"]), ({"bbox": [1e30, 2, 3, 4]}, ["12", "box"])),
        *(({"bbox": [1, 2, 1e300, 4]}, ["12", "box"]), ({"bbox": [1, 2, 3, inf]}, ["12", "box"])),
        ({"ignore": 1}, ["12", '"ignore"']),
        *(({"iscrowd": value}, ["12", '"iscrowd"']) for value in ("yes", 2, -1, [0], 0.5)),
        ({"segmentation": SQUARE[0]}, ["12", "polygons"]),
        ({"segmentation": [["a"] * 6]}, ["12", "polygon"]),
        ({"segmentation": [[None, *SQUARE[0][1:]]]}, ["12", "polygon"]),
        *(({"segmentation": [[far, *SQUARE[0][1:]]]}, ["12", "polygon"]) for far in (inf, 1e12)),
        ({"segmentation": [[10**308] * 8]}, ["12", "polygon"]),
        ({"segmentation": {"size": [24, 16], "counts": [384]}}, ["12", "[24, 16]", "[16, 24]"]),
        ({"segmentation": {"size": [16, 24], "counts": [1, 2]}}, ["12", "run lengths"]),
        ({"segmentation": {"size": [16, 24], "counts": [-1, 385]}}, ["12", "run lengths"]),
        ({"segmentation": {"size": [16, 24], "counts": 3}}, ["12", '"counts"']),
    ],
)
def test_contradictions_of_an_annotation_are_named(tmp_path, changes, names):
    message = error_of(tmp_path, example(**changes))
    assert message.startswith(f"{tmp_path}/set.json: annotation 12 ") or "id" in changes
    assert all(name in message for name in names), message


def test_an_annotation_without_id_is_named_by_its_number(tmp_path):
    message = error_of(tmp_path, example(id=...))
    assert "annotation number 1 " in message and "'id'" in message


@pytest.mark.parametrize(
    "counts",
    ["", RLE["counts"][:-1], *(RLE["counts"] + end for end in "1P"), "~~", "\u00e9", "1", "o"],
)
def test_compressed_run_lengths_that_do_not_add_up_are_named(tmp_path, counts):
    message = error_of(tmp_path, example(segmentation={"size": [16, 24], "counts": counts}))
    assert "annotation 12" in message and "run lengths" in message


def test_run_lengths_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    for height, width, share in ((1, 1, 0.5), (16, 24, 0.5), (300, 200, 0.02), (700, 900, 0)):
        for _ in range(20):
            mask = (rng.random((height, width)) < share).astype(np.uint8)
            if share == 0:  # long runs
                mask[: rng.integers(1, 700), rng.integers(0, 800) :] = 1
            pixels = np.concatenate([[0], mask.flatten(order="F"), [2]]).astype(int)
            expected = np.diff([0, *np.flatnonzero(np.diff(pixels))])
            np.testing.assert_array_equal(run_lengths(encode(mask)["counts"]), expected)


# Repairs


def test_a_clean_file_has_no_repairs(tmp_path, caplog):
    file = read(tmp_path, example())
    assert file.info.repairs == () and not file.faults and not caplog.records
    assert file.annotations[1]["segmentation"] == SQUARE


@pytest.mark.parametrize("kind", [float, str, lambda v: f" {float(v)} "])
def test_whole_floats_and_numbers_as_text_are_integers(tmp_path, caplog, kind):
    content = example()
    for image in content["images"]:
        image.update({key: kind(image[key]) for key in ("id", "height", "width")})
    for category in content["categories"]:
        category["id"] = kind(category["id"])
    for value in content["annotations"]:
        keys = ("id", "image_id", "category_id", "area", "iscrowd")
        value.update({key: kind(value[key]) for key in keys})
        value["bbox"] = [kind(side) for side in value["bbox"]]
        mask = value["segmentation"]
        if isinstance(mask, dict):
            mask.update({key: [kind(v) for v in mask[key]] for key in ("size", "counts")})
        else:
            value["segmentation"] = [[kind(v) for v in polygon] for polygon in mask]
    expected = get_dataset_dicts(write(tmp_path, example()), filter_empty=False)
    with caplog.at_level(logging.WARNING):
        records = get_dataset_dicts(write(tmp_path, json.dumps(content)), filter_empty=False)
    assert records == expected
    assert all(type(r[key]) is int for r in records for key in ("height", "width", "image_id"))
    lines = [r.getMessage() for r in caplog.records if "first:" in r.getMessage()]
    assert 1 <= len(lines) <= 2 and all(line.startswith(f"{tmp_path}/set.json: ") for line in lines)


def test_each_kind_of_repair_is_logged_once(tmp_path, caplog):
    content = example()
    for value in content["annotations"][:3]:
        value.update(iscrowd=None, area=None)
    spec = write(tmp_path, content)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            get_dataset_dicts(spec)
            DatasetCatalog.get(spec)
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(lines) == 2
    for word in ("iscrowd", "area"):
        assert any(word in line and ": 3 (first: annotation 11)" in line for line in lines)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_read(tmp_path, encoding):
    content = example()
    content["categories"][0]["name"] = "caf\u00e9"
    spec = write(tmp_path, content)
    (tmp_path / "set.json").write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)
    assert describe(spec).categories == {2: "two", 9: "caf\u00e9"}


@pytest.mark.parametrize("crowd", [None, ..., 0.0, False, "0", "false"])
def test_iscrowd_that_is_absent_or_false_is_zero(tmp_path, crowd):
    assert read(tmp_path, example(iscrowd=crowd)).annotations[1]["iscrowd"] == 0


@pytest.mark.parametrize("area", [None, ..., 0, -3, "unknown", nan])
def test_an_area_that_is_absent_or_invalid_is_none(tmp_path, area):
    file = read(tmp_path, example(area=area))
    assert [a["area"] for a in file.annotations] == [64, None, 64, 64]


@pytest.mark.parametrize(
    "bad", [[1, 1, 5, 5], [2, 2], [], [1, 1, 5, 5, 1, 5, 3], [0, 0, 1, 3, 2, 6]]
)
def test_degenerate_polygons_are_dropped_beside_good_ones(tmp_path, bad):
    file = read(tmp_path, example(segmentation=[bad, *SQUARE]))
    assert file.annotations[1]["segmentation"] == SQUARE
    (line,) = file.info.repairs
    assert "polygons" in line and ": 1 (first: annotation 12)" in line


def test_a_mask_without_size_has_that_of_its_image(tmp_path):
    file = read(tmp_path, example(segmentation={"counts": RLE["counts"]}))
    assert file.annotations[1]["segmentation"] == RLE and len(file.info.repairs) == 1


def test_ids_of_other_types_are_matched_or_named(tmp_path):
    content = example()
    for value in content["annotations"]:
        value["image_id"] = str(value["image_id"])
    for image in content["images"]:
        image["id"] = f"{image['id']:06d}"
    assert [r["image_id"] for r in get_dataset_dicts(write(tmp_path, content))] == [3, 7]
    content = example()
    for image in content["images"]:
        image["id"] = f"{image['id']}.png"
    message = error_of(tmp_path, content)
    assert "annotation 11 points to image 7" in message and "7.png" in message
    for value in content["annotations"]:
        value["image_id"] = f"{value['image_id']}.png"
    assert [r["image_id"] for r in get_dataset_dicts(write(tmp_path, content))] == [
        "3.png",
        "7.png",
    ]


def test_numbers_that_name_classes_are_text(tmp_path):
    content = example()
    content["categories"] = [{"id": 2, "name": 7}, {"id": 9, "name": "8"}, {"id": 2, "name": 7}]
    assert describe(write(tmp_path, content)).categories == {2: "7", 9: "8"}


def test_boxes_that_are_corners_are_counted(tmp_path):
    content = example()
    for value in content["annotations"][:2]:
        value["bbox"] = [12, 6, 20, 14]
    (line,) = read(tmp_path, content).info.repairs
    assert "x, y, width, height" in line and ": 2 (first: annotation 11)" in line


def test_images_that_share_a_file_are_counted(tmp_path):
    content = example()
    content["images"].append({**content["images"][0], "id": 70})
    (line,) = read(tmp_path, content).info.repairs
    assert line.endswith(": 1 (first: image 70)")


# What cannot be trained on

RIGHT = [x + 30 for x in SQUARE[0]]
FAULTS = [
    ({"bbox": [2, 2, 8, 0]}, "its box has no area (width 8, height 0)"),
    ({"bbox": [2, 2, -1, 4]}, "its box has no area"),
    ({"bbox": [24, 2, 8, 8], "segmentation": None}, "outside of the image of 24x16"),
    ({"bbox": [2, -8, 8, 8], "segmentation": None}, "outside of the image of 24x16"),
    ({"segmentation": [RIGHT]}, "outside of the image of 24x16"),
    ({"segmentation": [[-x for x in SQUARE[0]], RIGHT]}, "outside of the image of 24x16"),
    ({"segmentation": [[1, 1, 5, 5]]}, "its mask has no area"),
    ({"segmentation": [[1, 1, 5, 5, 1, 5, 3]]}, "its mask has no area"),
    ({"segmentation": [[0, 0, 0.1, 0.3, 0.2, 0.6, 1, 3]]}, "its mask has no area"),
    ({"segmentation": [[4, 4] * 5, [1, 1, 2, 2, 3, 3]]}, "its mask has no area"),
    ({"segmentation": encode(EMPTY)}, "its mask has no area"),
    ({"segmentation": {"size": [16, 24], "counts": [384]}}, "its mask has no area"),
]


@pytest.mark.parametrize("changes, text", FAULTS)
def test_annotations_that_cannot_be_trained_on(tmp_path, register, caplog, changes, text):
    spec = write(tmp_path, example(**changes))
    assert describe(spec).has_masks
    registered = register.coco("faulty", spec)
    for name, options in (
        (spec, {}),
        (spec, {"invalid_annotations": "error"}),
        (registered, {"invalid_annotations": "error"}),
    ):
        with pytest.raises(ValueError) as error:
            get_dataset_dicts(name, **options)
        message = one_line(error)
        assert message.startswith(f"{tmp_path}/set.json: ") and "annotation 12" in message
        assert text in message and "dataloader.train.dataset.invalid_annotations=skip" in message

    for name, options in ((spec, {"invalid_annotations": "skip"}), (registered, {})):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "crossmae_det"):
            records = get_dataset_dicts(name, **options)
        assert {r["image_id"]: len(r["annotations"]) for r in records} == {3: 1, 7: 1}
        assert "left out 1 annotations" in caplog.text and "annotation 12" in caplog.text


def test_the_number_of_faults_is_in_the_message(tmp_path):
    content = example(segmentation=[[1, 1, 5, 5]])
    content["annotations"][0]["bbox"] = [0, 0, 0, 4]
    spec = write(tmp_path, content)
    with pytest.raises(ValueError, match=r"annotation 11: .* no area .* \(and 1 more\)"):
        get_dataset_dicts(spec)
    records = get_dataset_dicts(spec, invalid_annotations="skip")
    assert [record["image_id"] for record in records] == [3]
    with pytest.raises(ValueError, match="invalid_annotations='drop'"):
        get_dataset_dicts(spec, invalid_annotations="drop")


def test_what_has_area_in_its_image_is_kept(tmp_path):
    mask = EMPTY.copy()
    mask[3, 4] = 1
    content = example()
    figure_of_eight = [0, 0, 4, 4, 4, 0, 0, 4]  # its signed area is 0
    partly_inside = [[-9, -9, -5, -9, -5, -5], [-1, -1, 3, -1, 3, 3]]
    content["annotations"] = [
        annotation(1, 3, 2, segmentation=encode(mask)),
        annotation(2, 3, 2, segmentation={"size": [16, 24], "counts": [5, 1, 378]}),
        annotation(3, 3, 2, segmentation=[figure_of_eight]),
        annotation(4, 3, 2, segmentation=[[1, 1, 2, 2], *SQUARE]),
        annotation(5, 3, 2, segmentation=[[0, 0, 1e-7, 0, 5, 5, 0, 5]]),
        annotation(6, 3, 2, segmentation=encode(EMPTY), iscrowd=1),
        annotation(7, 3, 2, bbox=[-1, -1, 4, 4], segmentation=partly_inside),
    ]
    assert len(get_dataset_dicts(write(tmp_path, content))[0]["annotations"]) == 7
