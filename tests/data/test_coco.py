import copy
import json
import logging
import os
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from crossmae_det.data import coco, coco_json, describe, get_dataset_dicts, resolve_name

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "coco"

SQUARE = [[2, 2, 10, 2, 10, 10, 2, 10]]


def annotation(id_, image_id, category_id, **changes):
    value = {"id": id_, "image_id": image_id, "category_id": category_id}
    value |= {"bbox": [2, 2, 8, 8], "area": 64, "iscrowd": 0, "segmentation": SQUARE}
    return {**value, **changes}


def example():
    """Three images and categories out of order; image 5 has nothing but a crowd region."""
    crowd = {"size": [16, 24], "counts": [10, 20, 16 * 24 - 30]}
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": 16, "width": 24} for i in (7, 3, 5)
        ],
        "categories": [{"id": 9, "name": "nine"}, {"id": 2, "name": "two"}],
        "annotations": [
            annotation(11, 7, 9),
            annotation(12, 3, 2),
            annotation(13, 3, 9),
            annotation(14, 5, 2, iscrowd=1, segmentation=crowd),
        ],
    }


def write(folder, content, images=True):
    json_file, image_root = folder / "set.json", folder / "images"
    json_file.write_text(content if isinstance(content, str) else json.dumps(content))
    image_root.mkdir(exist_ok=True)
    if images and isinstance(content, dict):
        for image in content["images"]:
            file = image_root / image["file_name"]
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (image["width"], image["height"])).save(file)
    return f"{json_file}:{image_root}"


@pytest.fixture
def register():
    names = []

    def register(name, loader, **metadata):
        names.append(name)
        DatasetCatalog.register(name, loader)
        MetadataCatalog.get(name).set(**metadata)
        return name

    def register_coco(name, spec):
        names.append(name)
        register_coco_instances(name, {}, *spec.split(":"))
        return name

    register.coco = register_coco
    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


# Names


def test_registered_name_stays():
    assert resolve_name("coco_2017_val") == "coco_2017_val"


def test_own_json_is_registered_with_metadata_as_detectron2_sets_it(tmp_path):
    spec = write(tmp_path, example())
    assert resolve_name(spec) == resolve_name(spec) == spec
    metadata = MetadataCatalog.get(spec)
    assert metadata.json_file == str(tmp_path / "set.json")
    assert metadata.image_root == str(tmp_path / "images")
    assert metadata.evaluator_type == "coco"
    before = metadata.thing_classes, metadata.thing_dataset_id_to_contiguous_id
    assert before == (["two", "nine"], {2: 0, 9: 1})
    # load_coco_json sets both again and refuses to change them.
    assert len(get_detection_dataset_dicts(spec, filter_empty=False)) == 3


def test_rewritten_json_replaces_the_metadata(tmp_path):
    content = example()
    spec = write(tmp_path, content)
    resolve_name(spec)
    content["categories"].append({"id": 1, "name": "one"})
    write(tmp_path, content)
    assert MetadataCatalog.get(resolve_name(spec)).thing_classes == ["one", "two", "nine"]
    assert len(get_dataset_dicts(spec)) == 2


def test_split_takes_the_last_colon_after_an_existing_json(tmp_path):
    folder = tmp_path / "a.json:b"
    folder.mkdir()
    (folder / "x.json").touch()
    assert coco._split(f"{folder}/x.json:im:ages") == (f"{folder}/x.json", "im:ages")
    (folder / "x.json:y.json").touch()
    assert coco._split(f"{folder}/x.json:y.json:z") == (f"{folder}/x.json:y.json", "z")


@pytest.mark.parametrize(
    "spec, text",
    [
        ("coco_2017_trian", "did you mean coco_2017_train?"),
        ("nothing/like/it", "JSON:IMAGE_FOLDER"),
        ("folder/a.json", "add the image folder, as in folder/a.json:FOLDER"),
        ("folder/a.json:", "add the image folder, as in folder/a.json:FOLDER"),
        ("a.txt:folder", "JSON:IMAGE_FOLDER"),
        (3, "JSON:IMAGE_FOLDER"),
    ],
)
def test_what_is_no_data_set_says_what_one_is(spec, text):
    with pytest.raises(ValueError) as error:
        resolve_name(spec)
    assert text in one_line(error) and str(spec) in one_line(error)


def test_missing_files_are_named(tmp_path):
    spec = write(tmp_path, example())
    with pytest.raises(FileNotFoundError) as error:
        resolve_name(f"{tmp_path}/none.json:{tmp_path}")
    assert f"{tmp_path}/none.json" in one_line(error)
    with pytest.raises(FileNotFoundError) as error:
        resolve_name(f"{tmp_path}/set.json:{tmp_path}/none")
    assert f"{tmp_path}/none" in one_line(error)
    os.remove(tmp_path / "images" / "3.png")
    with pytest.raises(FileNotFoundError) as error:
        get_dataset_dicts(spec)
    assert "1 of the 3 images" in one_line(error) and "3.png" in one_line(error)


# Description


def test_describe_own_json(tmp_path):
    content = example()
    info = describe(write(tmp_path, content))
    assert (info.num_images, info.has_masks) == (3, True)
    assert list(info.categories.items()) == [(2, "two"), (9, "nine")]


@pytest.mark.parametrize("segmentation", [None, []])
def test_boxes_alone_have_no_masks(tmp_path, segmentation):
    content = example()
    for value in content["annotations"][:3]:
        value["segmentation"] = segmentation
    spec = write(tmp_path, content)
    assert not describe(spec).has_masks
    assert [len(record["annotations"]) for record in get_dataset_dicts(spec)] == [2, 1]


def test_json_is_read_once_until_it_changes(tmp_path, monkeypatch):
    reads = []
    read = coco_json.json.load
    monkeypatch.setattr(coco_json.json, "load", lambda f: reads.append(f.name) or read(f))
    content = example()
    spec = write(tmp_path, content)
    first = describe(spec)
    first.categories.clear()  # the caller's copy
    assert len(describe(spec).categories) == 2
    assert reads == [str(tmp_path / "set.json")]
    os.utime(tmp_path / "set.json", ns=(0, 0))
    describe(spec)
    assert len(reads) == 2


def test_coco_names_are_known_without_their_files(tmp_path, monkeypatch):
    metadata = MetadataCatalog.get("coco_2017_train")
    monkeypatch.setitem(metadata.__dict__, "json_file", str(tmp_path / "none.json"))
    info = describe("coco_2017_train")
    assert info.has_masks and len(info.categories) == 80
    assert list(info.categories)[-1] == 90 and info.categories[90] == "toothbrush"
    assert info.num_images * 100 == 184_375 * 64
    with pytest.raises(FileNotFoundError) as error:
        get_dataset_dicts("coco_2017_train")
    assert "none.json" in one_line(error) and "DETECTRON2_DATASETS" in one_line(error)


def test_only_train2017_is_rounded(tmp_path, monkeypatch):
    monkeypatch.setattr(coco, "_TRAIN2017_IMAGES", 3)
    content = example()
    assert describe(write(tmp_path, content)).num_images == 3
    classes = MetadataCatalog.get("coco_2017_train")
    ids = classes.thing_dataset_id_to_contiguous_id
    content["categories"] = [
        {"id": id_, "name": classes.thing_classes[index]} for id_, index in ids.items()
    ]
    spec = write(tmp_path, content)
    assert describe(spec).num_images == 118_000
    content["images"].append({"id": 1, "file_name": "1.png", "height": 16, "width": 24})
    assert describe(write(tmp_path, content)).num_images == 4


class Records(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        value = {"bbox": [0, 0, 1, 1], "category_id": 1, "segmentation": SQUARE}
        return {"file_name": "x", "image_id": 1 - index, "annotations": [value]}


def test_registered_torch_data_set(register):
    name = register("records", Records, thing_classes=["a", "b"])
    info = describe(name)
    assert (info.num_images, info.categories, info.has_masks) == (2, {0: "a", 1: "b"}, True)
    assert [record["image_id"] for record in get_dataset_dicts(name)] == [1, 0]
    assert [record["image_id"] for record in get_dataset_dicts(name, max_images=1)] == [0]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


def test_registered_data_that_cannot_be_used(register):
    with pytest.raises(ValueError, match="thing_classes"):
        describe(register("unnamed", Records))
    with pytest.raises(ValueError, match="IterableDataset"):
        get_dataset_dicts(register("stream", Stream, thing_classes=["a"]))
    with pytest.raises(ValueError, match="'nothing' has no images"):
        get_dataset_dicts(register("nothing", list, thing_classes=["a"]))


def test_a_loader_may_make_its_files_when_called(tmp_path, register):
    def make():
        write(tmp_path, example())
        return coco.load_coco_json(json_file, image_root, "made")

    json_file, image_root = str(tmp_path / "set.json"), str(tmp_path / "images")
    register("made", make, json_file=json_file, image_root=image_root, evaluator_type="coco")
    MetadataCatalog.get("made").set(thing_classes=["two", "nine"], num_images=3)
    MetadataCatalog.get("made").thing_dataset_id_to_contiguous_id = {2: 0, 9: 1}
    info = describe("made")
    assert (info.num_images, info.categories) == (3, {2: "two", 9: "nine"})
    assert not os.path.exists(json_file)
    assert len(get_dataset_dicts("made")) == 2
    assert describe("made") == info


# Records


def test_records_are_those_of_detectron2(tmp_path, register):
    spec = write(tmp_path, example())
    name = register.coco("own", spec)
    for filter_empty in (True, False):
        expected = get_detection_dataset_dicts(name, filter_empty=filter_empty)
        assert get_dataset_dicts(name, filter_empty=filter_empty) == expected
        assert get_dataset_dicts([spec], filter_empty=filter_empty) == expected
    assert len(expected) == 3


def test_max_images_takes_the_lowest_ids(tmp_path):
    spec = write(tmp_path, example())

    def ids(**options):
        return [record["image_id"] for record in get_dataset_dicts(spec, **options)]

    assert ids(filter_empty=False, max_images=2) == [3, 5]
    assert ids(max_images=2) == [3, 7]
    assert ids(max_images=9) == [3, 7]
    with pytest.raises(ValueError, match="max_images=0"):
        ids(max_images=0)


def test_several_sets_need_the_same_classes(tmp_path):
    content = example()
    specs = []
    for name in "ab":
        (tmp_path / name).mkdir()
        specs.append(write(tmp_path / name, content))
        content["categories"][0]["name"] = "other"
    with pytest.raises(ValueError) as error:
        get_dataset_dicts(specs)
    assert all(spec in one_line(error) for spec in specs)
    assert len(get_dataset_dicts([specs[0], specs[0]])) == 4
    with pytest.raises(ValueError, match="no data set"):
        get_dataset_dicts([])


def test_registered_name_with_a_json_of_other_classes(tmp_path, register):
    name = register.coco("other_classes", write(tmp_path, example()))
    MetadataCatalog.get(name).thing_classes = ["cat", "dog"]
    with pytest.raises(ValueError) as error:
        get_dataset_dicts(name)
    assert "set.json" in one_line(error) and "JSON:IMAGE_FOLDER" in one_line(error)


def test_nothing_left_is_an_error(tmp_path):
    content = example()
    content["annotations"] = content["annotations"][3:]
    spec = write(tmp_path, content)
    assert len(get_dataset_dicts(spec, filter_empty=False)) == 3
    with pytest.raises(ValueError) as error:
        get_dataset_dicts(spec)
    assert spec in one_line(error)


def test_registered_test_set_needs_no_annotations(tmp_path, register):
    content = example()
    del content["annotations"]
    spec = write(tmp_path, content)
    assert len(get_dataset_dicts(register.coco("test_dev", spec), filter_empty=False)) == 3
    with pytest.raises(ValueError, match="no 'annotations'"):
        describe(spec)


def test_images_in_folders_are_listed_once_per_folder(tmp_path, monkeypatch):
    content = example()
    for image, file_name in zip(content["images"], ("a/1.png", "a/2.png", "b/3.png"), strict=True):
        image["file_name"] = file_name
    spec = write(tmp_path, content)
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    assert get_dataset_dicts(spec)[0]["file_name"] == str(tmp_path / "images" / "a/2.png")
    assert sorted(listed) == [str(tmp_path / "images" / folder) for folder in "ab"]


# Bad files


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
    "no mask": ({"segmentation": None}, "it has no mask, though others have one"),
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
    del content["annotations"][1]["segmentation"]
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


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real COCO subset (../shared/data) is absent")
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_coco(split):
    spec = f"{SHARED}/annotations/instances_{split}.json:{SHARED}/{split}"
    info = describe(spec)
    assert (info.num_images, len(info.categories), info.has_masks) == (80, 80, True)
    assert info.categories == coco._categories("coco_2017_train", None)
    records = get_dataset_dicts(spec, filter_empty=False)
    assert len(records) == 80
    assert records == get_detection_dataset_dicts(spec, filter_empty=False)
