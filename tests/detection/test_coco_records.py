"""Records of COCO jsons: classes matched by name, objects that are used, image files."""

import logging
import os

import pytest
from coco_json_files import annotation, example, write
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json
from shorthand import one_line

from crossmae_det.detection import coco_records, describe, get_dataset_dicts

# Classes


@pytest.fixture
def two_sets(tmp_path):
    """The same data twice, under other category ids in another order."""
    specs = []
    for name, ids in (("a", {9: 9, 2: 2}), ("b", {9: 1, 2: 4})):
        (tmp_path / name).mkdir()
        content = example()
        for category in content["categories"]:
            category["id"] = ids[category["id"]]
        for value in content["annotations"]:
            value["category_id"] = ids[value["category_id"]]
        specs.append(write(tmp_path / name, content))
    return specs


def classes(records):
    return [[value["category_id"] for value in record["annotations"]] for record in records]


def test_sets_with_other_ids_train_together(two_sets):
    first, second = (get_dataset_dicts(spec) for spec in two_sets)
    together = get_dataset_dicts(two_sets)
    assert together[:2] == first
    assert classes(together) == [[0, 1], [1]] * 2
    assert classes(second) == [[1, 0], [0]]


def test_sets_with_other_names_do_not(tmp_path):
    content = example()
    specs = []
    for name in "ab":
        (tmp_path / name).mkdir()
        specs.append(write(tmp_path / name, content))
        content["categories"][0]["name"] = "other"
    with pytest.raises(ValueError) as error:
        get_dataset_dicts(specs)
    names = [*specs, "lacks 1 (nine)", "adds 1 (other)"]
    assert all(name in one_line(error) for name in names)
    assert len(get_dataset_dicts([specs[0], specs[0]])) == 4


def test_categories_are_mapped_to_those_of_the_model(two_sets):
    spec = two_sets[0]
    assert classes(get_dataset_dicts(spec, categories={7: "nine", 8: "two"})) == [[1, 0], [0]]
    with pytest.raises(ValueError) as error:
        get_dataset_dicts(spec, categories={1: "two", 2: "ten"})
    assert "nine" in one_line(error) and "ten" in one_line(error)
    with pytest.raises(ValueError, match="'two'"):
        get_dataset_dicts(spec, categories={1: "two", 2: "two"})


def test_registered_name_with_a_json_of_other_classes(tmp_path, register):
    name = register.coco("other_classes", write(tmp_path, example()))
    MetadataCatalog.get(name).thing_classes = ["cat", "dog"]
    with pytest.raises(ValueError) as error:
        get_dataset_dicts(name)
    assert "set.json" in one_line(error) and "JSON:IMAGE_FOLDER" in one_line(error)


def test_records_of_a_loader_are_checked_and_mapped(tmp_path, register):
    """A custom loader that returns fewer images than the json has."""
    content = example(bbox=[2, 2, 8, 0])
    spec = write(tmp_path, content)
    json_file, image_root = spec.split(":")
    register("custom", lambda: custom)
    metadata = {"thing_classes": ["two", "nine"], "evaluator_type": "coco"}
    MetadataCatalog.get("custom").set(json_file=json_file, image_root=image_root, **metadata)
    MetadataCatalog.get("custom").thing_dataset_id_to_contiguous_id = {2: 0, 9: 1}
    custom = load_coco_json(json_file, image_root)[:2]
    for record in custom:
        for value in record["annotations"]:
            value["category_id"] = {2: 0, 9: 1}[value["category_id"]]
    model = {1: "nine", 2: "two"}
    options = {"categories": model, "filter_empty": False}
    records = get_dataset_dicts("custom", **options)
    assert classes(records) == [[0], [1]]  # image 3 without the faulty one, image 5 with its crowd
    assert [a["iscrowd"] for r in records for a in r["annotations"]] == [0, 1]
    kept = get_dataset_dicts("custom", crowd="keep", **options)
    assert [a["iscrowd"] for r in kept for a in r["annotations"]] == [0, 0]
    assert classes(custom) == [[0, 1], [0]]
    with pytest.raises(ValueError, match="annotation 12"):
        get_dataset_dicts("custom", invalid_annotations="error", **options)


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
    assert "3 annotations with iscrowd: 1" in text and "2 with crowd regions only" in text
    assert "dataloader.train.dataset.crowd=keep" in text
    kept = get_dataset_dicts(spec, crowd="keep")
    assert [[a["iscrowd"] for a in r["annotations"]] for r in kept] == [[0, 0], [0], [0]]
    assert describe(spec, filter_empty=True, crowd="keep").num_images == 3
    with pytest.raises(ValueError, match="crowd='drop'"):
        get_dataset_dicts(spec, crowd="drop")


@pytest.mark.parametrize("segmentation", [None, [], ..., [[]], {}])
def test_boxes_among_masks_are_kept_without_a_mask(tmp_path, caplog, segmentation):
    spec = write(tmp_path, example(segmentation=segmentation))
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


def test_the_summary_of_the_data_is_logged_once(tmp_path, caplog):
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
        "5 images found, 2 images used",
        "1 without objects",
        "1 with crowd regions only",
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
    assert "skip 1 images" in caplog.text and "3.png" in caplog.text


def test_an_empty_image_file_is_found_before_training(tmp_path):
    spec = write(tmp_path, example())
    (tmp_path / "images" / "7.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"7\.png") as error:
        get_dataset_dicts(spec)
    one_line(error)


def test_the_check_of_headers_is_bounded_and_made_once(tmp_path, monkeypatch, caplog):
    reads = []
    monkeypatch.setattr(coco_records, "image_size", lambda path: reads.append(path) or (16, 24))
    spec = write(tmp_path, example())
    for _ in range(3):
        get_dataset_dicts(spec, filter_empty=False)
    assert len(reads) == 3
    monkeypatch.setattr(coco_records, "HEADER_SECONDS", -1.0)
    with caplog.at_level(logging.INFO):
        get_dataset_dicts(spec)
    assert len(reads) == 3 and "0 of 2 image headers" in caplog.text
