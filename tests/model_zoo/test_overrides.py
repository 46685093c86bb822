"""Overrides of lazy configs: what is accepted, and what errors name."""

import pytest
from omegaconf import OmegaConf

from crossmae_det.model_zoo import get_config
from crossmae_det.model_zoo.overrides import apply_overrides

B_100 = "coco/mask_rcnn_crossmae_vit_b_100ep.py"
B_800 = "pretraining/crossmae_vit_b_800ep.py"


def error_of(*overrides, config=B_100):
    with pytest.raises(ValueError) as error:
        get_config(config, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("train.epoch=3", "train.epochs"),
        ("trian.epochs=3", "train.epochs"),
        ("model.backbone.net.window=7", "model.backbone.net.window_size"),
        ("optimizer.learning_rate=1e-4", "optimizer.lr"),
        ("+optimizer.learning_rate=1e-4", "optimizer.lr"),
        ("lr=1e-4", "optimizer.lr"),
        ("train.batch_size=4", "dataloader.train.total_batch_size"),
        ("train.num_epochs=4", "train.epochs"),
        ("weights=a.pth", "train.init_checkpoint"),
        ("train.patience_epochs=4", None),
        ("model.roi_heads.num_class=3", "model.roi_heads.num_classes"),
        ("model.neck.out_channels=64", "model.backbone.out_channels"),
        ("MODEL.WEIGHTS=a.pth", "train.init_checkpoint"),
        ("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size"),
    ],
)
def test_an_unknown_key_is_rejected_with_the_key_that_was_meant(override, meant):
    line = error_of(override)
    assert override.lstrip("+").partition("=")[0] in line
    assert meant in line if meant else "did you mean" not in line


def test_suggestions_are_keys_of_the_config():
    line = error_of("model.backbone.net.size=small", config=B_800)
    assert "model.encoder.size" in line
    assert "dataloader.train.dataset.name'" in error_of("data_path=photos", config=B_800)


@pytest.mark.parametrize(
    "override",
    ["+anything=3", "+train.no_such=3", "+optimizer.foo=1", "+dataloader.train.shuffle=True"],
)
def test_an_added_key_that_nothing_reads_is_rejected(override):
    assert override.partition("=")[0] in error_of(override)


def test_an_added_key_that_something_reads_is_accepted():
    cfg = get_config(
        B_100,
        [
            "dataloader.evaluator.max_dets_per_image=10",
            "+model.backbone.net.in_chans=1",  # passed on by **kwargs
            "+train.ddp.static_graph=True",
            "+train.scale=2",
            "optimizer.weight_decay=${train.scale}",
        ],
    )
    assert cfg.dataloader.evaluator.max_dets_per_image == 10
    assert cfg.model.backbone.net.in_chans == 1
    assert cfg.optimizer.weight_decay == 2


@pytest.mark.parametrize(
    "text",
    [
        "my data/train (1).json:my data/images",
        "a,b.json:images",
        "C:\\data\\train.json:C:\\data\\images",
        "~/data/é.json:~/data/ü",
        "shards/{000..127}.tar",
        "https://host/path?a=b&c=d",
        "it's.json:images#2",
        "010",
        "12",
        "true",
    ],
)
def test_text_needs_no_quotes(text):
    for override in (f"train.output_dir={text}", f"train.output_dir='{text}'"):
        if "'" in text and "='" in override:
            continue
        assert get_config(B_100, [override]).train.output_dir == text
    assert get_config(B_100, [f"train.init_checkpoint={text}"]).train.init_checkpoint == text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.amp.enabled=yes", "train.amp.enabled=yes"),
        ("train.amp=True", "train.amp.enabled"),
        ("train.init_checkpoint=[a,b]", "train.init_checkpoint=[a,b]"),
        ("dataloader.image_size=large", "dataloader.image_size=large"),
        ("train.epochs=[1,2]", "train.epochs=[1,2]"),
        ("train.epochs=ten", "train.epochs=ten"),
        ("model.backbone=resnet50", "model.backbone.net"),
        ("model.backbone.scale_factors=4", "model.backbone.scale_factors=[4.0,"),
        ("model.backbone.scale_factors=[4,", "model.backbone.scale_factors=[4,"),
        ("train.epochs", "train.epochs=VALUE"),
        ("train.early_stopping=3", "train.early_stopping.enabled"),
        ("train.epochs 3", "'train.epochs 3'"),
        ("=3", "'=3'"),
        ("~train.epochs", "null"),
        ("dataloader.train.mapper.augmentations.7.min_scale=1", "augmentations.7"),
    ],
)
def test_a_value_of_another_type_is_rejected_with_a_fix(override, words):
    assert words in error_of(override)


def test_a_key_without_its_value_is_shown_with_the_next_argument():
    assert "train.epochs=3" in error_of("train.epochs", "3")


def test_values_of_the_right_type_are_accepted():
    cfg = get_config(
        B_100,
        [
            "train.amp.enabled=0",
            "model.backbone.scale_factors=(4.0,2.0)",
            "dataloader.train.mapper.augmentations[1].min_scale=0.5",
            "dataloader.train.dataset.names=[a.json:b,c.json:d]",
            "dataloader.image_size=[64,128]",
            "model.roi_heads.mask_head=null",
            "model.backbone.top_block=null",
            "dataloader.test.dataset.names=null",
        ],
    )
    assert cfg.train.amp.enabled is False
    assert list(cfg.model.backbone.scale_factors) == [4, 2]
    assert cfg.dataloader.train.mapper.augmentations[1].min_scale == 0.5
    assert list(cfg.dataloader.train.dataset.names) == ["a.json:b", "c.json:d"]
    assert cfg.model.roi_heads.mask_head is None


def test_an_override_without_effect_is_rejected():
    cfg = OmegaConf.create({"train": {"epochs": 5, "max_iter": 100}})
    with pytest.raises(ValueError, match="train.max_iter=100"):
        apply_overrides(cfg, ["train.epochs=3"])
    assert apply_overrides(cfg, ["train.epochs=3", "train.max_iter=60"]).train.max_iter == 60


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("optimizer.learningrate=1", "optimizer.lr"),
        ("optimizer.LR=1", "optimizer.lr"),
        ("optimizer.momentum=0.9", "optimizer.betas"),
        ("train.maxiter=4", "train.max_iter"),
    ],
)
def test_suggestions_ignore_spelling(override, meant):
    assert f"'{meant}'" in error_of(override)


@pytest.mark.parametrize(
    "key",
    [
        "model",
        "optimizer",
        "lr_multiplier",
        "dataloader.train",
        "dataloader.test",
        "dataloader.evaluator",
        "dataloader.categories",
        "train.device",
        "train.seed",
        "train.amp.dtype",
        "train.early_stopping",
        "dataloader.train.dataset.names",
        "model.roi_heads.box_pooler",
        "model.roi_heads.proposal_matcher",
        "model.roi_heads.box_predictor.smooth_l1_beta",  # a parameter that the config leaves out
    ],
)
def test_required_keys_must_not_be_null(key):
    assert f"{key}=null" in error_of(f"{key}=null")


def test_a_null_output_folder_is_the_default():
    cfg = get_config(B_100, ["train.output_dir=null"])
    assert cfg.train.output_dir == get_config(B_100).train.output_dir
    assert get_config(B_100, ["train.output_dir="]).train.output_dir == cfg.train.output_dir


@pytest.mark.parametrize("value", ["abc", "1.5", "True", "[1]"])
def test_keys_that_are_null_by_default_have_a_type(value):
    assert "dataloader.train.dataset.max_images" in error_of(
        f"dataloader.train.dataset.max_images={value}"
    )


def test_a_class_that_does_not_exist_is_rejected():
    assert "torch.optim.Admaw" in error_of("optimizer._target_=torch.optim.Admaw")


@pytest.mark.parametrize("plus", ["+", "++"])
def test_a_plus_before_an_existing_key_sets_it(plus):
    assert get_config(B_100, [f"{plus}train.epochs=3"]).train.epochs == 3
