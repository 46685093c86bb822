"""Health of datasets with known problems."""

import dataclasses
import json
import sys

from coco_json_files import annotation, example, write
from dataset_layouts import labelme_shape, write_image

from crossmae_det.detection.coco_json import load
from crossmae_det.detection.dataset_health import check_dataset


def health_of(folder, content):
    return check_dataset(load(write(folder, content).split(":")[0]))


def problems(health, severity):
    return {c["what"]: c for c in health["checks"] if c["severity"] == severity}


def test_a_sound_dataset_is_described(tmp_path):
    content = example()
    content["images"].append({"id": 8, "file_name": "8.png", "height": 16, "width": 24})
    content["annotations"].pop(2)
    health = health_of(tmp_path, content)
    assert (health["images"], health["annotations"]) == (4, 3)
    assert health["images_without_annotations"] == 1
    assert health["classes"] == {"two": 2, "nine": 1}
    assert not problems(health, "error")


def test_what_reading_the_json_found(tmp_path):
    content = example(area="64", bbox=[2, 2, 0, 8])
    content["annotations"] += [
        annotation(20, 7, 2, bbox=[2, 2, 8, 0]),
        annotation(21, 7, 2, segmentation=[[1, 1, 5, 5, 9, 9]]),
        annotation(22, 5, 2, area="64"),
    ]
    health = health_of(tmp_path, content)
    errors = problems(health, "error")
    (boxes,) = (check for what, check in errors.items() if "box has no area" in what)
    assert (boxes["count"], boxes["examples"]) == (2, [12, 20])
    (masks,) = (check for what, check in errors.items() if "mask has no area" in what)
    assert (masks["count"], masks["examples"]) == (1, [21])
    (text,) = (c for what, c in problems(health, "info").items() if "written as text" in what)
    assert (text["count"], text["examples"]) == (2, [12])


def test_checks_of_hotcoco_name_the_ids_of_the_file(tmp_path):
    content = example()
    content["categories"].append({"id": 4, "name": "empty"})
    content["annotations"] += [
        annotation("a", 7, 9),  # as annotation 11
        annotation(31, 3, 2, bbox=[0, 0, 40, 10]),
    ]
    health = health_of(tmp_path, content)
    warnings = problems(health, "warning")
    (twins,) = (check for what, check in warnings.items() if "near-duplicates" in what)
    assert twins["count"] == 2 and twins["examples"] == [11, "a"]
    (outside,) = (check for what, check in warnings.items() if "outside the image" in what)
    assert outside["examples"] == [31]
    (empty,) = (c for what, c in problems(health, "info").items() if "zero annotation" in what)
    assert empty["examples"] == ["empty"]
    severities = [check["severity"] for check in health["checks"]]
    assert severities == sorted(severities, key=["error", "warning", "info"].index)


def test_without_hotcoco_only_its_own_checks_are_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    content = example(bbox=[2, 2, 0, 8])
    content["annotations"].append(annotation(30, 7, 9))
    health = health_of(tmp_path, content)
    assert len(problems(health, "error")) == 1 and not problems(health, "warning")
    assert health["annotations"] == 5


def test_other_layouts_name_the_places_in_their_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my data"
    folder.mkdir()
    write_image(folder / "a.png", (16, 24))
    write_image(folder / "b.png", (16, 24))  # not annotated
    shapes = [
        labelme_shape("it's", [[2, 2], [40, 9]], "rectangle"),
        labelme_shape("it's", [[3, 3], [3, 8]], "rectangle"),
    ]
    data = {"shapes": shapes, "imagePath": "a.png", "imageHeight": 16, "imageWidth": 24}
    (folder / "a.json").write_text(json.dumps(data))
    health = check_dataset(load("labelme:my data"))
    infos, errors = problems(health, "info"), problems(health, "error")
    assert infos["images without a JSON file, left out"]["examples"] == ["my data/b.png"]
    (outside,) = (check for what, check in infos.items() if "leave their images" in what)
    assert outside["examples"] == ["my data/a.json: shape 1 (it's)"]
    assert [e["examples"] for e in errors.values()] == [["my data/a.json: shape 2 (it's)"]]


def test_notes_in_another_form_are_listed_as_they_are(tmp_path):
    file = load(write(tmp_path, example()).split(":")[0])
    note = "labels without an image: 2"
    noted = dataclasses.replace(file, info=dataclasses.replace(file.info, repairs=(note,)))
    assert problems(check_dataset(noted), "info")[note]["count"] == 1
