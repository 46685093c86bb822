"""Small datasets as COCO json, and ways to write them."""

import json

from PIL import Image

SQUARE = [[2, 2, 10, 2, 10, 10, 2, 10]]


def annotation(id_, image_id, category_id, **changes):
    value = {"id": id_, "image_id": image_id, "category_id": category_id}
    value |= {"bbox": [2, 2, 8, 8], "area": 64, "iscrowd": 0, "segmentation": SQUARE}
    return {**value, **changes}


def example(**changes):
    """Three images and two categories, unordered; image 5 has only a crowd region.

    ``changes`` are of annotation 12, on image 3; None as a value stays, ... removes the key.
    """
    crowd = {"size": [16, 24], "counts": [10, 20, 16 * 24 - 30]}
    changed = annotation(12, 3, 2) | changes
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": 16, "width": 24} for i in (7, 3, 5)
        ],
        "categories": [{"id": 9, "name": "nine"}, {"id": 2, "name": "two"}],
        "annotations": [
            annotation(11, 7, 9),
            {key: value for key, value in changed.items() if value is not ...},
            annotation(13, 3, 9),
            annotation(14, 5, 2, iscrowd=1, segmentation=crowd),
        ],
    }


def write(folder, content, images=True):
    """Write a json, given as its content or as text, and its images; returns the dataset spec."""
    json_file, image_root = folder / "set.json", folder / "images"
    json_file.write_text(content if isinstance(content, str) else json.dumps(content))
    image_root.mkdir(exist_ok=True)
    if images and isinstance(content, dict):
        for image in content["images"]:
            file = image_root / image["file_name"]
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (image["width"], image["height"])).save(file)
    return f"{json_file}:{image_root}"
