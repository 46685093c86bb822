"""Small datasets as COCO json, and ways to write them."""

import json

from PIL import Image

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
