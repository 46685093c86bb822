"""The shipped detection configs, and those for small datasets."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from omegaconf import OmegaConf

from crossmae_det.engine import run
from crossmae_det.engine.launch import setup
from crossmae_det.model_zoo import get_config
from crossmae_det.model_zoo.zoo import CHECKOUT_CONFIGS
from crossmae_det.modeling import SIZES

TRAIN = Namespace(eval_only=False, resume=False)


def names(pattern):
    return sorted(
        p.relative_to(CHECKOUT_CONFIGS).as_posix() for p in CHECKOUT_CONFIGS.glob(pattern)
    )


LAZY, YAML = names("coco/*.py"), names("coco/*.yaml")
SMALL_DETECTION = names("small_data/mask_rcnn*.py")
SMALL_PRETRAINING = names("small_data/pretrain*.py")
DEMO = ["demo/mask_rcnn.py", "demo/overfit_coco.py"]
LETTERS = {name[0]: name for name in ("small", "base", "large", "huge")}
B_100 = "coco/mask_rcnn_crossmae_vit_b_100ep.py"


def size_of(name):
    return SIZES[LETTERS[Path(name).stem.split("_vit_")[1][0]]]


@pytest.mark.parametrize("name", LAZY + YAML)
def test_every_config_builds_at_its_size(name):
    cfg = get_config(name)
    with torch.device("meta"):
        model = instantiate(cfg.model)
    backbone, size = model.backbone.net, size_of(name)
    assert (backbone.embed_dim, len(backbone.blocks)) == (size.embed_dim, size.depth)
    assert backbone.blocks[0].attn.num_heads == size.num_heads
    windows = [block.window_size for block in backbone.blocks]
    assert [i for i, window in enumerate(windows) if not window] == size.global_blocks
    assert set(windows) == {0, 14}
    assert model.roi_heads.num_classes == 80
    assert backbone.blocks[size.global_blocks[0]].attn.rel_pos_h.shape[0] == 2 * 1024 // 16 - 1


@pytest.mark.parametrize("name", LAZY)
def test_every_config_trains_two_iterations_and_evaluates(name, tiny_overrides):
    # All that the config sets, but a small width and depth.
    if "cascade" in name:
        tiny_overrides = [option.replace("box_head.", "box_heads.0.") for option in tiny_overrides]
    cfg = get_config(name, [*tiny_overrides, "train.max_iter=2", "train.visualizer=null"])
    results = run(cfg, TRAIN)
    assert {"bbox", "segm"} <= results.keys()
    assert 0 <= results["segm"]["AP"] <= 100


@pytest.mark.parametrize("name", LAZY)
def test_regularization_follows_the_size(name):
    cfg = get_config(name)
    published = {"small": (0.1, 0.7), "base": (0.1, 0.7), "large": (0.4, 0.8), "huge": (0.5, 0.9)}
    letter = Path(name).stem.split("_vit_")[1][0]
    expected = published[LETTERS[letter]]
    assert (cfg.model.backbone.net.drop_path_rate, cfg.optimizer.params.lr_decay) == expected
    assert cfg.train.epochs == int(name.split("_")[-1].removesuffix("ep.py"))


@pytest.mark.parametrize(
    ("name", "iterations", "milestones"),
    [
        # 100 ep = 184,375 iterations x 64 images / 118,000 images; three quarters of it for ViT-H.
        (B_100, 184_375, (163_889, 177_546)),
        ("coco/mask_rcnn_crossmae_vit_h_75ep.py", 138_281, (122_916, 133_159)),
        ("coco/mask_rcnn_crossmae_vit_b_25ep.py", 46_094, (40_972, 44_387)),
    ],
)
def test_schedules_match_the_published_ones(name, iterations, milestones, monkeypatch):
    cfg = get_config(name)
    assert cfg.train.max_iter == iterations
    schedule = instantiate(cfg.lr_multiplier)
    for factor, milestone in zip((1, 0.1), milestones, strict=True):
        assert schedule((milestone - 1) / iterations) == pytest.approx(factor)
        assert schedule(milestone / iterations) == pytest.approx(factor / 10)
    assert schedule(125 / iterations) == pytest.approx(0.5, abs=0.01)
    assert cfg.optimizer.lr == pytest.approx(1e-4)


def test_values_follow_the_keys_they_depend_on(tiny_sets):
    train_set, val_set = tiny_sets
    cfg = get_config(
        B_100,
        [
            "dataloader.train.total_batch_size=16",
            "dataloader.image_size=512",
            "train.epochs=50",
        ],
    )
    OmegaConf.resolve(cfg)
    # 184,375 / 2 epochs x 4 times as many iterations of a quarter of the batch
    assert cfg.train.max_iter == 368_750
    assert cfg.lr_multiplier.max_iter == 368_750
    assert cfg.train.eval_period == cfg.train.checkpointer.period == 18_437
    assert cfg.optimizer.lr == cfg.optimizer.params.base_lr == pytest.approx(2.5e-5)
    assert cfg.model.backbone.square_pad == cfg.model.backbone.net.img_size == 512
    train_mapper = cfg.dataloader.train.mapper
    assert train_mapper.augmentations[1].target_height == 512
    assert list(train_mapper.augmentations[2].crop_size) == [512, 512]
    assert cfg.dataloader.test.mapper.augmentations[0].max_size == 512

    cfg = get_config(
        B_100,
        [
            f"dataloader.train.dataset.names='{train_set}'",
            f"dataloader.test.dataset.names='{val_set}'",
        ],
    )
    OmegaConf.resolve(cfg)
    assert list(cfg.dataloader.categories.values())[0] == "ellipse"
    assert cfg.model.roi_heads.num_classes == cfg.model.roi_heads.box_predictor.num_classes == 6
    assert cfg.train.max_iter == 12  # 100 epochs x 8 images / 64
    assert cfg.dataloader.evaluator.dataset_name == val_set


def test_an_unknown_config_is_rejected_with_a_suggestion():
    with pytest.raises(FileNotFoundError, match=f"vit_b_100.py'.*'{B_100}'"):
        get_config("coco/mask_rcnn_crossmae_vit_b_100.py")


def test_evaluation_does_not_write_the_config_of_the_run(tiny_overrides, tmp_path):
    cfg = get_config(B_100, tiny_overrides)
    setup(cfg, Namespace(eval_only=True, resume=False))
    assert not (tmp_path / "output" / "config.yaml").exists()


@pytest.mark.parametrize("name", DEMO)
def test_the_demos_build_train_and_evaluate(name, tiny_sets, tmp_path):
    train_set, val_set = tiny_sets
    options = [
        f"dataloader.train.dataset.names='{train_set}'",
        f"dataloader.test.dataset.names='{val_set}'",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.num_workers=0",
        "dataloader.image_size=64",
        "train.max_iter=2",
        f"train.output_dir={tmp_path}",
    ]
    results = run(get_config(name, options), TRAIN)
    assert {"bbox", "segm"} <= results.keys()
    assert (tmp_path / "predictions.png").exists()


@pytest.mark.parametrize("name", SMALL_DETECTION + SMALL_PRETRAINING)
def test_small_data_configs_build_at_their_size(name):
    with torch.device("meta"):
        model = instantiate(get_config(name).model)
    vit = model.encoder if name in SMALL_PRETRAINING else model.backbone.net
    assert (vit.embed_dim, len(vit.blocks)) == (size_of(name).embed_dim, size_of(name).depth)


@pytest.mark.parametrize("name", SMALL_DETECTION)
def test_small_data_detection_derives_the_schedule(name, tiny_sets):
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


@pytest.mark.parametrize("name", SMALL_DETECTION)
def test_small_data_detectors_train_and_are_evaluated(name, tiny_overrides, tmp_path):
    overrides = [*tiny_overrides, "train.epochs=1", "train.visualizer=null", "train.log_period=1"]
    overrides += ["model.backbone.net.freeze_blocks=2"]  # of four
    results = run(get_config(name, overrides), TRAIN)
    assert {"bbox", "segm"} <= results.keys()
    lines = [json.loads(line) for line in (tmp_path / "output/metrics.json").open()]
    # An epoch of 8 images in batches of 2: fewer iterations than evaluations are wanted.
    for metric in ("val/total_loss", "segm/AP"):
        assert [line["iteration"] for line in lines if metric in line][:3] == [0, 1, 2]


def test_without_a_validation_set_all_epochs_run(tiny_overrides, tmp_path):
    overrides = [*tiny_overrides, "dataloader.test.dataset.names=null", "train.epochs=1"]
    run(get_config(SMALL_DETECTION[0], overrides), TRAIN)
    assert (tmp_path / "output/model_final.pth").exists()
    assert not (tmp_path / "output/early_stopping.json").exists()


@pytest.mark.parametrize("name", SMALL_PRETRAINING)
def test_small_data_pretraining_derives_the_schedule(name, tiny_sets):
    overrides = [f"dataloader.train.dataset.name='{tiny_sets[0]}'", "train.epochs=40"]
    cfg = get_config(name, [*overrides, "dataloader.train.total_batch_size=4"])
    OmegaConf.resolve(cfg)
    assert cfg.train.max_iter == 80
    assert cfg.optimizer.lr == get_config(name).optimizer.lr > 10 * 1.5e-4 * 4 / 256 / 3
    assert not cfg.train.validation_loss.enabled
    cfg = get_config(name, [*overrides, f"dataloader.validation.dataset.name='{tiny_sets[1]}'"])
    assert cfg.train.validation_loss.enabled


@pytest.mark.parametrize("name", SMALL_PRETRAINING)
def test_small_data_pretraining_continues_from_a_checkpoint(name, tiny_sets, tmp_path):
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
