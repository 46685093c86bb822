"""Datasets named by one string: registering, describing and loading them."""

import os

import pytest
from coco_json_files import SQUARE, example, write
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from shorthand import one_line
from torch.utils.data import Dataset, IterableDataset

from crossmae_det.detection import coco, coco_json, describe, get_dataset_dicts, resolve_name
from crossmae_det.detection.coco_records import dataset_categories

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


def test_both_paths_may_contain_colons(tmp_path):
    folder = tmp_path / "a.json:b"
    folder.mkdir()
    write(folder, example())
    (folder / "images").rename(folder / "im:ages")
    spec = f"{folder}/set.json:{folder}/im:ages"
    assert MetadataCatalog.get(resolve_name(spec)).json_file == f"{folder}/set.json"
    (folder / "set.json").rename(folder / "set.json:x.json")
    spec = f"{folder}/set.json:x.json:{folder}/im:ages"
    assert MetadataCatalog.get(resolve_name(spec)).image_root == f"{folder}/im:ages"


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
def test_unknown_datasets_are_rejected_with_advice(spec, text):
    with pytest.raises(ValueError) as error:
        resolve_name(spec)
    assert text in one_line(error) and str(spec) in one_line(error)
    with pytest.raises(ValueError, match="no dataset"):
        get_dataset_dicts([])


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


def test_registered_torch_dataset(register):
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


def test_a_loader_may_write_its_files_when_called(tmp_path, register):
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


def test_nothing_left_is_an_error(tmp_path):
    content = example()
    content["annotations"] = content["annotations"][3:]
    spec = write(tmp_path, content)
    assert len(get_dataset_dicts(spec, filter_empty=False)) == 3
    with pytest.raises(ValueError) as error:
        get_dataset_dicts(spec)
    assert spec in one_line(error) and "dataset.crowd=keep" in one_line(error)


def test_registered_test_set_needs_no_annotations(tmp_path, register):
    content = example()
    del content["annotations"]
    spec = write(tmp_path, content)
    assert len(get_dataset_dicts(register.coco("test_dev", spec), filter_empty=False)) == 3
    with pytest.raises(ValueError, match="'annotations' is missing"):
        describe(spec)


def test_images_in_folders_are_listed_once_per_folder(tmp_path, monkeypatch):
    content = example()
    for image, file_name in zip(content["images"], ("a/1.png", "a/2.png", "b/3.png"), strict=True):
        image["file_name"] = file_name
    spec = write(tmp_path, content)
    listed = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(path) or listdir(path))
    assert get_dataset_dicts(spec)[0]["file_name"] == str(tmp_path / "images" / "a/2.png")
    assert sorted(listed) == [str(tmp_path / "images" / folder) for folder in "ab"]


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_coco(shared_data, split):
    folder = shared_data / "coco"
    spec = f"{folder}/annotations/instances_{split}.json:{folder}/{split}"
    info = describe(spec)
    assert (info.num_images, len(info.categories), info.has_masks) == (80, 80, True)
    assert info.categories == dataset_categories("coco_2017_train", None)
    records = get_dataset_dicts(spec, filter_empty=False)
    assert len(records) == 80
    assert records == get_detection_dataset_dicts(spec, filter_empty=False)
