"""Folders of runs with the files that a report reads, written by hand."""

import json
import math

NAMES = ("ellipse", "star", "<script>alert(1)</script>", "größe & 漢字")


def write_lines(folder, records):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{json.dumps(record)}\n" for record in records)
    (folder / "metrics.json").write_text(text)


def detection_metrics(iterations=100, period=5, evaluations=4):
    """The lines of metrics.json of a detector that learns."""
    for iteration in range(period - 1, iterations, period):
        left = math.exp(-iteration / 40)
        yield {
            "iteration": iteration,
            "total_loss": 0.4 + 4 * left + 0.1 * math.sin(iteration),
            "loss_cls": 0.2 + 2 * left,
            "loss_mask": 0.2 + 2 * left + 0.1 * math.sin(iteration),
            "lr": 1e-4,
            "lr/heads": 1e-4,
            "lr/layer_00": 1e-6,
            "lr/layer_01": 1e-5,
            "time": 0.2,
            "data_time": 0.01,
            "images_per_second": 40 + math.sin(iteration),
            "max_memory_gib": 1.5,
            "grad_norm": 3 + left,
            "fast_rcnn/cls_accuracy": 1 - 0.5 * left,
        }
    for index in range(1, evaluations + 1):
        values = {"iteration": iterations * index // evaluations - 1}
        for task, best in (("bbox", 40), ("segm", 38), ("ema/segm", 39)):
            ap = best * (1 - math.exp(-index))
            values |= {f"{task}/AP": ap, f"{task}/AP50": 1.4 * ap, f"{task}/AP75": 0.9 * ap}
        yield values


def results(names=NAMES, images=()):
    """The content of results.json with an analysis of the detections."""
    count = len(names)
    aps = {name: 100 * (index + 1) / (count + 1) for index, name in enumerate(names)}
    metrics = {"AP": 38.25, "AP50": 60.5, "AP75": 35.0, "APs": 12.0, "APm": None, "AR@100": 48.0}
    recall = [index / 100 for index in range(101)]
    matrix = [[0] * (count + 1) for _ in range(count + 1)]
    for index in range(count):
        matrix[index][index] = 20
        matrix[index][(index + 1) % count] += 7
        matrix[index][count] = 3
        matrix[count][index] = 2
    analysis = {
        "per_class": {
            name: {"AP": ap, "AP50": ap, "AP75": None, "AR": ap}
            | {"images": 5, "annotations": 30, "detections": 29}
            for name, ap in aps.items()
        },
        "tide": {
            "iou_threshold": 0.5,
            "base_ap50": 60.5,
            "delta_ap": {"classification": 4.5, "localization": 7.25, "both": 0.5}
            | {"duplicate": 0.1, "background": 2.0, "missed": 11.0}
            | {"false_positives": 9.0, "false_negatives": 20.0},
            "counts": {"classification": 12, "localization": 20, "missed": 31},
        },
        "precision_recall": {
            "iou_threshold": 0.5,
            "recall": recall,
            "precision": {"all": [1 - r**3 for r in recall]}
            | {
                name: [max(0, 1 - r ** (1 + index)) if r < 0.9 else None for r in recall]
                for index, name in enumerate(names)
            },
        },
        "calibration": {
            "iou_threshold": 0.5,
            "bins": [
                {"low": index / 10, "high": (index + 1) / 10, "count": 50 - 4 * index}
                | {"confidence": index / 10 + 0.05, "accuracy": (index / 10) ** 1.3 or None}
                for index in range(10)
            ],
            "expected_calibration_error": 0.0712,
            "maximum_calibration_error": 0.2,
        },
        "confusion_matrix": {
            "iou_threshold": 0.5,
            "score_threshold": 0.3,
            "classes": list(names),
            "matrix": matrix,
        },
        "images": list(images),
    }
    health = {
        "images": 20,
        "annotations": 120,
        "images_without_annotations": 1,
        "checks": [
            {"severity": "warning", "what": "boxes outside <b>", "count": 2, "examples": [1, 2]}
        ],
        "classes": dict.fromkeys(names, 30),
    }
    return {
        "results": {
            task: metrics | {f"AP-{name}": ap for name, ap in aps.items()}
            for task in ("bbox", "segm")
        },
        "context": {"iteration": 99, "dataset": "no_such_set", "images": 20, "backend": "hotcoco"},
        "analysis": {"bbox": analysis, "segm": analysis},
        "dataset_health": health,
    }


CONFIG = """
dataloader:
  recorded:
    shapes_val:
      categories: {1: ellipse, 2: star}
      has_masks: true
      num_annotated: 19
      num_images: 20
  train: {_target_: crossmae_det.detection.TrainLoader, total_batch_size: 8}
model:
  _target_: detectron2.modeling.GeneralizedRCNN
  pixel_mean: !!python/tuple [1, 2]
optimizer: {lr: 0.001, betas: [0.9, 0.999]}
train: {max_iter: 100, output_dir: OUTPUT, seed: 0}
"""


def record(iteration=0, *, ended=True, max_iter=100, **start):
    """The content of run.json."""
    first = {
        "time": "2026-01-02T03:04:05+00:00",
        "command": "crossmae-det train --config-file demo/mask_rcnn.py 'a=<b>'",
        "config_file": "demo/mask_rcnn.py",
        "overrides": ["optimizer.lr=0.001"],
        "iteration": iteration,
        "max_iter": max_iter,
        "batch_size": 8,
        "seed": 7,
        "precision": "bf16",
        "processes": 1,
        "host": "elsewhere",
        "pid": 1,
        "environment": {"torch": "2.14.1", "CPU": "Zilog Z80", "device": "cpu"},
    }
    content = {"starts": [first | start]}
    if ended:
        content["end"] = {"state": "ended", "time": "2026-01-02T03:14:05+00:00"}
    return content


def write_run(folder, names=NAMES, **changes):
    """The folder of a detection run that is finished.

    Args:
        folder: to write into.
        names: of the classes.
        changes: "results" or "record" with other content than that of the functions above.
    """
    write_lines(folder, detection_metrics())
    for subfolder in ("inference", "inference_ema"):
        (folder / subfolder).mkdir()
        content = changes.get("results", results(names))
        (folder / subfolder / "results.json").write_text(json.dumps(content))
    (folder / "run.json").write_text(json.dumps(changes.get("record", record())))
    (folder / "config.yaml").write_text(CONFIG.replace("OUTPUT", str(folder)))
    (folder / "recipe.yaml").write_text(CONFIG.replace("lr: 0.001", "lr: 0.0001"))
    return folder
