"""A dataset of rectangles, detections around them, and their evaluation."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.structures import Boxes, Instances

from crossmae_det.detection import COCOEvaluator

HEIGHT, WIDTH = 96, 120
CATEGORY_IDS = (3, 7, 9)  # 9 never has ground truth
both_backends = pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])


def rectangle(x, y, w, h):
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[y : y + h, x : x + w] = 1
    return mask


def rle(mask):
    encoded = mask_util.encode(np.asfortranarray(mask))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def make_dataset(seed=0, num_images=8):
    """Polygons, a crowd as RLE on every third image, and no object at all on the last image."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for image_id in range(10, 10 + num_images):
        images.append({"id": image_id, "file_name": f"{image_id}.jpg", "height": HEIGHT})
        images[-1]["width"] = WIDTH
        for number in range(0 if image_id == 9 + num_images else 5):
            w, h = (int(v) for v in rng.integers(8, 60, 2))
            x, y = int(rng.integers(0, WIDTH - w)), int(rng.integers(0, HEIGHT - h))
            crowd = int(number == 4 and image_id % 3 == 0)
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(CATEGORY_IDS[rng.integers(0, 2)]),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": crowd,
                    "segmentation": rle(rectangle(x, y, w, h)) if crowd else [polygon],
                }
            )
    categories = [{"id": i, "name": f"class{i}"} for i in CATEGORY_IDS]
    return {"images": images, "annotations": annotations, "categories": categories}


def instances(boxes, scores, classes, masks=None, size=(HEIGHT, WIDTH)):
    result = Instances(size)
    result.pred_boxes = Boxes(torch.as_tensor(np.array(boxes), dtype=torch.float32).reshape(-1, 4))
    result.scores = torch.as_tensor(np.array(scores), dtype=torch.float32)
    result.pred_classes = torch.as_tensor(np.array(classes), dtype=torch.int64)
    if masks is not None:
        result.pred_masks = torch.as_tensor(np.array(masks, dtype=bool)).reshape(-1, *size)
    return result


def perturbed(dicts, seed=0, masks=True, shift=5):
    """(inputs, outputs): two detections around most objects, and some anywhere."""
    rng = np.random.default_rng(seed)
    num_scores = sum(3 * len(d["annotations"]) + 5 for d in dicts)
    scores = list(rng.permutation(np.linspace(0.01, 0.99, num_scores)))
    outputs = []
    for record in dicts:
        height, width = record["height"], record["width"]
        boxes, classes, bitmaps = [], [], []
        targets = [(a["bbox"], a["category_id"]) for a in record["annotations"] for _ in range(2)]
        targets = [t for t in targets if rng.random() < 0.8]
        targets += [([rng.uniform(0, width), rng.uniform(0, height), 20, 30], 0)] * 3
        for (x, y, w, h), category in targets:
            x, y, w, h = np.array([x, y, w, h]) + rng.uniform(-shift, shift, 4)
            x0, y0 = np.clip([x, y], 0, [width - 2, height - 2])
            x1, y1 = np.clip([x0 + max(w, 2), y0 + max(h, 2)], 2, [width, height])
            boxes.append([x0, y0, x1, y1])
            classes.append(category)
            bitmap = np.zeros((height, width), dtype=bool)
            bitmap[round(y0) : round(y1), round(x0) : round(x1)] = True
            bitmaps.append(bitmap)
        taken = [scores.pop() for _ in boxes]
        outputs.append(
            {
                "instances": instances(
                    boxes, taken, classes, bitmaps if masks else None, (height, width)
                )
            }
        )
    return dicts, outputs


def run(name, inputs, outputs, **options):
    evaluator = COCOEvaluator(name, **options)
    evaluator.reset()
    evaluator.process(inputs, outputs)
    return evaluator.evaluate()


def assert_same(first, second, tolerance=1e-6):
    assert first.keys() == second.keys()
    for task, values in first.items():
        assert values.keys() == second[task].keys()
        for key, value in values.items():
            assert value == pytest.approx(second[task][key], abs=tolerance, nan_ok=True), key
