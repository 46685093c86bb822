"""What a COCO json may have in other spellings: read as what it means, counted and logged."""

import json
import logging
import os

import numpy as np
import pycocotools.mask as mask_util
import pytest
from coco_json_files import SQUARE, annotation, example, write
from detectron2.data import DatasetCatalog
from shorthand import one_line

from crossmae_det.detection import describe, get_dataset_dicts
from crossmae_det.detection.coco_annotations import run_lengths
from crossmae_det.detection.coco_json import load

MASK = np.zeros((16, 24), np.uint8)
MASK[2:10, 2:10] = 1
RLE = mask_util.encode(np.asfortranarray(MASK))
RLE = {"size": RLE["size"], "counts": RLE["counts"].decode()}


def path_of(spec):
    return spec.split(":")[0]


def test_a_clean_file_has_no_repairs(tmp_path, caplog):
    file = load(path_of(write(tmp_path, example())))
    assert file.info.repairs == () and not caplog.records
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


def test_repairs_are_logged_once_for_each_kind(tmp_path, caplog):
    content = example()
    for value in content["annotations"][:3]:
        value["iscrowd"] = None
        value["area"] = None
    spec = write(tmp_path, content)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            get_dataset_dicts(spec)
            DatasetCatalog.get(spec)
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(lines) == 2
    assert any("iscrowd" in line and ": 3 (first: annotation 11)" in line for line in lines)
    assert any("area" in line and ": 3 (first: annotation 11)" in line for line in lines)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_read(tmp_path, encoding):
    content = example()
    content["categories"][0]["name"] = "caf\u00e9"
    spec = write(tmp_path, content)
    (tmp_path / "set.json").write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)
    assert describe(spec).categories == {2: "two", 9: "caf\u00e9"}


@pytest.mark.parametrize("crowd", [None, "missing", 0.0, False, "0", "false"])
def test_iscrowd_that_is_none_is_zero(tmp_path, crowd):
    content = example()
    for value in content["annotations"][:3]:
        value["iscrowd"] = crowd
        if crowd == "missing":
            del value["iscrowd"]
    records = get_dataset_dicts(write(tmp_path, content))
    assert [[a["iscrowd"] for a in r["annotations"]] for r in records] == [[0, 0], [0]]


@pytest.mark.parametrize("crowd", ["yes", 2, -1, [0], 0.5])
def test_iscrowd_of_another_meaning_is_named(tmp_path, crowd):
    content = example()
    content["annotations"][1]["iscrowd"] = crowd
    with pytest.raises(ValueError) as error:
        describe(write(tmp_path, content))
    assert "annotation 12" in one_line(error) and "iscrowd" in one_line(error)


@pytest.mark.parametrize("area", [None, "missing", 0, -3, "unknown", float("nan")])
def test_an_area_that_is_none_is_computed_when_it_is_needed(tmp_path, area):
    content = example()
    content["annotations"][0]["area"] = area
    if area == "missing":
        del content["annotations"][0]["area"]
    file = load(path_of(write(tmp_path, json.dumps(content))))
    assert [a["area"] for a in file.annotations] == [None, 64, 64, 64]


@pytest.mark.parametrize(
    "bad", [[1, 1, 5, 5], [2, 2], [], [1, 1, 5, 5, 1, 5, 3], [0, 0, 1, 3, 2, 6]]
)
def test_polygons_that_are_none_are_dropped_beside_good_ones(tmp_path, caplog, bad):
    content = example()
    content["annotations"][0]["segmentation"] = [bad, *SQUARE]
    with caplog.at_level(logging.WARNING):
        records = get_dataset_dicts(write(tmp_path, content))
    assert records[1]["annotations"][0]["segmentation"] == SQUARE
    assert "polygons" in caplog.text and "annotation 11" in caplog.text


def test_polygons_of_text_or_far_away_are_named(tmp_path):
    for bad in ([["a"] * 6], [[None, *SQUARE[0][1:]]], [[1e12, *SQUARE[0][1:]]]):
        content = example()
        content["annotations"][1]["segmentation"] = bad
        with pytest.raises(ValueError) as error:
            describe(write(tmp_path, content))
        assert "annotation 12" in one_line(error) and "polygon" in one_line(error)


BROKEN = [
    "",
    RLE["counts"][:-1],
    RLE["counts"] + "1",
    RLE["counts"] + "P",
    "~~",
    "\u00e9",
    "1",
    "o",
]


@pytest.mark.parametrize("counts", BROKEN)
def test_compressed_run_lengths_that_do_not_add_up_are_named(tmp_path, counts):
    content = example()
    content["annotations"][1]["segmentation"] = {"size": [16, 24], "counts": counts}
    with pytest.raises(ValueError) as error:
        describe(write(tmp_path, content))
    assert "annotation 12" in one_line(error) and "run lengths" in one_line(error)


def test_run_lengths_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    for height, width, share in ((1, 1, 0.5), (16, 24, 0.5), (300, 200, 0.02), (700, 900, 0)):
        for _ in range(20):
            mask = (rng.random((height, width)) < share).astype(np.uint8)
            if share == 0:  # long runs
                mask[: rng.integers(1, 700), rng.integers(0, 800) :] = 1
            pixels = np.concatenate([[0], mask.flatten(order="F"), [2]]).astype(int)
            ends = np.flatnonzero(np.diff(pixels))
            expected = np.diff([0, *ends])
            counts = mask_util.encode(np.asfortranarray(mask))["counts"].decode()
            np.testing.assert_array_equal(run_lengths(counts), expected)


def test_a_mask_without_size_has_that_of_its_image(tmp_path):
    content = example()
    content["annotations"][0]["segmentation"] = {"counts": RLE["counts"]}
    records = get_dataset_dicts(write(tmp_path, content))
    assert records[1]["annotations"][0]["segmentation"] == RLE


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
    with pytest.raises(ValueError) as error:
        describe(write(tmp_path, json.dumps(content), images=False))
    assert "points to image 7" in one_line(error) and "'7.png'" in one_line(error)
    for value in content["annotations"]:
        value["image_id"] = f"{value['image_id']}.png"
    write(tmp_path, example())
    spec = write(tmp_path, json.dumps(content))
    for image in content["images"]:
        assert image["file_name"] == image["id"]
    assert [r["image_id"] for r in get_dataset_dicts(spec)] == ["3.png", "7.png"]


def test_numbers_that_name_classes_are_text(tmp_path):
    content = example()
    content["categories"] = [{"id": 2, "name": 7}, {"id": 9, "name": "8"}, {"id": 2, "name": 7}]
    assert describe(write(tmp_path, content)).categories == {2: "7", 9: "8"}


def test_two_categories_of_one_name_are_named(tmp_path):
    content = example()
    content["categories"][0]["name"] = "two"
    with pytest.raises(ValueError) as error:
        describe(write(tmp_path, content))
    assert "categories 2 and 9" in one_line(error) and "'two'" in one_line(error)


# Objects that are left out, or have no mask


def test_crowd_regions_are_counted_and_can_be_kept(tmp_path, caplog):
    content = example()
    for value in content["annotations"][1:]:
        value["iscrowd"] = 1
    spec = write(tmp_path, content)
    with caplog.at_level(logging.INFO):
        records = get_dataset_dicts(spec)
    assert [r["image_id"] for r in records] == [7] and describe(spec).num_images == 3
    assert describe(spec, filter_empty=True).num_images == 1
    text = caplog.text
    assert "3 annotations with iscrowd: 1" in text and "2 with nothing but crowd regions" in text
    assert "dataloader.train.dataset.crowd=keep" in text
    kept = get_dataset_dicts(spec, crowd="keep")
    assert [[a["iscrowd"] for a in r["annotations"]] for r in kept] == [[0, 0], [0], [0]]
    assert describe(spec, filter_empty=True, crowd="keep").num_images == 3
    with pytest.raises(ValueError, match="crowd='drop'"):
        get_dataset_dicts(spec, crowd="drop")


@pytest.mark.parametrize("segmentation", [None, [], "missing", [[]], {}])
def test_boxes_among_masks_are_kept_without_a_mask(tmp_path, caplog, segmentation):
    content = example()
    content["annotations"][1]["segmentation"] = segmentation
    if segmentation == "missing":
        del content["annotations"][1]["segmentation"]
    spec = write(tmp_path, content)
    assert describe(spec).has_masks
    with caplog.at_level(logging.INFO):
        first = get_dataset_dicts(spec)[0]
    assert ["segmentation" in a for a in first["annotations"]] == [False, True]
    assert "Objects without a mask: 1" in caplog.text


def test_images_are_counted_as_they_are_used(tmp_path):
    content = example()
    content["images"].append({"id": 1, "file_name": "1.png", "height": 16, "width": 24})
    content["annotations"].append(annotation(15, 1, 9, bbox=[1, 1, 0, 4]))
    spec = write(tmp_path, content)
    for options in ({}, {"max_images": 1}, {"filter_empty": True}, {"max_images": 9}):
        wanted = {"filter_empty": False} | options
        records = get_dataset_dicts(spec, invalid_annotations="skip", **wanted)
        assert describe(spec, **options).num_images == len(records), options


def test_the_summary_says_what_is_used(tmp_path, caplog):
    content = example()
    content["images"] += [
        {"id": 1, "file_name": "1.png", "height": 40, "width": 30},
        {"id": 2, "file_name": "2.png", "height": 20, "width": 50},
    ]
    content["annotations"] += [annotation(15, 2, 9), annotation(16, 2, 9, iscrowd=None)]
    spec = write(tmp_path, content)
    with caplog.at_level(logging.INFO):
        get_dataset_dicts(spec, max_images=2)
        get_dataset_dicts(spec, max_images=2)
    (text,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Data of")]
    for part in (
        f"{spec}\n",
        "5 images found, 2 images left",
        "1 without objects",
        "1 with nothing but crowd regions",
        "1 beyond the first 2",
        "24 to 50 pixels wide, 16 to 20 high",
        "4 in 2 of 2 classes",
        "1 annotations with iscrowd: 1",
    ):
        assert part in text, (part, text)


# Image files


@pytest.mark.parametrize(
    "style",
    [
        "..\\label-studio\\data\\upload\\1\\{}",
        "../../label-studio/data/upload/1/{}",
        "/data/local-files/?d=images/{}",
        "data/local-files/?d=images%2F{}",
        "C:\\pictures\\{}",
        "https://host/bucket/{}?token=a/b",
    ],
)
def test_paths_of_another_storage_are_found_by_base_name(tmp_path, caplog, style):
    content = example()
    write(tmp_path, content)
    (tmp_path / "images" / "deep").mkdir()
    os.rename(tmp_path / "images" / "7.png", tmp_path / "images" / "deep" / "7.png")
    for image in content["images"]:
        image["file_name"] = style.format(image["file_name"])
    spec = write(tmp_path, content, images=False)
    with caplog.at_level(logging.WARNING):
        records = get_dataset_dicts(spec)
    names = [os.path.relpath(r["file_name"], tmp_path / "images") for r in records]
    assert names == ["3.png", "deep/7.png"]
    assert caplog.text.count("found by their base names") == 1


def test_paths_that_could_mean_several_files_are_named(tmp_path):
    content = example()
    for image, folder in zip(content["images"], "abc", strict=True):
        image["file_name"] = f"{folder}/1.png"
    write(tmp_path, content)
    for image, folder in zip(content["images"], "abc", strict=True):
        image["file_name"] = f"C:\\x\\{folder}\\1.png"
    assert len(get_dataset_dicts(write(tmp_path, content, images=False))) == 2
    content["images"][1]["file_name"] = "C:\\x\\1.png"
    with pytest.raises(FileNotFoundError) as error:
        get_dataset_dicts(write(tmp_path, content, images=False))
    assert "C:\\x\\1.png" in one_line(error) and "3 files" in one_line(error)


def test_two_images_do_not_become_one_file(tmp_path):
    content = example()
    spec = write(tmp_path, content)
    content["images"][0]["file_name"] = "upload/3.png"
    with pytest.raises(FileNotFoundError) as error:
        get_dataset_dicts(write(tmp_path, content, images=False))
    assert "upload/3.png" in one_line(error) and spec.split(":")[1] in one_line(error)


def test_wrong_image_sizes_are_found_before_training(tmp_path, caplog):
    content = example()
    write(tmp_path, content)
    content["images"][1].update(height=24, width=16)
    spec = write(tmp_path, content, images=False)
    with pytest.raises(ValueError) as error:
        get_dataset_dicts(spec)
    line = one_line(error)
    assert "3.png" in line and "24x16" in line and "16x24" in line and "skip" not in line
    with pytest.raises(ValueError, match="dataloader.train.skip_undecodable=True"):
        get_dataset_dicts(spec, skip_undecodable=False)
    with caplog.at_level(logging.WARNING):
        assert len(get_dataset_dicts(spec, skip_undecodable=True)) == 2
    assert "1 of 2 checked images" in caplog.text and "3.png" in caplog.text


def test_an_empty_image_file_is_found_before_training(tmp_path):
    spec = write(tmp_path, example())
    (tmp_path / "images" / "7.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"7\.png") as error:
        get_dataset_dicts(spec)
    one_line(error)


def test_the_check_of_headers_is_bounded_and_made_once(tmp_path, monkeypatch, caplog):
    from crossmae_det.detection import coco_records

    reads = []
    monkeypatch.setattr(coco_records, "image_size", lambda path: reads.append(path) or (16, 24))
    spec = write(tmp_path, example())
    for _ in range(3):
        get_dataset_dicts(spec, filter_empty=False)
    assert len(reads) == 3
    monkeypatch.setattr(coco_records, "HEADER_SECONDS", -1.0)
    with caplog.at_level(logging.INFO):
        get_dataset_dicts(spec)
    assert len(reads) == 3 and "0 of 2 images" in caplog.text
