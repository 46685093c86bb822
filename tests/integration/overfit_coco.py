#!/usr/bin/env python3
"""Learning is real: a small Mask R-CNN learns eight photographs of COCO by heart.

    python tests/integration/overfit_coco.py /path/to/coco [--output FOLDER] [overrides]

Takes the first eight training images that have one to eight objects and no crowd, trains on them,
evaluates on the same eight, and fails unless box AP50 > 80 and mask AP50 > 70. Minutes on two
cores; not part of `make test`.
"""

import argparse
import json
import sys
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

from crossmae_det.engine import run, run_tool
from crossmae_det.model_zoo import get_config

NUM_IMAGES = 8
MOST_OBJECTS = 8
WANTED = {"bbox": 80, "segm": 70}


def subset(annotation_file: Path) -> dict:
    """The content of a COCO json with the chosen images, and the categories that they have."""
    content = json.loads(annotation_file.read_text())
    annotations = defaultdict(list)
    for annotation in content["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    images = [
        image
        for image in sorted(content["images"], key=lambda image: image["id"])
        if 1 <= len(annotations[image["id"]]) <= MOST_OBJECTS
        and not any(annotation["iscrowd"] for annotation in annotations[image["id"]])
    ][:NUM_IMAGES]
    chosen = [annotation for image in images for annotation in annotations[image["id"]]]
    present = {annotation["category_id"] for annotation in chosen}
    categories = [category for category in content["categories"] if category["id"] in present]
    return {"images": images, "annotations": chosen, "categories": categories}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("coco", type=Path, help="folder with annotations/ and train2017/")
    parser.add_argument("--output", type=Path, default=Path("output/overfit_coco"))
    parser.add_argument("overrides", nargs="*", help="path.key=value of the config")
    args = parser.parse_args()
    content = subset(args.coco / "annotations" / "instances_train2017.json")
    args.output.mkdir(parents=True, exist_ok=True)
    annotation_file = args.output / "eight_images.json"
    annotation_file.write_text(json.dumps(content))
    names = f"{annotation_file}:{args.coco / 'train2017'}"
    overrides = [
        f"dataloader.train.dataset.names='{names}'",
        f"dataloader.test.dataset.names='{names}'",
        f"train.output_dir='{args.output}'",
        *args.overrides,
    ]
    cfg = get_config("demo/overfit_coco.py", overrides)
    results = run(cfg, Namespace(eval_only=False, resume=False, overwrite=True))
    print(f"{len(content['images'])} images, {len(content['annotations'])} objects")
    for task, wanted in WANTED.items():
        print(f"{task} AP50 = {results[task]['AP50']:.1f}, wanted > {wanted}")
    if any(results[task]["AP50"] <= wanted for task, wanted in WANTED.items()):
        sys.exit("not learnt")


if __name__ == "__main__":
    run_tool(main)
