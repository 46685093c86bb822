"""One small dataset in every layout that can be read, written from the same objects."""

import base64
import io
import json
import os

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

NAMES = ["ring", "box", "two words"]  # not in alphabetical order
SPLITS = ("train", "val")
LAYOUTS = ("coco", "yolo", "voc", "cvat", "labelme", "masks")


def scene(number):
    """An image's size and objects, (class, polygon with whole coordinates), which do not overlap.

    Together, the images of a split have every class; every second image has an even width.
    """
    height, width = 48, 64 + number % 2
    cells = [(4, 4), (34, 4), (4, 26), (34, 26)]
    objects = []
    for k, (x, y) in enumerate(cells[: 1 + number % 4]):
        name = NAMES[(number + k) % 3]
        w, h = 12 + 2 * k, 10 + number % 3
        polygon = [x, y, x + w, y, x + w, y + h, x + w // 2, y + h, x + w // 2, y + h - 4, x, y + h]
        objects.append((name, polygon))
    return (height, width), objects


def scenes(split):
    """Name of an image (without suffix) -> its scene."""
    start = 0 if split == "train" else 10
    return {f"{split} é_{n}": scene(n) for n in range(start, start + 4)}


def box_of(polygon):
    xs, ys = polygon[::2], polygon[1::2]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def mask_of(polygon, size):
    """As pycocotools rasterizes: the lower and right edges are outside."""
    return mask_util.decode(mask_util.frPyObjects([polygon], *size))[..., 0]


def write_image(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(path)


def write_png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write(layout, folder):
    """Write train and val; returns the dataset string without a split."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "coco": write_coco,
        "yolo": write_yolo,
        "voc": write_voc,
        "cvat": write_cvat,
        "labelme": write_labelme,
        "masks": write_masks,
    }[layout](folder)


def write_coco(folder):
    for split in SPLITS:
        content = {"images": [], "annotations": []}
        content["categories"] = [{"id": i, "name": name} for i, name in enumerate(NAMES)]
        for name, (size, objects) in scenes(split).items():
            write_image(folder / split / f"{name}.png", size)
            image = {"id": len(content["images"]) + 1, "file_name": f"{name}.png"}
            content["images"].append({**image, "height": size[0], "width": size[1]})
            for label, polygon in objects:
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": image["id"],
                        "category_id": NAMES.index(label),
                        "bbox": box_of(polygon),
                        "segmentation": [polygon],
                        "iscrowd": 0,
                    }
                )
        (folder / split / "_annotations.coco.json").write_text(json.dumps(content))
    return f"coco:{folder}"


def write_yolo(folder):
    for split in SPLITS:
        for name, ((height, width), objects) in scenes(split).items():
            write_image(folder / "images" / split / f"{name}.png", (height, width))
            rows = []
            for label, polygon in objects:
                values = [v / (width, height)[i % 2] for i, v in enumerate(polygon)]
                rows.append(" ".join(map(str, [NAMES.index(label), *values])))
            path = folder / "labels" / split / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(rows) + "\n")
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(NAMES))
    path = folder / "data.yaml"
    path.write_text(f"train: images/train\nval: images/val\nnc: 3\nnames:\n{names}")
    return f"yolo:{path}"


def write_voc(folder, masks=True):
    for split in SPLITS:
        for name, ((height, width), objects) in scenes(split).items():
            write_image(folder / "JPEGImages" / f"{name}.png", (height, width))
            numbers = np.zeros((height, width), np.uint8)
            lines = [f"<annotation><filename>{name}.png</filename>"]
            lines += [f"<size><width>{width}</width><height>{height}</height></size>"]
            for number, (label, polygon) in enumerate(objects, start=1):
                x, y, w, h = box_of(polygon)
                numbers[mask_of(polygon, (height, width)) > 0] = number
                lines += [f"<object><name>{label}</name><difficult>0</difficult><bndbox>"]
                lines += [f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"]
                lines += [f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"]
            path = folder / "Annotations" / f"{name}.xml"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join([*lines, "</annotation>"]), encoding="utf-8")
            if masks:
                image = Image.fromarray(numbers)
                image.putpalette([c for i in range(256) for c in (i, 255 - i, 7)])
                (folder / "SegmentationObject").mkdir(exist_ok=True)
                image.save(folder / "SegmentationObject" / f"{name}.png")
        path = folder / "ImageSets" / "Main" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(scenes(split)) + "\n", encoding="utf-8")
        (path.parent / f"box_{split}.txt").write_text("\n".join(f"{n}  1" for n in scenes(split)))
    return f"voc:{folder}"


def write_cvat(folder):
    labels = "".join(f"<label><name>{name}</name></label>" for name in NAMES)
    lines = ["<?xml version='1.0' encoding='utf-8'?>", "<annotations><version>1.1</version>"]
    lines += [f"<meta><project><labels>{labels}</labels></project></meta>"]
    for split, subset in zip(SPLITS, ("Train", "Validation"), strict=True):
        for name, ((height, width), objects) in scenes(split).items():
            write_image(folder / "images" / subset / f"{name}.png", (height, width))
            sides = f'width="{width}" height="{height}"'
            lines += [f'<image id="0" name="{name}.png" subset="{subset}" {sides}>']
            for label, polygon in objects:
                pairs = zip(polygon[::2], polygon[1::2], strict=True)
                points = ";".join(f"{x}.00,{y}.00" for x, y in pairs)
                lines += [f'<polygon label="{label}" points="{points}" z_order="0"></polygon>']
            lines += ["</image>"]
    path = folder / "annotations.xml"
    path.write_text("\n".join([*lines, "</annotations>"]), encoding="utf-8")
    return f"cvat:{path}:{folder}/images"


def labelme_shape(label, points, shape_type="polygon", group_id=None, **more):
    shape = {"label": label, "points": points, "shape_type": shape_type, "group_id": group_id}
    return shape | more


def write_labelme(folder):
    for split in SPLITS:
        for name, ((height, width), objects) in scenes(split).items():
            write_image(folder / split / f"{name}.png", (height, width))
            shapes = []
            for label, polygon in objects:
                points = [list(p) for p in zip(polygon[::2], polygon[1::2], strict=True)]
                shapes.append(labelme_shape(label, points))
            data = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"{name}.png"}
            data |= {"imageData": None, "imageHeight": height, "imageWidth": width}
            (folder / split / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
    return f"labelme:{folder}"


def write_masks(folder):
    for split in SPLITS:
        for name, (size, objects) in scenes(split).items():
            write_image(folder / split / "images" / f"{name}.png", size)
            for label in NAMES:
                numbers = np.zeros(size, np.uint8)
                for k, (other, polygon) in enumerate(objects):
                    if other == label:
                        numbers[mask_of(polygon, size) > 0] = 40 * (k + 1)
                if numbers.any():
                    write_png(folder / split / "masks" / label / f"{name}.png", numbers)
    return f"masks:{folder}"


def png_text(mask):
    """A mask as labelme stores it."""
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(bool)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def rle_text(mask):
    """A mask as CVAT stores it: run lengths of its rows, zeros first."""
    flat = mask.ravel().astype(int)
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends, len(flat)]).tolist()
    return ", ".join(map(str, runs if flat[0] == 0 else [0, *runs]))


def by_image(records, classes):
    """Name of an image -> sorted (class, box, mask) of its objects."""
    result = {}
    for record in records:
        size = record["height"], record["width"]
        objects = []
        for annotation in record["annotations"]:
            mask = annotation.get("segmentation")
            if isinstance(mask, list):
                mask = sum(mask_of(polygon, size) for polygon in mask) > 0
            elif mask is not None:
                mask = mask_util.decode(mask) > 0
            objects.append((classes[annotation["category_id"]], annotation["bbox"], mask))
        name = os.path.splitext(os.path.basename(record["file_name"]))[0]
        result[name] = size, sorted(objects, key=lambda item: (item[1][1] > 20, item[1][0] > 30))
    return result
