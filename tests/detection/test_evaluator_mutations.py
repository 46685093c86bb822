"""A mutated COCO json gives the AP of the original, or a one-line error.

Fixed detections, made from the original, are evaluated on the mutated files as a user would: with
the records of the loader and the evaluator, images by file name and classes by name.
"""

import copy
import json
import os
import random

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from crossmae_det.detection import COCOEvaluator, get_dataset_dicts

CLASSES = {5: "cat", 1: "dog", 8: "bird"}  # of the model: ids of its own, in an order of its own
SIZES = [(70, 90), (64, 80), (96, 72), (60, 60), (80, 100)]  # height, width
MUTATIONS = 300


def rectangle(height, width, x, y, w, h):
    mask = np.zeros((height, width), np.uint8)
    mask[y : y + h, x : x + w] = 1
    return mask


def run_lengths(mask):
    encoded = mask_util.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def uncompressed(mask):
    pixels = np.concatenate([[0], mask.flatten(order="F"), [2]])
    ends = np.flatnonzero(np.diff(pixels.astype(int)))
    return {"size": list(mask.shape), "counts": np.diff([0, *ends]).tolist()}


def as_polygon(mask):
    ys, xs = np.nonzero(mask)
    x0, y0, x1, y1 = (int(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


FORMS = [as_polygon, run_lengths, uncompressed]


def clean():
    """Rectangles of small and medium size as masks of every form; one crowd region."""
    rng = random.Random(0)
    images, annotations = [], []
    for number, (height, width) in enumerate(SIZES):
        image_id = 20 - 3 * number
        name = f"photo {number}.png"
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for k in range(4):
            side = (12, 40)[k % 2]
            w, h = side + rng.randrange(8), side + rng.randrange(8)
            x, y = rng.randrange(width - w), rng.randrange(height - h)
            mask = rectangle(height, width, x, y, w, h)
            annotations.append(
                {
                    "id": 100 + len(annotations),
                    "image_id": image_id,
                    "category_id": rng.choice([3, 7, 9]),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int((number, k) == (1, 3)),
                    "segmentation": FORMS[(number + k) % 3](mask),
                }
            )
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "bird"}, {"id": 9, "name": "cat"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def detections():
    """File name -> detections of a model that is mostly right."""
    content, rng = clean(), random.Random(1)
    names = {category["id"]: category["name"] for category in content["categories"]}
    order = list(CLASSES.values())
    found = {}
    for image in content["images"]:
        height, width = image["height"], image["width"]
        boxes, scores, classes, masks = [], [], [], []
        for annotation in content["annotations"]:
            if annotation["image_id"] != image["id"]:
                continue
            for _ in range(2):
                x, y, w, h = (v + rng.randint(-4, 4) for v in annotation["bbox"])
                x, y = min(max(x, 0), width - 6), min(max(y, 0), height - 6)
                w, h = min(max(w, 5), width - x), min(max(h, 5), height - y)
                boxes.append([x, y, x + w, y + h])
                masks.append(rectangle(height, width, x, y, w, h).astype(bool))
                scores.append(rng.random())
                wrong = rng.random() < 0.2
                name = rng.choice(order) if wrong else names[annotation["category_id"]]
                classes.append(order.index(name))
        instances = Instances((height, width))
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        instances.scores = torch.tensor(scores)
        instances.pred_classes = torch.tensor(classes)
        instances.pred_masks = torch.from_numpy(np.stack(masks))
        found[image["file_name"]] = {"instances": instances}
    return found


# Mutations: each changes the content in place and returns what to expect: the "same" AP, a one-line
# error ("line"), or the same AP of boxes only ("box"), without a mask. Those of the whole file are
# applied before those of single values.


def permute_ids(content, rng):
    for key, refers in (("images", "image_id"), ("categories", "category_id")):
        entries = content[key]
        ids = [entry["id"] for entry in entries]
        new = dict(zip(ids, rng.sample(ids, len(ids)), strict=True))
        offset = rng.choice([0, 1000, -min(ids)])  # the last lets them begin at 0
        new = {old: id_ + offset for old, id_ in new.items()}
        for entry in entries:
            entry["id"] = new[entry["id"]]
        for annotation in content["annotations"]:
            annotation[refers] = new[annotation[refers]]
    ids = [annotation["id"] for annotation in content["annotations"]]
    for annotation, id_ in zip(
        content["annotations"], rng.sample(range(50), len(ids)), strict=True
    ):
        annotation["id"] = id_
    return "same"


def shuffle(content, rng):
    for key in ("images", "annotations", "categories"):
        rng.shuffle(content[key])
    for entry in content["annotations"]:
        items = list(entry.items())
        rng.shuffle(items)
        entry.clear()
        entry.update(items)
    return "same"


def text_ids(content, rng):
    for entry in content["images"]:
        entry["id"] = f"photo-{entry['id']}.png"
    for annotation in content["annotations"]:
        annotation["image_id"] = f"photo-{annotation['image_id']}.png"
    return "same"


def other_masks(content, rng):
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    form = rng.choice([*FORMS, None])
    for annotation in content["annotations"]:
        made = form or rng.choice(FORMS)
        mask = rectangle(*sizes[annotation["image_id"]], *annotation["bbox"])
        annotation["segmentation"] = made(mask)
    return "same"


def other_paths(content, rng):
    style = rng.choice(
        [
            lambda n: f"..\\..\\label-studio\\data\\upload\\1\\{n}",
            lambda n: f"/data/local-files/?d=images/{n}",
            lambda n: f"./{n}",
            lambda n: f"C:\\Users\\me\\{n}",
            lambda n: f"s3://bucket/a/{n.replace(' ', '%20')}",
        ]
    )
    for image in content["images"]:
        image["file_name"] = style(image["file_name"])
    return "same"


def values(content, rng):
    """A random number in the content: (the list or dict that holds it, its index or key)."""
    kind = rng.choice(["images", "annotations", "annotations", "annotations", "categories"])
    entry = rng.choice(content[kind])
    choices = [(entry, key) for key, value in entry.items() if is_number(value)]
    box = entry.get("bbox")
    if box:
        choices += [(box, k) for k in range(4)]
    mask = entry.get("segmentation")
    if isinstance(mask, dict):
        choices += [(mask["size"], 0), (mask["size"], 1)]
        if isinstance(mask["counts"], list):
            choices += [(mask["counts"], k) for k in range(len(mask["counts"]))]
    elif mask:
        choices += [(mask[0], k) for k in range(len(mask[0]))]
    return rng.choice(choices) if choices else None


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def all_of(content, rng, change):
    """Change one number, or the number under the same key in every entry of its list."""
    found = values(content, rng)
    if found is None:
        return "same"
    holder, key = found
    if isinstance(key, str) and rng.random() < 0.5:
        for entries in content.values():
            if any(entry is holder for entry in entries):
                for entry in entries:
                    if is_number(entry.get(key)):
                        entry[key] = change(entry[key])
                return "same"
    if is_number(holder[key]):
        holder[key] = change(holder[key])
    return "same"


def floats(content, rng):
    return all_of(content, rng, float)


def strings(content, rng):
    return all_of(content, rng, rng.choice([str, lambda v: f" {v}", lambda v: str(float(v))]))


REQUIRED = {
    "images": ["id", "file_name", "height", "width"],
    "annotations": ["id", "image_id", "category_id", "bbox"],
    "categories": ["id", "name"],
}


def lost(content, rng, change):
    kind = rng.choice(["images", "annotations", "annotations", "categories"])
    entry = rng.choice(content[kind])
    keys = list(REQUIRED[kind])
    if kind == "annotations":
        # Without iscrowd, a crowd region would become an object.
        keys += ["area", "segmentation"] + ["iscrowd"] * (not int(entry.get("iscrowd") or 0))
    key = rng.choice(keys)
    change(entry, key)
    if key == "segmentation":
        return "box"
    return "line" if key in REQUIRED[kind] else "same"


def nulls(content, rng):
    return lost(content, rng, lambda entry, key: entry.update({key: None}))


def missing(content, rng):
    return lost(content, rng, lambda entry, key: entry.pop(key, None))


def inner_nulls(content, rng):
    annotation = rng.choice(content["annotations"])
    if not annotation.get("bbox") or not annotation.get("segmentation"):
        return "same"
    mask = annotation["segmentation"]
    choices = [(annotation["bbox"], rng.randrange(4))]
    if isinstance(mask, list):
        choices.append((mask[0], rng.randrange(len(mask[0]))))
    elif isinstance(mask["counts"], list):
        choices.append((mask["counts"], rng.randrange(len(mask["counts"]))))
    holder, key = rng.choice(choices)
    holder[key] = None
    return "line"


def extra_keys(content, rng):
    junk = {
        "ignore": rng.choice([0, None, False]),
        "score": "?",
        "attributes": {"occluded": True},
        "keypoints": rng.choice([None, [], ["a", None]]),
        "num_keypoints": None,
        "bbox_mode": 0,
        "coco_url": None,
        "license": "1",
    }
    for entries in (content["images"], content["annotations"], content["categories"]):
        for entry in rng.sample(entries, rng.randint(1, len(entries))):
            entry.update({key: junk[key] for key in rng.sample(list(junk), 4)})
    content |= {"info": None, "licenses": [None]}
    return "same"


def no_polygons(content, rng):
    """Degenerate polygons beside good ones."""
    for annotation in content["annotations"]:
        if isinstance(annotation.get("segmentation"), list) and annotation["segmentation"]:
            bad = rng.choice([[1, 1, 5, 5], [], [2, 2], [1, 1, 5, 5, 9, 9], [1, 1, 5, 5, 1, 5, 3]])
            annotation["segmentation"].insert(rng.randint(0, 1), bad)
    return "same"


def flags(content, rng):
    for annotation in content["annotations"]:
        crowd = annotation.get("iscrowd")
        if crowd in (0, 1):
            annotation["iscrowd"] = rng.choice([bool(crowd), float(crowd), str(crowd), crowd])
    return "same"


def broken_runs(content, rng):
    masks = [
        a["segmentation"]
        for a in content["annotations"]
        if isinstance(a.get("segmentation"), dict)
        and isinstance(a["segmentation"].get("counts"), str)
    ]
    if not masks:
        return "same"
    mask = rng.choice(masks)
    counts = mask["counts"]
    mask["counts"] = rng.choice(
        [counts[: len(counts) // 2], counts + "5", counts + "o", "", "~", "\u00e9", counts + "P"]
    )
    return "line"


WHOLE = [permute_ids, shuffle, text_ids, other_masks, other_paths]
SINGLE = [floats, strings, nulls, missing, inner_nulls, extra_keys, no_polygons, flags, broken_runs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutations")
    (folder / "images").mkdir()
    for image in clean()["images"]:
        file = folder / "images" / image["file_name"]
        Image.new("RGB", (image["width"], image["height"])).save(file)
    return folder


def evaluate(folder, content, name, found, bom=False):
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content), encoding="utf-8-sig" if bom else "utf-8")
    spec = f"{path}:{folder / 'images'}"
    try:
        records = get_dataset_dicts(spec, categories=CLASSES, filter_empty=False)
        evaluator = COCOEvaluator(spec, categories=CLASSES)
        outputs = [found[os.path.basename(record["file_name"])] for record in records]
        evaluator.process(records, outputs)
        return evaluator.evaluate()
    finally:
        path.unlink()
        for catalog in (DatasetCatalog, MetadataCatalog):
            if spec in catalog:
                catalog.remove(spec)


def mutate(seed, count):
    rng = random.Random(seed)
    content = clean()
    chosen = [rng.choice(WHOLE if rng.random() < 0.3 else SINGLE) for _ in range(count)]
    chosen.sort(key=[*WHOLE, *SINGLE].index)
    expected = {mutation(content, rng) for mutation in chosen}
    return content, [mutation.__name__ for mutation in chosen], expected, rng.random() < 0.1


@pytest.mark.parametrize("count", [1, 2], ids=["alone", "in pairs"])
def test_mutations_keep_the_ap_or_are_one_line_errors(folder, count):
    found = detections()
    reference = evaluate(folder, clean(), f"clean {count}", found)
    assert 20 < reference["bbox"]["AP"] < 80 and 20 < reference["segm"]["AP"] < 80
    assert reference["segm"]["APs"] > 0 and reference["segm"]["APm"] > 0
    counts = {"same": 0, "line": 0, "box": 0}
    for seed in range(MUTATIONS):
        content, names, expected, bom = mutate(seed + count * 1000, count)
        case = f"seed {seed}: {names}"
        try:
            results = evaluate(folder, copy.deepcopy(content), f"{count} {seed}", found, bom)
        except (ValueError, OSError) as error:
            assert "line" in expected, f"{case}: {error}"
            assert "\n" not in str(error) and f"{count} {seed}.json" in str(error), case
            counts["line"] += 1
            continue
        assert "line" not in expected, case
        tasks = ["bbox"] if "box" in expected else ["bbox", "segm"]
        for task in tasks:
            for key, value in reference[task].items():
                np.testing.assert_allclose(results[task][key], value, err_msg=f"{case} {key}")
        counts["box" if "box" in expected else "same"] += 1
    assert counts["same"] > MUTATIONS / 3 and counts["line"] > MUTATIONS / 6, counts
