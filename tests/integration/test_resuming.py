"""Runs that are resumed with other settings, and folders that are used twice."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from shorthand import one_line

from crossmae_det.checkpoint import read_checkpoint
from crossmae_det.engine import run
from crossmae_det.model_zoo import get_config

CONFIG = "coco/mask_rcnn_crossmae_vit_b_100ep.py"
SHORT = ["train.max_iter=4", "train.checkpointer.period=2", "train.visualizer=null"]


@pytest.fixture
def train(tiny_overrides):
    """Runs the tiny detector in output/ with overrides and flags."""

    def call(*overrides, **flags):
        cfg = get_config(CONFIG, [*tiny_overrides, *SHORT, *overrides])
        args = {"eval_only": False, "resume": False, "overwrite": False} | flags
        return run(cfg, Namespace(**args))

    return call


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


def content(folder):
    """Every file of a run but its log, with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "log.txt"
    }


def test_a_resumed_run_has_the_settings_of_its_config(train, output):
    train()
    before = read_checkpoint(output / "model_final.pth")["trainer"]
    # 4 iterations of 2 images are 2 of 4; the first block is no longer trained.
    overrides = [
        *["dataloader.train.total_batch_size=4", "train.max_iter=5", "optimizer.lr=0.01"],
        *["optimizer.weight_decay=0.3", "optimizer.betas=[0.5,0.6]", "optimizer.params.lr_decay=1"],
        *["model.backbone.net.freeze_blocks=1", "train.ema.enabled=True", "train.seed=3"],
        *["train.amp.enabled=True", "train.amp.dtype=bf16", "lr_multiplier.warmup_iters=0"],
    ]
    train(*overrides, resume=True)
    after = read_checkpoint(output / "model_final.pth")
    trainer = after["trainer"]
    assert (before["images_seen"], trainer["images_seen"]) == (8, 8 + 3 * 4)
    groups = trainer["optimizer"]["param_groups"]
    assert {group["initial_lr"] for group in groups} == {0.01}
    assert {group["weight_decay"] for group in groups} == {0.3, 0.0}
    assert {group["betas"] for group in groups} == {(0.5, 0.6)}
    # Moments go on by name, three steps further; those of the frozen block are gone.
    names = [name for group in trainer["parameter_names"] for name in group]
    assert not any(".blocks.0." in name for name in names)
    assert {state["step"].item() for state in trainer["optimizer"]["state"].values()} == {7.0}
    assert "ema" in after
    log = (output / "log.txt").read_text()
    for line in ("optimizer.lr: ", "optimizer.weight_decay: 0.1 -> 0.3", "train.seed: 0 -> 3"):
        assert line in log
    assert "Starting training from iteration 2" in log
    kept = yaml.unsafe_load((output / "config.yaml").read_text())
    assert kept["optimizer"]["lr"] == 0.01

    # What was on and is off again needs nothing.
    train("train.max_iter=11", resume=True)
    trainer = read_checkpoint(output / "model_final.pth")["trainer"]
    steps = {state["step"].item() for state in trainer["optimizer"]["state"].values()}
    assert steps == {1.0, 8.0}  # the block that is trained again starts anew


def test_what_cannot_be_resumed_is_rejected_and_changes_nothing(train, output, tiny_sets, tmp_path):
    train()
    json_file, _, images = tiny_sets[0].rpartition(":")
    data = json.loads(Path(json_file).read_text())
    data["categories"][0]["name"] = "something else"
    (tmp_path / "renamed.json").write_text(json.dumps(data))
    renamed = f"{tmp_path}/renamed.json:{images}"
    before = content(output)
    for overrides, words in [
        (["model.backbone.out_channels=32"], ["model.backbone.out_channels: 16 -> 32"]),
        (["model.backbone.net.use_rel_pos=False"], ["rel_pos"]),
        (["optimizer._target_=torch.optim.Adam"], ["torch.optim.adamw.AdamW", "optim.adam.Adam"]),
        (["+optimizer.amsgrad=True"], ["max_exp_avg_sq"]),
        (["train.max_iter=3"], ["4 iterations", "3"]),
        (
            [
                f"dataloader.train.dataset.names='{renamed}'",
                f"dataloader.test.dataset.names='{renamed}'",
            ],
            ["something else"],
        ),
    ]:
        with pytest.raises(ValueError) as error:
            train("train.max_iter=9", *overrides, resume=True)
        message = one_line(error)
        assert all(word in message for word in words), message
        assert content(output) == before


def test_a_complete_run_is_evaluated_again_and_keeps_its_config(train, output):
    trained = train()
    before = content(output)
    shutil.rmtree(output / "inference")
    assert json.dumps(train("optimizer.lr=0.5", resume=True)) == json.dumps(trained)
    after = content(output)
    for name in ("config.yaml", "model_final.pth", "last_checkpoint"):
        assert after[name] == before[name]
    assert "inference/results.json" in after
    assert "not applied" in (output / "log.txt").read_text()


def test_a_used_folder_is_not_used_again_by_accident(train, output):
    train()
    before = content(output) | {"log": (output / "log.txt").read_bytes()}
    with pytest.raises(ValueError) as error:
        train("optimizer.lr=0.5")
    assert "--overwrite" in one_line(error)
    assert content(output) | {"log": (output / "log.txt").read_bytes()} == before
    # A new run that fails before its first iteration has retired the old one all the same.
    with pytest.raises(OSError):
        train("train.init_checkpoint=nowhere.pth", overwrite=True)
    assert not (output / "last_checkpoint").exists()
    assert not list(output.glob("*.pth"))
    train(resume=True)
    log = (output / "log.txt").read_text()
    (line,) = [line for line in log.splitlines() if "no checkpoint to resume from" in line]
    assert "INFO" in line
    assert "Resumed from" not in log
