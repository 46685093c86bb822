"""Runs with validation losses and early stopping."""

import json
import os
import subprocess
import sys
from argparse import Namespace

import pytest

from crossmae_det.checkpoint import read_checkpoint
from crossmae_det.engine import run
from crossmae_det.model_zoo import get_config

DETECTION = "coco/mask_rcnn_crossmae_vit_b_100ep.py"
PRETRAINING = "pretraining/crossmae_vit_b_800ep.py"
# With a rate of 0 no evaluation is better than the first: the run ends after three.
STOPPED = [
    "optimizer.lr=0",
    "train.max_iter=40",
    "train.eval_period=2",
    "train.validation_loss.enabled=True",
    "train.best_checkpoint.metrics=[val/total_loss]",
    "train.early_stopping.enabled=True",
    "train.early_stopping.patience=2",
]
TRAIN = Namespace(eval_only=False, resume=False)
RESUME = Namespace(eval_only=False, resume=True)


def metrics(output):
    """Name -> iteration -> value."""
    found = {}
    for line in (output / "metrics.json").open():
        record = json.loads(line)
        iteration = record.pop("iteration")
        for name, value in record.items():
            found.setdefault(name, {})[iteration] = value
    return found


def last_iteration(output):
    name = (output / "last_checkpoint").read_text()
    return name, read_checkpoint(output / name)["trainer"]["iteration"]


def test_a_detector_stops_early_like_a_finished_run_and_resumes(tiny_overrides, tmp_path):
    output = tmp_path / "output"
    options = [*tiny_overrides, *STOPPED, "train.log_period=2"]
    results = run(get_config(DETECTION, options), TRAIN)
    assert {"bbox", "segm"} <= results.keys()
    assert last_iteration(output) == ("model_final.pth", 5)
    for name in ("curves.png", "predictions.png", "model_best.pth", "inference/results.json"):
        assert (output / name).exists()
    assert read_checkpoint(output / "model_best.pth")["iteration"] == 1
    measured = metrics(output)
    assert list(measured["val/total_loss"]) == [1, 3, 5]
    assert len(set(measured["val/total_loss"].values())) == 1
    assert list(measured["segm/AP"]) == [1, 3, 5]  # not once more at the end
    log = (output / "log.txt").read_text()
    assert "Early stopping after 6 iterations" in log and f"{output}/model_best.pth" in log

    # It is finished, except for a greater patience.
    assert {"bbox", "segm"} <= run(get_config(DETECTION, options), RESUME).keys()
    assert last_iteration(output) == ("model_final.pth", 5)
    run(get_config(DETECTION, [*options, "train.early_stopping.patience=4"]), RESUME)
    assert last_iteration(output) == ("model_final.pth", 9)


@pytest.fixture
def pretraining(tiny_sets, tmp_path):
    return [
        "dataloader.image_size=64",
        "model.encoder.embed_dim=32",
        "model.encoder.depth=2",
        "model.encoder.num_heads=2",
        "model.decoder_dim=16",
        "model.decoder_depth=1",
        "model.decoder_num_heads=2",
        "train.device=cpu",
        "train.amp.enabled=False",
        "train.visualizer=null",
        f"dataloader.train.dataset.name='{tiny_sets[0]}'",
        "dataloader.train.total_batch_size=4",
        "dataloader.train.num_workers=0",
        f"train.output_dir={tmp_path}/output",
    ]


def test_pretraining_measures_images_that_are_held_out(pretraining, tiny_sets, tmp_path):
    output = tmp_path / "output"
    overrides = [
        *pretraining,
        f"dataloader.validation.dataset.name='{tiny_sets[1]}'",
        *("optimizer.lr=0.01", "train.max_iter=6", "train.eval_period=2", "train.log_period=1"),
    ]
    run(get_config(PRETRAINING, overrides), TRAIN)
    losses = metrics(output)["val/total_loss"]
    assert list(losses) == [1, 3, 5]
    assert len(set(losses.values())) == 3
    best = min(losses, key=losses.get)
    assert read_checkpoint(output / "model_best.pth")["iteration"] == best


def test_without_held_out_images_nothing_is_measured(pretraining, tmp_path):
    run(get_config(PRETRAINING, [*pretraining, "train.max_iter=2"]), TRAIN)
    assert "val/total_loss" not in metrics(tmp_path / "output")
    assert not (tmp_path / "output/model_best.pth").exists()


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["train.early_stopping.enabled=True"], "train.validation_loss.enabled=True"),
        (["train.validation_loss.enabled=True"], "dataloader.validation.dataset.name"),
        (["dataloader.validation.dataset.name=nowhere"], "nowhere"),
    ],
)
def test_what_is_missing_is_named(pretraining, overrides, part):
    with pytest.raises((ValueError, OSError)) as error:
        run(get_config(PRETRAINING, [*pretraining, "train.max_iter=2", *overrides]), TRAIN)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_two_processes_measure_the_same_and_stop_together(repo, tiny_overrides, tmp_path):
    options = [
        *tiny_overrides,
        *STOPPED,
        "train.visualizer=null",
        "train.early_stopping.patience=1",
    ]
    run(get_config(DETECTION, options), TRAIN)
    output = tmp_path / "two"
    process = subprocess.run(
        [
            *(sys.executable, str(repo / "tools/lazyconfig_train_net.py"), "--num-gpus", "2"),
            *("--config-file", DETECTION, *options, f"train.output_dir={output}"),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert last_iteration(output) == ("model_final.pth", 3)
    # The weights are those of the seed of each job's first process.
    one, two = (metrics(folder)["val/total_loss"] for folder in (tmp_path / "output", output))
    assert one == pytest.approx(two, rel=1e-5)
