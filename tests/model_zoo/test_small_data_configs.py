"""The configs for few images: what follows from what, and that they run."""

import json
from argparse import Namespace

import pytest
import torch
from detectron2.config import instantiate
from omegaconf import OmegaConf

from crossmae_det.engine import run
from crossmae_det.model_zoo import get_config
from crossmae_det.model_zoo.zoo import CHECKOUT_CONFIGS
from crossmae_det.modeling import SIZES

TRAIN = Namespace(eval_only=False, resume=False)
DETECTION = ["small_data/mask_rcnn_crossmae_vit_b.py", "small_data/mask_rcnn_crossmae_vit_s.py"]
PRETRAINING = ["small_data/pretrain_crossmae_vit_b.py", "small_data/pretrain_crossmae_vit_s.py"]


def test_every_config_is_tested_here():
    found = {p.relative_to(CHECKOUT_CONFIGS).as_posix() for p in CHECKOUT_CONFIGS.glob("small*/*")}
    assert {name for name in found if name.endswith(".py")} == {*DETECTION, *PRETRAINING}


def size_of(name):
    return SIZES[{"b": "base", "s": "small"}[name.removesuffix(".py")[-1]]]


@pytest.mark.parametrize("name", DETECTION + PRETRAINING)
def test_size(name):
    with torch.device("meta"):
        model = instantiate(get_config(name).model)
    vit = model.encoder if name in PRETRAINING else model.backbone.net
    assert (vit.embed_dim, len(vit.blocks)) == (size_of(name).embed_dim, size_of(name).depth)


@pytest.mark.parametrize("name", DETECTION)
def test_one_key_decides_in_detection(name, tiny_sets):
    sets = [f"dataloader.{s}.dataset.names='{tiny_sets[s == 'test']}'" for s in ("train", "test")]
    cfg = get_config(name, [*sets, "train.epochs=50", "dataloader.train.total_batch_size=2"])
    OmegaConf.resolve(cfg)
    assert cfg.train.max_iter == cfg.lr_multiplier.max_iter == 200  # 50 epochs x 8 images / 2
    assert cfg.train.eval_period == cfg.train.checkpointer.period == 10
    # Twenty times what the rule for batches of 64 gives, at the least, and not by the batch.
    assert cfg.optimizer.lr == get_config(name).optimizer.lr >= 20 * 1e-4 * 2 / 64
    assert cfg.train.early_stopping.enabled and cfg.train.validation_loss.enabled
    # Random weights are no reason to freeze any.
    assert cfg.model.backbone.net.freeze_blocks == 0
    cfg = get_config(name, [*sets, "train.init_checkpoint=vit.pth"])
    assert 2 * cfg.model.backbone.net.freeze_blocks == size_of(name).depth
    assert list(cfg.train.early_stopping.metrics) == ["segm/AP", "bbox/AP"]
    assert cfg.dataloader.validation.dataset.names == tiny_sets[1]


@pytest.mark.parametrize("name", DETECTION)
def test_a_detector_trains_and_is_judged(name, tiny_overrides, tmp_path):
    overrides = [*tiny_overrides, "train.epochs=1", "train.visualizer=null", "train.log_period=1"]
    overrides += ["model.backbone.net.freeze_blocks=2"]  # of four
    results = run(get_config(name, overrides), TRAIN)
    assert {"bbox", "segm"} <= results.keys()
    lines = [json.loads(line) for line in (tmp_path / "output/metrics.json").open()]
    # An epoch of 8 images in batches of 2: fewer iterations than evaluations are wanted.
    for metric in ("val/total_loss", "segm/AP"):
        assert [line["iteration"] for line in lines if metric in line][:3] == [0, 1, 2]


def test_without_a_validation_set_all_epochs_are_run(tiny_overrides, tmp_path):
    overrides = [*tiny_overrides, "dataloader.test.dataset.names=null", "train.epochs=1"]
    run(get_config(DETECTION[0], overrides), TRAIN)
    assert (tmp_path / "output/model_final.pth").exists()
    assert not (tmp_path / "output/early_stopping.json").exists()


@pytest.mark.parametrize("name", PRETRAINING)
def test_one_key_decides_in_pretraining(name, tiny_sets):
    overrides = [f"dataloader.train.dataset.name='{tiny_sets[0]}'", "train.epochs=40"]
    cfg = get_config(name, [*overrides, "dataloader.train.total_batch_size=4"])
    OmegaConf.resolve(cfg)
    assert cfg.train.max_iter == 80
    assert cfg.optimizer.lr == get_config(name).optimizer.lr > 10 * 1.5e-4 * 4 / 256 / 3
    assert not cfg.train.validation_loss.enabled
    cfg = get_config(name, [*overrides, f"dataloader.validation.dataset.name='{tiny_sets[1]}'"])
    assert cfg.train.validation_loss.enabled


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_starts_from_the_detectors_encoder_to_be(name, tiny_sets, tmp_path):
    tiny = ["encoder.embed_dim=32", "encoder.depth=2", "encoder.num_heads=2", "decoder_dim=16"]
    tiny += ["decoder_depth=1", "decoder_num_heads=2"]
    overrides = [
        *(f"model.{override}" for override in tiny),
        *("dataloader.image_size=64", "dataloader.train.num_workers=0", "train.epochs=1"),
        *("dataloader.train.total_batch_size=4", "train.visualizer=null", "train.device=cpu"),
        f"dataloader.train.dataset.name='{tiny_sets[0]}'",
        f"dataloader.validation.dataset.name='{tiny_sets[1]}'",
    ]
    run(get_config(name, [*overrides, f"train.output_dir={tmp_path}/first"]), TRAIN)
    start = f"train.init_checkpoint={tmp_path}/first/model_final.pth"
    run(get_config(name, [*overrides, start, f"train.output_dir={tmp_path}/second"]), TRAIN)
    report = json.loads((tmp_path / "second/init_checkpoint.json").read_text())
    assert "decoder.mask_token" in json.dumps(report["loaded"])
