"""What is read of each layout: shapes, ignored objects, and errors that name their place."""

import json
import logging
import os

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from dataset_layouts import (
    box_of,
    labelme_shape,
    mask_of,
    png_text,
    rle_text,
    scenes,
    write,
    write_image,
    write_png,
    write_voc,
)
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image
from shorthand import one_line

from crossmae_det.detection import COCOEvaluator, describe, get_dataset_dicts
from crossmae_det.detection.formats import reading

SIZE = (40, 60)  # of the images here
LSHAPE = [5, 5, 25, 5, 25, 12, 12, 12, 12, 25, 5, 25]


def objects(spec, **options):
    """(class, box, mask or None) of the objects of the only image with some."""
    classes = list(describe(spec).categories.values())
    records = get_dataset_dicts(spec, **options)
    assert len(records) == 1
    result = []
    for annotation in records[0]["annotations"]:
        mask = annotation.get("segmentation")
        if isinstance(mask, list):
            mask = sum(mask_of(polygon, SIZE) for polygon in mask) > 0
        elif mask is not None:
            mask = mask_util.decode(mask) > 0
        box = np.round(annotation["bbox"], 3).tolist()
        result.append((classes[annotation["category_id"]], box, mask))
    return result


def error_of(spec, kind=ValueError):
    with pytest.raises(kind) as error:
        get_dataset_dicts(spec)
    return one_line(error)


# YOLO


def yolo(folder, rows, yaml="names: [cat, dog]\n", image="a.png"):
    write_image(folder / "images/train" / image, SIZE)
    path = folder / "labels/train" / image.replace(".png", ".txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    (folder / "data.yaml").write_text(f"{yaml}train: images/train\n")
    return f"yolo:{folder}/data.yaml"


def test_yolo_rows_are_boxes_or_polygons(tmp_path):
    row = " ".join(str(v / (60, 40)[i % 2]) for i, v in enumerate(LSHAPE))
    spec = yolo(tmp_path, f"1 0.5 0.5 0.5 0.25\n\n0\t{row}\r\n")
    write_image(tmp_path / "images/train/empty.png", SIZE)  # without a label file
    (dog, cat) = objects(spec)
    assert dog == ("dog", [15, 15, 30, 10], None)
    assert cat[:2] == ("cat", [5, 5, 20, 20]) and (cat[2] == mask_of(LSHAPE, SIZE)).all()
    assert len(get_dataset_dicts(spec, filter_empty=False)) == 2


@pytest.mark.parametrize(
    "rows, words",
    [
        ("0 .5 .5 .1 .1\n0 0.1 0.2 0.3\n", ["line 2", "4 numbers"]),
        ("0 .5 .5 .1 .1 0.9\n", ["line 1", "6 numbers"]),
        ("0 .1 .1 .2 .1 .2 .2 .1\n", ["line 1", "8 numbers"]),
        ("\n2 .5 .5 .1 .1\n", ["line 2", "class is 2", "2 classes", "data.yaml"]),
        ("-1 .5 .5 .1 .1\n", ["line 1", "-1"]),
        ("0.5 .5 .5 .1 .1\n", ["line 1", "0.5"]),
        ("nan .5 .5 .1 .1\n", ["line 1", "nan"]),
        ("cat .5 .5 .1 .1\n", ["line 1", "cat"]),
        ("0 1.5 .5 .1 .1\n", ["line 1", "1.5"]),
        ("0 .5 .5 nan .1\n", ["line 1", "nan"]),
        ("0 inf .5 .1 .1\n", ["line 1", "inf"]),
        ("0 .5 .5 0 .1\n", ["line 1", "no area"]),
        ("0 .1 .1 .2 .2 .3 .3\n", ["line 1", "no area"]),
        (b"0 .5 .5 .1 .1\n\xff\xfe\n", ["UTF-8"]),
    ],
)
def test_yolo_rows_that_cannot_be_read(tmp_path, rows, words):
    message = error_of(yolo(tmp_path, rows))
    assert message.startswith(f"{tmp_path}/labels/train/a.txt")
    assert all(word in message for word in words), message


def test_yolo_boxes_without_area_can_be_skipped(tmp_path):
    spec = yolo(tmp_path, "0 .5 .5 0 .1\n1 .5 .5 .5 .5\n")
    assert len(objects(spec, invalid_annotations="skip")) == 1


@pytest.mark.parametrize(
    "yaml, words",
    [
        ("names: [a\n", ["data.yaml", "yaml"]),
        ("- a\n- b\n", ["data.yaml"]),
        ("nc: 2\n", ["data.yaml", "names"]),
        ("names: [a, a]\n", ["'a'", "twice"]),
        ("names: {1: a, 2: b}\n", ["from 0"]),
        ("nc: 3\nnames: [a, b]\n", ["nc", "2 classes"]),
        ("names: []\n", ["names"]),
        ("names: [a, null]\n", ["data.yaml"]),
        ("names: [a, b]\npath: 3\n", ["path"]),
        ("names: !!python/object/apply:os.getcwd []\n", ["data.yaml"]),
    ],
)
def test_yolo_descriptions_that_cannot_be_read(tmp_path, yaml, words):
    spec = yolo(tmp_path, "0 .5 .5 .1 .1\n", yaml)
    if yaml.startswith("-"):
        (tmp_path / "data.yaml").write_text(yaml)
    message = error_of(spec)
    assert "data.yaml" in message and all(word in message for word in words), message


def test_yolo_paths_of_other_places(tmp_path, monkeypatch):
    """Roboflow's ../train, a path of another machine, Windows, lists of images, several folders."""
    yolo(tmp_path, "0 .5 .5 .5 .5\n")
    for text in (
        "train: ../images/train\n",
        "path: ../datasets/other\ntrain: images/train\n",
        "path: .\ntrain: images\\train\n",
        f"path: {tmp_path}/images\ntrain: [train]\n",
        f"train: {tmp_path}/images/train\n",
        "train: list.txt\n",
    ):
        (tmp_path / "data.yaml").write_text(f"names: [cat, dog]\n{text}")
        (tmp_path / "list.txt").write_text("./images/train/a.png\n\n")
        assert [name for name, _, _ in objects(f"yolo:{tmp_path}/data.yaml")] == ["cat"], text
        assert objects(f"yolo:{tmp_path}")  # the folder of the yaml
    (tmp_path / "list.txt").write_text("images/train/a.png\nimages/train/b.png\n")
    message = error_of(f"yolo:{tmp_path}/data.yaml", FileNotFoundError)
    assert f"{tmp_path}/list.txt, line 2" in message and "b.png" in message
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\ntrain: images/trian\n")
    message = error_of(f"yolo:{tmp_path}/data.yaml", FileNotFoundError)
    assert "train is images/trian" in message and f"{tmp_path}/images/trian" in message


def test_yolo_classes_may_be_numbered_in_text(tmp_path):
    spec = yolo(tmp_path, "1 .5 .5 .5 .5\n", "names: {'1': dog, '0': 7}\n")
    assert objects(spec) == [("dog", [15, 10, 30, 20], None)]
    assert describe(spec).categories == {0: "7", 1: "dog"}


def test_yolo_without_any_label_file(tmp_path):
    spec = yolo(tmp_path, "")
    (tmp_path / "labels/train/a.txt").unlink()
    assert f"{tmp_path}/labels/train/a.txt" in error_of(spec, FileNotFoundError)


def test_yolo_image_that_is_none(tmp_path):
    spec = yolo(tmp_path, "0 .5 .5 .5 .5\n")
    (tmp_path / "images/train/b.png").write_bytes(b"no image")
    assert f"{tmp_path}/images/train/b.png" in error_of(spec)


def test_yolo_with_classes_in_a_text_file(tmp_path):
    write_image(tmp_path / "images/a.png", SIZE)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.txt").write_text("1 .5 .5 .5 .5\n")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert objects(f"yolo:{tmp_path}") == [("dog", [15, 10, 30, 20], None)]


def test_yolo_fractions_are_of_the_upright_image(tmp_path):
    spec = yolo(tmp_path, "0 .5 .25 .5 .5\n")
    image = Image.new("RGB", SIZE)  # 40 wide, 60 high, as stored
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "images/train/a.png", exif=exif)
    assert objects(spec) == [("cat", [15, 0, 30, 20], None)]


def test_yolo_keypoints_are_left_out(tmp_path, caplog):
    spec = yolo(tmp_path, "0 .5 .5 .5 .5 .1 .1 2 .2 .2 1\n", "names: [cat]\nkpt_shape: [2, 3]\n")
    with caplog.at_level(logging.WARNING):
        assert objects(spec) == [("cat", [15, 10, 30, 20], None)]
    assert "keypoints" in caplog.text and "a.txt, line 1" in caplog.text


# Pascal VOC


def voc_object(name, box, more=""):
    names = ("xmin", "ymin", "xmax", "ymax")
    sides = "".join(f"<{k}>{v}</{k}>" for k, v in zip(names, box, strict=False))
    return f"<object>\n<name>{name}</name>{more}<bndbox>{sides}</bndbox></object>\n"


def voc(folder, content, name="a"):
    """A folder as LabelImg writes it."""
    write_image(folder / f"{name}.png", SIZE)
    text = f"<annotation>\n<filename>{name}.png</filename>\n{content}</annotation>\n"
    (folder / f"{name}.xml").write_text(text)
    return f"voc:{folder}"


def test_voc_counts_pixels_from_one_and_ignores_difficult_objects(tmp_path):
    content = voc_object("cat", (1, 1, 60, 40)) + voc_object(
        "dog", (11, 21, 20, 30), "<difficult>1</difficult>"
    )
    spec = voc(tmp_path, content)
    (record,) = get_dataset_dicts(spec)
    assert (record["height"], record["width"]) == SIZE  # from the header: the XML has no size
    cat, dog = record["annotations"]
    assert (cat["bbox"], cat["iscrowd"]) == ([0, 0, 60, 40], 0)
    assert (dog["bbox"], dog["iscrowd"]) == ([10, 20, 10, 10], 1)
    (record,) = get_dataset_dicts(spec, crowd="keep")
    assert [a["iscrowd"] for a in record["annotations"]] == [0, 0]
    assert list(describe(spec).categories.values()) == ["cat", "dog"]


def test_voc_images_without_annotations_are_left_out(tmp_path):
    spec = voc(tmp_path, voc_object("cat", (1, 1, 60, 40)))
    write_image(tmp_path / "b.png", SIZE)
    assert describe(spec).num_images == 1


@pytest.mark.parametrize(
    "content, words",
    [
        ("<object><name>cat</name></object>", ["line 3", "object 1", "bndbox"]),
        (voc_object("cat", (1, 1, 2)), ["line 3", "object 1"]),
        (voc_object("cat", (1, "x", 2, 3)), ["line 4", "ymin", "'x'"]),
        (voc_object("cat", (1, "nan", 2, 3)), ["line 4", "ymin", "'nan'"]),
        (voc_object("cat", (9, 1, 2, 3)), ["line 3", "object 1", "9"]),
        (voc_object("", (1, 1, 2, 3)), ["line 3", "no class"]),
        (voc_object("cat", (70, 1, 80, 3)), ["line 3", "outside"]),
        ("<object>", ["line 3", "mismatched"]),
    ],
)
def test_voc_files_that_cannot_be_read(tmp_path, content, words):
    message = error_of(voc(tmp_path, content))
    assert message.startswith(f"{tmp_path}/a.xml"), message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "text, word",
    [
        ("", "no element"),
        ("<annotations/>", "<annotation>"),
        ("not xml", "XML"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "DOCTYPE"),
    ],
)
def test_voc_files_that_are_none(tmp_path, text, word):
    spec = voc(tmp_path, "")
    (tmp_path / "a.xml").write_text(text)
    message = error_of(spec)
    assert message.startswith(f"{tmp_path}/a.xml") and word in message


def test_voc_missing_files_are_named(tmp_path):
    spec = write_voc(tmp_path)
    names = list(scenes("train"))
    images = tmp_path / "ImageSets/Main/train.txt"
    images.write_text("\n".join(f"{name}.png" for name in names))
    assert describe(spec).num_images == 4
    images.write_text("\n")
    assert error_of(spec).startswith(str(images))
    images.write_text("\n".join(names))
    (tmp_path / "JPEGImages" / f"{names[0]}.png").unlink()
    assert names[0] in error_of(spec, FileNotFoundError)
    (tmp_path / "Annotations" / f"{names[1]}.xml").unlink()
    message = error_of(spec, FileNotFoundError)
    assert f"{names[1]}.xml" in message and "train.txt" in message


def test_voc_without_masks_has_boxes(tmp_path):
    spec = write_voc(tmp_path, masks=False)
    assert not describe(spec).has_masks


def test_voc_masks_by_color_and_by_overlap(tmp_path):
    """Colors of VOC's palette stand for their index; other numbers are matched by the boxes."""
    boxes = [(6, 6, 25, 25), (31, 6, 50, 25)]
    content = "".join(voc_object("cat", box) for box in boxes)
    write_image(tmp_path / "JPEGImages/a.png", SIZE)
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations/a.xml").write_text(f"<annotation>{content}</annotation>")
    left = np.zeros(SIZE, bool)
    left[5:25, 5:25] = True
    right = np.roll(left, 25, axis=1)
    colors = np.zeros((*SIZE, 3), np.uint8)
    colors[left], colors[right], colors[30] = (128, 0, 0), (0, 128, 0), (224, 224, 192)
    swapped = (2 * left + right).astype(np.uint8)
    for pixels in (colors, swapped):
        write_png(tmp_path / "SegmentationObject/a.png", pixels)
        for (_, _, mask), expected in zip(objects(f"voc:{tmp_path}"), (left, right), strict=True):
            assert (mask == expected).all()
    write_png(tmp_path / "SegmentationObject/a.png", swapped[:20])
    message = error_of(f"voc:{tmp_path}")
    assert "SegmentationObject/a.png" in message and "60x20" in message


def test_voc_classes_may_be_listed(tmp_path):
    spec = voc(tmp_path, voc_object("cat", (1, 1, 9, 9)))
    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\nzebra\ncat\n")
    assert list(describe(spec).categories.values()) == ["zebra", "cat"]
    (tmp_path / "labels.txt").write_text("dog\n")
    message = error_of(spec)
    assert "a.xml, line 3" in message and "'cat'" in message and "labels.txt" in message


def test_voc_folders_as_splits(tmp_path):
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        voc(tmp_path / split, voc_object("cat", (1, 1, 9, 9)), split)
    assert describe(f"voc:{tmp_path}").num_images == 1
    (record,) = get_dataset_dicts(f"voc:{tmp_path}:val")
    assert record["file_name"] == f"{tmp_path}/valid/valid.png"


# CVAT


def cvat(folder, shapes, labels=("cat", "dog"), attributes=""):
    write_image(folder / "images/a.png", SIZE)
    listed = "".join(f"<label><name>{name}</name></label>" for name in labels)
    lines = [f"<annotations><meta><task><labels>{listed}</labels></task></meta>"]
    lines += [f'<image name="a.png" width="60" height="40" {attributes}>', *shapes]
    (folder / "annotations.xml").write_text("\n".join([*lines, "</image></annotations>"]))
    return f"cvat:{folder}/annotations.xml:{folder}/images"


def test_cvat_shapes(tmp_path, caplog):
    mask = mask_of(LSHAPE, SIZE)
    text = rle_text(mask[5:25, 5:25])
    shapes = [
        '<box label="cat" xtl="1.5" ytl="2" xbr="11.5" ybr="22"><attribute/></box>',
        '<box label="cat" xtl="20" ytl="10" xbr="40" ybr="20" rotation="90"/>',
        f'<mask label="dog" rle="{text}" left="5" top="5" width="20" height="20"/>',
        '<polygon label="dog" points="30,5;40,5;40,15;30,15" group_id="3"/>',
        '<polygon label="dog" points="45,5;55,5;55,15;45,15" group_id="3"/>',
        '<polygon label="cat" points="30,25;40,25;40,35;30,35" group_id="3"/>',
        '<ellipse label="cat" cx="30" cy="20" rx="10" ry="5" rotation="90"/>',
        '<polyline label="cat" points="1,1;2,2"/>',
        '<points label="cat" points="1,1"/>',
        '<points label="cat" points="1,1"/>',
    ]
    with caplog.at_level(logging.WARNING):
        found = objects(cvat(tmp_path, shapes))
    assert found[:2] == [("cat", [1.5, 2, 10, 20], None), ("cat", [25, 5, 10, 20], None)]
    assert found[2][:2] == ("dog", [5, 5, 20, 20]) and (found[2][2] == mask).all()
    assert found[3][:2] == ("dog", [30, 5, 25, 10]) and found[3][2].sum() == 200
    assert found[4][:2] == ("cat", [30, 25, 10, 10])
    assert found[5][0] == "cat" and np.allclose(found[5][1], [25, 10, 10, 20], atol=0.1)
    assert abs(found[5][2].sum() - np.pi * 50) < 5
    assert "<polyline>" in caplog.text and "<points>" in caplog.text and ": 2 " in caplog.text


@pytest.mark.parametrize(
    "shape, words",
    [
        ('<box label="cat" xtl="1" ytl="2" xbr="11"/>', ["line 3", "ybr"]),
        ('<box label="cat" xtl="1" ytl="2" xbr="11" ybr="nan"/>', ["line 3", "ybr", "nan"]),
        ('<box label="cow" xtl="1" ytl="2" xbr="11" ybr="9"/>', ["line 3", "'cow'", "cat, dog"]),
        ('<box label="cat" xtl="9" ytl="2" xbr="1" ybr="9"/>', ["line 3", "no area"]),
        ('<polygon label="cat" points="1,2;3"/>', ["line 3", "points"]),
        ('<polygon label="cat" points="1,2;3,4"/>', ["line 3", "points"]),
        ('<mask label="cat" rle="3,4" left="0" top="0" width="3" height="3"/>', ["line 3", "rle"]),
        ('<mask label="cat" rle="0,9" left="58" top="0" width="3" height="3"/>', ["line 3"]),
        ('<star label="cat"/>', ["line 3", "<star>"]),
    ],
)
def test_cvat_shapes_that_cannot_be_read(tmp_path, shape, words):
    message = error_of(cvat(tmp_path, [shape]))
    assert message.startswith(f"{tmp_path}/annotations.xml"), message
    assert all(word in message for word in words), message


def test_cvat_frames_of_videos_have_no_suffix(tmp_path):
    spec = cvat(tmp_path, ['<box label="cat" xtl="1" ytl="2" xbr="11" ybr="9"/>'])
    path = tmp_path / "annotations.xml"
    path.write_text(path.read_text().replace("a.png", "frame_000001"))
    (tmp_path / "images/a.png").rename(tmp_path / "images/frame_000001.png")
    (record,) = get_dataset_dicts(spec)
    assert record["file_name"] == f"{tmp_path}/images/frame_000001.png"


def test_cvat_for_video_is_rejected(tmp_path):
    spec = cvat(tmp_path, [])
    (tmp_path / "annotations.xml").write_text("<annotations>\n<track/></annotations>")
    assert "annotations.xml, line 2" in error_of(spec) and "for images" in error_of(spec)


def test_cvat_finds_the_images_beside_the_xml(tmp_path):
    spec = cvat(tmp_path, ['<box label="cat" xtl="1" ytl="2" xbr="11" ybr="9"/>'], labels=())
    assert objects(spec) == objects(spec.removesuffix(f":{tmp_path}/images"))
    assert list(describe(spec).categories.values()) == ["cat"]
    (tmp_path / "images/a.png").unlink()
    assert "a.png" in error_of(spec, FileNotFoundError)


# labelme


def labelme(folder, shapes, **more):
    write_image(folder / "a.png", SIZE)
    data = {"shapes": shapes, "imagePath": "a.png", "imageHeight": 40, "imageWidth": 60, **more}
    (folder / "a.json").write_text(json.dumps(data))
    return f"labelme:{folder}"


def square(x, y, side=10):
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side]]


def test_labelme_shapes(tmp_path, caplog):
    mask = mask_of(LSHAPE, SIZE)
    shapes = [
        labelme_shape("cat", [[11, 22], [1, 2]], "rectangle"),
        labelme_shape("dog", square(5, 5)),
        labelme_shape("dog", [[30, 20], [30, 30]], "circle"),
        labelme_shape("cat", [[5, 5], [24, 24]], "mask", mask=png_text(mask[5:25, 5:25])),
        labelme_shape("cat", square(30, 5), group_id=1),
        labelme_shape("cat", square(45, 5), group_id=1),
        labelme_shape("dog", square(45, 25), group_id=1),
        labelme_shape("nose", [[1, 1]], "point"),
        labelme_shape("nose", [[1, 1], [2, 2]], "line"),
    ]
    del shapes[1]["shape_type"]  # as in early versions
    data = {"imagePath": "..\\photos\\a.png", "imageData": "AAAA"}
    write_image(tmp_path / "b.png", SIZE)  # not annotated
    with caplog.at_level(logging.WARNING):
        found = objects(labelme(tmp_path, shapes, **data), filter_empty=False)
    assert found[0] == ("cat", [1, 2, 10, 20], None)
    assert found[1][:2] == ("dog", [5, 5, 10, 10]) and found[1][2].sum() == 100
    assert found[2][:2] == ("dog", [20, 10, 20, 20])
    assert abs(found[2][2].sum() - np.pi * 100) < 10
    assert found[3][:2] == ("cat", [5, 5, 20, 20]) and (found[3][2] == mask).all()
    assert found[4][:2] == ("cat", [30, 5, 25, 10]) and found[4][2].sum() == 200
    assert found[5][:2] == ("dog", [45, 25, 10, 10])
    assert "type point" in caplog.text and "type line" in caplog.text and "b.png" in caplog.text
    assert list(describe(f"labelme:{tmp_path}").categories.values()) == ["cat", "dog"]


@pytest.mark.parametrize(
    "shape, words",
    [
        (labelme_shape("cat", [[1, 2], [3, 4]]), ["shape 2 (cat)", "2 points"]),
        (labelme_shape("cat", [[1, 2], [3, None], [5, 6]]), ["shape 2 (cat)", "points"]),
        (labelme_shape("cat", [[1, 2], [3, float("nan")], [5, 6]]), ["shape 2 (cat)", "points"]),
        (labelme_shape("cat", "x"), ["shape 2 (cat)", "points"]),
        (labelme_shape("cat", square(1, 1), "star"), ["shape 2 (cat)", "'star'"]),
        (labelme_shape("cat", [[1, 2]], "circle"), ["shape 2 (cat)", "circle"]),
        (labelme_shape(None, square(1, 1)), ["shape 2", "no class"]),
        (labelme_shape(3, square(1, 1)), ["shape 2", "class 3", "text"]),
        (labelme_shape("cat", square(100, 1)), ["shape 2 (cat)", "outside"]),
        (labelme_shape("cat", [[1, 1], [2, 2]], "mask", mask="AAAA"), ["shape 2 (cat)", "mask"]),
        (labelme_shape("cat", [[1, 1], [2, 2]], "mask"), ["shape 2 (cat)", "mask"]),
        (
            labelme_shape("cat", [[50, 1], [2, 2]], "mask", mask=png_text(np.ones((5, 60)))),
            ["shape 2 (cat)", "leaves"],
        ),
    ],
)
def test_labelme_shapes_that_cannot_be_read(tmp_path, shape, words):
    message = error_of(labelme(tmp_path, [labelme_shape("cat", square(1, 1)), shape]))
    assert message.startswith(f"{tmp_path}/a.json"), message
    assert all(word in message for word in words), message


def test_labelme_image_path_decides_between_images_of_one_name(tmp_path):
    spec = labelme(tmp_path, [labelme_shape("cat", square(1, 1))])
    write_image(tmp_path / "a.jpg", SIZE)
    (record,) = get_dataset_dicts(spec)
    assert record["file_name"] == f"{tmp_path}/a.png"


def test_labelme_two_files_of_one_image_are_rejected(tmp_path):
    spec = labelme(tmp_path, [labelme_shape("cat", square(1, 1))])
    (tmp_path / "b.json").write_text((tmp_path / "a.json").read_text())
    message = error_of(spec)
    assert f"{tmp_path}/a.json" in message and f"{tmp_path}/b.json" in message


def test_labelme_folders_with_other_classes_are_told_to_list_them(tmp_path):
    specs = []
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        specs.append(labelme(tmp_path / name, [labelme_shape(name, square(1, 1))]))
    assert f"{tmp_path}/dog/labels.txt" in error_of(specs)
    for name in ("cat", "dog"):
        (tmp_path / name / "labels.txt").write_text("cat\ndog\n")
    assert len(get_dataset_dicts(specs)) == 2


def test_labelme_files_that_are_broken(tmp_path):
    spec = labelme(tmp_path, [labelme_shape("cat", square(1, 1))])
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "settings.json").write_text("{}")  # other files are ignored
    assert len(objects(spec)) == 1
    (tmp_path / "a.json").write_text(text[:-10])
    assert error_of(spec).startswith(f"{tmp_path}/a.json: not a complete json")
    (tmp_path / "a.json").write_text('{"shapes": 3}')
    assert error_of(spec).startswith(f"{tmp_path}/a.json: ")
    (tmp_path / "a.json").write_text(text.replace("60", "61"))
    assert "60x40" in error_of(spec) and "61x40" in error_of(spec)  # the size of the image
    (tmp_path / "a.json").write_text(text)
    (tmp_path / "a.png").unlink()
    assert "a.png" in error_of(spec, FileNotFoundError)


# Folders of masks


def test_masks_as_files_values_and_colors(tmp_path):
    left, right = np.zeros((2, *SIZE), bool)
    left[5:15, 5:25] = True
    right[20:30, 30:40] = True
    expected = [("object", [5, 5, 20, 10]), ("object", [30, 20, 10, 10])]
    write_image(tmp_path / "images/a.jpg", SIZE)
    colors = np.zeros((*SIZE, 3), np.uint8)
    colors[left], colors[right] = (9, 1, 0), (0, 2, 0)
    variants = {
        "values": {"a.png": (7 * left + 200 * right).astype(np.uint8)},
        "wide": {"a.png": (7 * left + 2000 * right).astype(np.uint16)},
        "colors": {"a_mask.png": colors},
        "files": {"a/1.png": (left * 255).astype(np.uint8), "a/2.png": right.astype(np.uint8)},
        "classes": {"object/a/1.png": left, "object/a/2.png": right},
    }
    for name, files in variants.items():
        write_image(tmp_path / name / "images/a.jpg", SIZE)
        for path, pixels in files.items():
            write_png(tmp_path / name / "masks" / path, pixels)
        found = objects(f"masks:{tmp_path}/{name}")
        found.sort(key=lambda item: item[1])
        assert [item[:2] for item in found] == expected, name
        assert (found[0][2] == left).all() and (found[1][2] == right).all()


def test_masks_of_the_data_science_bowl(tmp_path):
    mask = np.zeros(SIZE, np.uint8)
    mask[3:6, 3:9] = 255
    for name in ("0a1", "0b2"):
        write_image(tmp_path / name / "images" / f"{name}.png", SIZE)
        for number in range(2):
            write_png(tmp_path / name / "masks" / f"{number}ff.png", np.roll(mask, 9 * number))
    records = get_dataset_dicts(f"masks:{tmp_path}")
    assert [len(record["annotations"]) for record in records] == [2, 2]


def test_masks_that_cannot_be_read(tmp_path):
    spec = write("masks", tmp_path)
    name = next(iter(scenes("train")))
    folder = tmp_path / "train/masks/box"
    path = next(folder.iterdir())
    pixels = np.asarray(Image.open(path))
    write_png(path, pixels[:-1])
    assert str(path) in error_of(spec) and "47 pixels" in error_of(spec)
    path.write_bytes(b"no image")
    assert str(path) in error_of(spec)
    write_png(path, pixels)
    write_png(folder / "other.png", pixels)
    assert "other.png" in error_of(spec)
    (folder / "other.png").unlink()
    Image.fromarray(pixels).save(folder / f"{name}.jpg")
    assert f"{name}.jpg" in error_of(spec) and "PNG" in error_of(spec)


def test_masks_of_float_values(tmp_path):
    write_image(tmp_path / "images/a.png", SIZE)
    (tmp_path / "masks").mkdir()
    values = np.zeros(SIZE, np.float32)
    values[2:9, 3:9], values[12:19, 3:9] = 300, 400  # as floats are shown, both are white
    Image.fromarray(values).save(tmp_path / "masks/a.tif")
    assert [item[1] for item in objects(f"masks:{tmp_path}")] == [[3, 2, 6, 7], [3, 12, 6, 7]]
    Image.fromarray(values + 0.5).save(tmp_path / "masks/a.tif")
    assert "masks/a.tif" in error_of(f"masks:{tmp_path}")


@pytest.mark.parametrize("layout", ["labelme", "cvat"])
def test_data_without_any_object_have_no_classes(tmp_path, layout):
    spec = labelme(tmp_path, []) if layout == "labelme" else cvat(tmp_path, [], labels=())
    message = error_of(spec)
    assert message.startswith(str(tmp_path)) and "annotate" in message


def test_black_and_white_masks_are_logged(tmp_path, caplog):
    write_image(tmp_path / "images/a.png", SIZE)
    write_image(tmp_path / "images/b.png", SIZE)
    write_png(tmp_path / "masks/a.png", (mask_of(LSHAPE, SIZE) * 255).astype(np.uint8))
    with caplog.at_level(logging.WARNING):
        assert len(objects(f"masks:{tmp_path}")) == 1
    assert "masks/a.png" in caplog.text and "images/b.png" in caplog.text


# Evaluation


@pytest.mark.parametrize("layout", sorted(reading.READERS))
def test_perfect_predictions_have_full_ap(tmp_path, layout):
    spec = write(layout, tmp_path) + ":val"
    evaluator = COCOEvaluator(spec, output_dir=str(tmp_path / "out"), distributed=False)
    names = list(describe(spec).categories.values())
    for record in get_dataset_dicts(spec, filter_empty=False):
        stem = record["file_name"].rpartition("/")[2].removesuffix(".png")
        size, expected = scenes("val")[stem]
        instances = Instances(size)
        boxes = torch.tensor([box_of(polygon) for _, polygon in expected], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        instances.pred_boxes = Boxes(boxes)
        instances.scores = torch.full((len(expected),), 0.9)
        instances.pred_classes = torch.tensor([names.index(label) for label, _ in expected])
        masks = np.stack([mask_of(polygon, size) > 0 for _, polygon in expected])
        instances.pred_masks = torch.from_numpy(masks)
        evaluator.process([record], [{"instances": instances}])
    results = evaluator.evaluate()
    detections = json.loads((tmp_path / "out/coco_instances_results.json").read_text())
    if layout != "coco":  # the id of an image is its path
        root = MetadataCatalog.get(spec).image_root
        assert all(os.path.isfile(os.path.join(root, d["image_id"])) for d in detections)
    assert results["bbox"]["AP"] == pytest.approx(100) == results["segm"]["AP"]
