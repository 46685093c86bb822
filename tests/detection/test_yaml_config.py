from argparse import Namespace

import pytest
import torch
from detectron2.config import instantiate
from omegaconf import OmegaConf

from crossmae_det.detection.yaml_config import KEYS, default_config
from crossmae_det.engine import run
from crossmae_det.engine.config import resolve
from crossmae_det.model_zoo import get_config

B_100 = "coco/mask_rcnn_crossmae_vit_b_100ep"


@pytest.mark.parametrize("letter", ["s", "b"])
def test_yaml_configs_equal_their_lazy_configs(letter):
    name = f"coco/mask_rcnn_crossmae_vit_{letter}_100ep"
    lazy, yaml = get_config(f"{name}.py"), get_config(f"{name}.yaml")
    models = []
    for cfg in (lazy, yaml):
        with torch.device("meta"):
            models.append(instantiate(cfg.model))
        OmegaConf.resolve(cfg)
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in models]
    assert shapes[0] == shapes[1]
    # The same modules with the same settings.
    assert repr(models[0]) == repr(models[1])
    assert yaml.train.visualizer is None
    lazy.train.visualizer = None
    yaml.dataloader.train.dataset.names = yaml.dataloader.train.dataset.names[0]
    assert yaml.train.output_dir == lazy.train.output_dir == f"output/{name.rpartition('/')[2]}"
    for key in ("train", "lr_multiplier", "optimizer", "dataloader"):
        assert str(yaml[key]) == str(lazy[key])


def test_values_in_yaml_replace_the_rules():
    cfg = get_config(
        f"{B_100}.yaml",
        [
            *["SOLVER.IMS_PER_BATCH", "16", "SOLVER.EPOCHS", "12", "INPUT.IMAGE_SIZE", "256"],
            *["SOLVER.STEPS", "(100, 200)", "SOLVER.MAX_ITER", "300", "SEED", "7"],
            *["SOLVER.GRADIENT_ACCUMULATION_STEPS", "4", "SOLVER.EMA.ENABLED", "True"],
            *["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "TEST.VALIDATION_LOSS.ENABLED", "True"],
            *["SOLVER.EARLY_STOPPING.ENABLED", "True", "SOLVER.EARLY_STOPPING.PATIENCE", "3"],
            *["TEST.BEST_METRICS", "['val/total_loss']"],
        ],
    )
    OmegaConf.resolve(cfg)
    assert cfg.train.max_iter == 300 and cfg.train.seed == 7
    assert list(cfg.lr_multiplier.milestones) == pytest.approx([1 / 3, 2 / 3])
    assert cfg.optimizer.lr == pytest.approx(2.5e-5)
    assert cfg.dataloader.train.mapper.augmentations[1].target_width == 256
    assert cfg.train.gradient_accumulation_steps == 4 and cfg.train.ema.enabled is True
    assert cfg.train.clip_grad.enabled is True
    assert cfg.train.validation_loss.enabled is True
    stopping = cfg.train.early_stopping
    assert (stopping.enabled, stopping.patience) == (True, 3)
    assert stopping.metrics == cfg.train.best_checkpoint.metrics == ["val/total_loss"]
    assert get_config(f"{B_100}.yaml", ["SOLVER.AMP.ENABLED", "False"]).train.amp.enabled is False


def test_zero_is_a_value_for_keys_without_a_rule():
    cfg = get_config(
        f"{B_100}.yaml",
        [
            *["DATALOADER.NUM_WORKERS", "0", "SOLVER.WARMUP_ITERS", "0"],
            *["SOLVER.WEIGHT_DECAY", "0.0", "CUDNN_BENCHMARK", "True"],
        ],
    )
    assert cfg.dataloader.train.num_workers == cfg.lr_multiplier.warmup_iters == 0
    assert cfg.optimizer.weight_decay == 0
    assert cfg.train.cudnn_benchmark is True


def test_a_yaml_with_only_the_model_has_the_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "MODEL:\n  BACKBONE:\n    NAME: build_crossmae_vit_pyramid_backbone\n"
        "DATASETS:\n  TRAIN: ('coco_2017_train',)\n  TEST: ('coco_2017_val',)\n"
    )
    mine, lazy = get_config(str(path)), get_config(f"{B_100}.py")
    for cfg in (mine, lazy):
        OmegaConf.resolve(cfg)
    lazy.train.update(visualizer=None, output_dir="output/mine")
    lazy.train.report.output_dir = "output/mine"
    assert str(mine.train) == str(lazy.train)
    assert str(mine.optimizer) == str(lazy.optimizer)
    assert mine.dataloader.train.mapper.image_format == "RGB"


@pytest.mark.parametrize("letter", ["s", "b"])
def test_every_yaml_config_trains_two_iterations_and_evaluates(letter, tiny_sets, tmp_path):
    train_set, val_set = tiny_sets
    options = [
        *["DATASETS.TRAIN", f"('{train_set}',)", "DATASETS.TEST", f"('{val_set}',)"],
        *["INPUT.IMAGE_SIZE", "64", "MODEL.VIT.EMBED_DIM", "32", "MODEL.VIT.DEPTH", "4"],
        *["MODEL.VIT.NUM_HEADS", "2", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2"],
        *["MODEL.ROI_BOX_HEAD.CONV_DIM", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"],
        *["DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cpu"],
        *["TEST.VALIDATION_LOSS.ENABLED", "True"],
    ]
    cfg = get_config(f"coco/mask_rcnn_crossmae_vit_{letter}_100ep.yaml", options)
    results = run(cfg, Namespace(eval_only=False, resume=False))
    assert {"bbox", "segm"} <= results.keys()
    assert '"val/total_loss"' in (tmp_path / "metrics.json").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.EPOCH", "3"], "'SOLVER.EPOCH'.* SOLVER.EPOCHS"),
        (["train.epochs=3"], "SOLVER.EPOCHS 3"),
        (["SOLVER.EPOCHS", "-1"], "train.epochs"),
        (["SOLVER.IMS_PER_BATCH", "0"], "dataloader.train.total_batch_size=0"),
        (["SOLVER.EPOCHS", "many"], "SOLVER.EPOCHS"),
        (["SOLVER.EPOCHS"], "SOLVER.EPOCHS has no value"),
        (["INPUT.MIN_SIZE_TEST", "600"], "'INPUT.MIN_SIZE_TEST' has no effect"),
        (
            ["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value"],
            "SOLVER.CLIP_GRADIENTS",
        ),
        (["DATASETS.TEST", "('a', 'b')"], "DATASETS.TEST"),
    ],
)
def test_bad_yaml_settings_are_rejected(overrides, message):
    with pytest.raises(ValueError, match=message):
        resolve(get_config(f"{B_100}.yaml", overrides))


def test_a_file_that_is_no_config_is_rejected(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("just words")
    with pytest.raises(ValueError, match="config.yaml is not"):
        get_config(str(path))


def test_every_mapped_key_exists_on_both_sides():
    lazy, yaml = get_config(f"{B_100}.py"), OmegaConf.create(default_config().dump())
    missing = object()
    for yaml_key, lazy_key in KEYS.items():
        assert OmegaConf.select(lazy, lazy_key, default=missing) is not missing, lazy_key
        assert OmegaConf.select(yaml, yaml_key, default=missing) is not missing, yaml_key
