"""Datasets in YOLO, Pascal VOC, CVAT and labelme layout, and folders of masks."""

import json
import os
import shutil

import numpy as np
import pytest
from dataset_layouts import LAYOUTS, NAMES, by_image, mask_of, scenes, write
from shorthand import one_line

from crossmae_det.detection import coco_json, describe, get_dataset_dicts, resolve_name
from crossmae_det.detection.formats import for_evaluation, parse, reading, with_split


def load(spec, **options):
    """(size, objects) of each image by its name, with the names of the classes."""
    classes = list(describe(spec).categories.values())
    return by_image(get_dataset_dicts(spec, filter_empty=False, **options), classes)


def files_of(folder):
    """Every file and folder with the time of its last change."""
    return {p: os.stat(p).st_mtime_ns for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_dataset(tmp_path, layout):
    folder = tmp_path / "a: b c"
    spec = write(layout, folder)
    before = files_of(folder)
    for split in ("train", "val"):
        expected = scenes(split)
        found = load(f"{spec}:{split}")
        assert found.keys() == expected.keys()
        for name, (size, objects) in expected.items():
            assert found[name][0] == size
            assert [label for label, _, _ in found[name][1]] == [label for label, _ in objects]
            for (_, box, mask), (_, polygon) in zip(found[name][1], objects, strict=True):
                xs, ys = polygon[::2], polygon[1::2]
                expected_box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
                np.testing.assert_allclose(box, expected_box, atol=0.01)
                assert (mask == (mask_of(polygon, size) > 0)).all()
        assert describe(f"{spec}:{split}").has_masks
    assert files_of(folder) == before  # nothing is written beside the data


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_split_the_string_is_the_training_set(tmp_path, layout):
    spec = write(layout, tmp_path)
    assert load(spec).keys() == load(f"{spec}:train").keys() == scenes("train").keys()
    val = for_evaluation(spec)
    assert val == with_split(spec, "val") == with_split(f"{spec}:train", "val")
    assert load(val).keys() == scenes("val").keys()
    assert for_evaluation(f"{spec}:train") == f"{spec}:train"
    with pytest.raises(ValueError) as error:
        resolve_name(f"{spec}:nowhere")
    assert "nowhere" in one_line(error) and "train" in one_line(error).lower()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_classes_are_those_of_every_split(tmp_path, layout):
    spec = write(layout, tmp_path)
    names = list(describe(f"{spec}:val").categories.values())
    listed = layout in ("yolo", "cvat", "coco")
    assert names == (NAMES if listed else sorted(NAMES))
    assert list(describe(f"{spec}:train").categories.items()) == list(
        describe(f"{spec}:val").categories.items()
    )


# Strings


@pytest.mark.parametrize(
    "text, path, images, split",
    [
        ("yolo:data.yaml", "data.yaml", "", ""),
        ("YOLO:data.yaml:val", "data.yaml", "", "val"),
        ("yolo:C:\\my data\\data.yaml", "C:\\my data\\data.yaml", "", ""),
        ("yolo:C:\\my data\\data.yaml:test", "C:\\my data\\data.yaml", "", "test"),
        ("voc:~/VOC:trainval", f"{os.path.expanduser('~')}/VOC", "", "trainval"),
        ("cvat:a.xml:images", "a.xml", "images", ""),
        ("cvat:a.xml:images:train", "a.xml", "images", "train"),
        ("cvat:a.xml:validation", "a.xml", "", "validation"),
        ("cvat:a.xml", "a.xml", "", ""),
        ("labelme:some/where/", "some/where/", "", ""),
        ("masks:a:b/c", "a:b/c", "", ""),
    ],
)
def test_strings(text, path, images, split):
    spec = parse(text)
    assert (spec.path, spec.images, spec.split) == (path, images, split)
    assert (spec.layout, spec.text) == (text.partition(":")[0].lower(), text)


@pytest.mark.parametrize("text", ["coco_2017_val", "a.json:b", "C:\\a.json:C:\\b", "", 3, "x:y"])
def test_other_strings_are_no_layout(text):
    assert parse(text) is None


def test_coco_prefix_is_optional(tmp_path):
    write("coco", tmp_path)
    pair = f"{tmp_path}/train/_annotations.coco.json:{tmp_path}/train"
    assert load(pair).keys() == load(f"coco:{pair}").keys() == scenes("train").keys()
    assert load(f"coco:{tmp_path}/val").keys() == scenes("val").keys()


@pytest.mark.parametrize(
    "text, advice",
    [
        ("data.yaml", "yolo:data.yaml"),
        ("a.xml:images", "cvat:a.xml:images"),
        ("{folder}", "voc:{folder}"),
        ("yolo:", "yolo:data.yaml"),
        ("cvat:images", "cvat:annotations.xml"),
    ],
)
def test_a_path_without_its_layout_is_explained(tmp_path, text, advice):
    with pytest.raises(ValueError) as error:
        resolve_name(text.format(folder=tmp_path))
    assert advice.format(folder=tmp_path) in one_line(error)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_does_not_exist_is_named(tmp_path, layout):
    ending = {"yolo": "/data.yaml", "cvat": "/a.xml"}.get(layout, "")
    with pytest.raises(FileNotFoundError) as error:
        resolve_name(f"{layout}:{tmp_path}/none{ending}")
    assert f"{tmp_path}/none{ending}: no such" in one_line(error)
    (tmp_path / "empty").mkdir()
    if layout != "cvat":
        with pytest.raises(FileNotFoundError) as error:
            resolve_name(f"{layout}:{tmp_path}/empty")
        assert f"{tmp_path}/empty" in one_line(error)


@pytest.mark.parametrize("layout", ["yolo", "voc", "labelme"])
def test_without_a_validation_split_evaluation_names_what_there_is(tmp_path, layout):
    spec = write(layout, tmp_path)
    if layout == "yolo":
        path = tmp_path / "data.yaml"
        path.write_text(path.read_text().replace("val: ", "test: "))
    elif layout == "voc":
        (tmp_path / "ImageSets/Main/val.txt").rename(tmp_path / "ImageSets/Main/test.txt")
    else:
        (tmp_path / "val").rename(tmp_path / "test")
    with pytest.raises(ValueError) as error:
        for_evaluation(spec)
    assert f"{spec}:test" in one_line(error)
    assert with_split(spec, "val") is None
    assert load(f"{spec}:test").keys() == scenes("val").keys()


# Reading once


def test_a_dataset_is_read_once_until_it_changes(tmp_path, monkeypatch):
    spec = write("yolo", tmp_path)
    reads = []
    read = reading.READERS["yolo"].read
    monkeypatch.setattr(reading.READERS["yolo"], "read", lambda s: reads.append(s) or read(s))
    for _ in range(3):
        describe(spec), get_dataset_dicts(spec)
    assert len(reads) == 1
    label = next((tmp_path / "labels/train").iterdir())
    label.write_text("0 0.5 0.5 0.25 0.25\n0 0.5 0.5 0.1 0.1\n")
    records = {os.path.basename(r["file_name"])[:-4]: r for r in get_dataset_dicts(spec)}
    assert len(reads) == 2 and len(records[label.stem]["annotations"]) == 2
    added = sorted((tmp_path / "images/train").iterdir())[0]
    shutil.copy(added, added.with_name("more.png"))
    assert describe(spec).num_images == len(scenes("train")) + 1


def test_large_datasets_are_not_looked_at_all_the_time(tmp_path, monkeypatch):
    spec = write("yolo", tmp_path)
    monkeypatch.setattr(reading, "_MANY_FILES", 3)
    label = next((tmp_path / "labels/train").iterdir())
    count = len(get_dataset_dicts(spec))
    label.unlink()
    assert len(get_dataset_dicts(spec)) == count
    monkeypatch.setattr(reading, "_PAUSE_SECONDS", 0)
    assert len(get_dataset_dicts(spec)) == count - 1


def test_slow_datasets_are_cached_outside_of_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CACHE_SECONDS", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = write("masks", tmp_path / "data")
    before = files_of(tmp_path / "data")
    expected = load(spec)
    assert files_of(tmp_path / "data") == before
    (file,) = (tmp_path / "cache").rglob("*.json")

    def forget():
        reading._known.clear()
        coco_json._descriptions.clear(), coco_json._contents.clear()

    with monkeypatch.context() as patch:
        patch.setattr(reading.READERS["masks"], "read", None)  # must not be called
        forget()
        assert str(load(spec)) == str(expected)
    for damage in ("{", "[]", json.dumps({"format": 1})):  # another process, another version
        file.write_text(damage)
        forget()
        assert str(load(spec)) == str(expected)
    next((tmp_path / "data/train/masks/box").iterdir()).unlink()
    forget()
    assert str(load(spec)) != str(expected)


def test_the_cache_serves_processes_in_other_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CACHE_SECONDS", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write("voc", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    expected = load("voc:data")
    reading._known.clear()
    coco_json._descriptions.clear(), coco_json._contents.clear()
    monkeypatch.chdir(tmp_path / "data")
    monkeypatch.setattr(reading.READERS["voc"], "read", None)  # must not be called
    assert str(load("voc:.")) == str(expected)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CACHE_SECONDS", 0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load(write("yolo", tmp_path / "data"))
