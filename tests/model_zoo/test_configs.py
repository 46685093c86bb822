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

LAZY = sorted(
    p.relative_to(CHECKOUT_CONFIGS).as_posix() for p in CHECKOUT_CONFIGS.glob("coco/*.py")
)
YAML = sorted(
    p.relative_to(CHECKOUT_CONFIGS).as_posix() for p in CHECKOUT_CONFIGS.glob("coco/*.yaml")
)
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
    # Not the width and depth of the size, but everything that the config sets beside them.
    if "cascade" in name:
        tiny_overrides = [option.replace("box_head.", "box_heads.0.") for option in tiny_overrides]
    cfg = get_config(name, [*tiny_overrides, "train.max_iter=2", "train.visualizer=null"])
    results = run(cfg, Namespace(eval_only=False, resume=False))
    assert {"bbox", "segm"} <= results.keys()
    assert 0 <= results["segm"]["AP"] <= 100


@pytest.mark.parametrize("name", LAZY)
def test_regularisation_follows_the_size(name):
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
def test_schedules_are_the_published_ones(name, iterations, milestones, monkeypatch):
    cfg = get_config(name)
    assert cfg.train.max_iter == iterations
    schedule = instantiate(cfg.lr_multiplier)
    for factor, milestone in zip((1, 0.1), milestones, strict=True):
        assert schedule((milestone - 1) / iterations) == pytest.approx(factor)
        assert schedule(milestone / iterations) == pytest.approx(factor / 10)
    assert schedule(125 / iterations) == pytest.approx(0.5, abs=0.01)
    assert cfg.optimizer.lr == pytest.approx(1e-4)


def test_one_key_changes_all_that_depends_on_it(tiny_sets):
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


def test_an_unknown_config_is_refused_with_a_hint():
    with pytest.raises(
        FileNotFoundError, match="did you mean 'coco/mask_rcnn_crossmae_vit_b_100ep.py'"
    ):
        get_config("coco/mask_rcnn_crossmae_vit_b_100.py")


def test_evaluation_does_not_touch_the_config_of_the_run(tiny_overrides, tmp_path):
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
    results = run(get_config(name, options), Namespace(eval_only=False, resume=False))
    assert {"bbox", "segm"} <= results.keys()
    assert (tmp_path / "predictions.png").exists()
