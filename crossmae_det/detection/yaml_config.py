"""Yaml configs: the keys added to detectron2's, and their conversion to lazy configs.

A yaml config is converted to the equivalent lazy config, so every rule (iterations from epochs,
learning rate from batch size, ...) is written once, in the lazy configs.
"""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from detectron2.config import CfgNode, LazyCall, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from omegaconf import DictConfig, OmegaConf
from torch import nn

from crossmae_det.detection import formats

IMAGE_SIZE = 1024  # ViTDet's, where INPUT.IMAGE_SIZE is None


def add_crossmae_config(cfg: CfgNode) -> None:
    """Add the keys of the backbone, the pyramid and the training recipe to a detectron2 config.

    A value of 0 or an empty list is derived from other keys by the rules of the lazy configs.

    Args:
        cfg: detectron2's default config; changed in place.
    """
    vit = cfg.MODEL.VIT = CfgNode()
    vit.SIZE = "base"  # tiny, small, base, large or huge
    vit.EMBED_DIM = 0  # from SIZE
    vit.DEPTH = 0  # from SIZE
    vit.NUM_HEADS = 0  # from SIZE
    vit.PATCH_SIZE = 16
    vit.PRETRAIN_IMG_SIZE = 224
    vit.WINDOW_SIZE = 14
    vit.GLOBAL_BLOCKS = []  # from the depth: four, evenly spaced
    vit.USE_REL_POS = True
    vit.DROP_PATH_RATE = 0.1
    vit.USE_ACT_CHECKPOINT = False
    vit.FREEZE_BLOCKS = 0
    vit.ATTENTION_BACKEND = "auto"  # or eager, sdpa, folded, flex, chunked: same results

    pyramid = cfg.MODEL.PYRAMID = CfgNode()
    pyramid.OUT_CHANNELS = 256
    pyramid.SCALE_FACTORS = [4.0, 2.0, 1.0, 0.5]
    pyramid.NORM = "LN"
    pyramid.TOP_BLOCK = True
    pyramid.SQUARE_PAD = True

    # Side in pixels or (height, width), of crops, test images, padding and position embeddings.
    # None, which stands for IMAGE_SIZE, lets yacs accept both.
    cfg.INPUT.IMAGE_SIZE = None
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0  # from the training set

    solver = cfg.SOLVER
    solver.EPOCHS = 100
    solver.MAX_ITER = 0  # from EPOCHS, the training set and IMS_PER_BATCH
    solver.BASE_LR = 0.0  # from IMS_PER_BATCH, by the linear rule
    solver.WEIGHT_DECAY = 0.1
    solver.WEIGHT_DECAY_NORM = 0.0  # of the ViT's norms; None: WEIGHT_DECAY
    solver.WEIGHT_DECAY_CHANNEL_NORM = None  # likewise, of the norms of pyramid and heads
    solver.WEIGHT_DECAY_POS_EMBED = 0.0  # likewise
    solver.LR_DECAY = 0.7  # from one layer of the backbone to the one below
    solver.STEPS = ()  # 8/9 and 26/27 of MAX_ITER
    solver.WARMUP_ITERS = 250
    solver.IMS_PER_BATCH = 64
    solver.CHECKPOINT_PERIOD = 0  # a twentieth of MAX_ITER, at least 100
    cfg.TEST.EVAL_PERIOD = 0  # a twentieth of MAX_ITER, at least 500

    # As `train` in the lazy configs.
    solver.AMP.ENABLED = True
    solver.AMP.DTYPE = "auto"
    solver.GRADIENT_ACCUMULATION_STEPS = 1
    solver.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    solver.EMA = CfgNode({"ENABLED": False, "DECAY": 0.9999})
    solver.COMPILE = CfgNode({"ENABLED": False})
    solver.EARLY_STOPPING = CfgNode({"ENABLED": False, "PATIENCE": 5})  # evaluations
    cfg.TEST.VALIDATION_LOSS = CfgNode({"ENABLED": False})
    cfg.LOGGERS = CfgNode(
        {
            "WANDB": {"ENABLED": False, "PROJECT": "crossmae_det"},
            "MLFLOW": {"ENABLED": False, "TRACKING_URI": None, "EXPERIMENT": "crossmae_det"},
        }
    )
    # The first metric that is measured selects the best checkpoint and stops early.
    cfg.TEST.BEST_METRICS = ["segm/AP", "bbox/AP"]


# Yaml key -> key of the lazy config.
KEYS = {
    "INPUT.IMAGE_SIZE": "dataloader.image_size",
    "INPUT.FORMAT": "dataloader.train.mapper.image_format",
    "DATALOADER.NUM_WORKERS": "dataloader.train.num_workers",
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": "dataloader.train.dataset.filter_empty",
    "SOLVER.IMS_PER_BATCH": "dataloader.train.total_batch_size",
    "SOLVER.EPOCHS": "train.epochs",
    "SOLVER.MAX_ITER": "train.max_iter",
    "SOLVER.BASE_LR": "optimizer.lr",
    "SOLVER.WEIGHT_DECAY": "optimizer.weight_decay",
    "SOLVER.WEIGHT_DECAY_NORM": "optimizer.params.weight_decay_norm",
    "SOLVER.WEIGHT_DECAY_CHANNEL_NORM": "optimizer.params.weight_decay_channel_norm",
    "SOLVER.WEIGHT_DECAY_POS_EMBED": "optimizer.params.weight_decay_pos_embed",
    "SOLVER.LR_DECAY": "optimizer.params.lr_decay",
    "SOLVER.GAMMA": "lr_multiplier.gamma",
    "SOLVER.WARMUP_ITERS": "lr_multiplier.warmup_iters",
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpointer.period",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "SOLVER.AMP.DTYPE": "train.amp.dtype",
    "SOLVER.GRADIENT_ACCUMULATION_STEPS": "train.gradient_accumulation_steps",
    "SOLVER.EMA.ENABLED": "train.ema.enabled",
    "SOLVER.EMA.DECAY": "train.ema.decay",
    "SOLVER.COMPILE.ENABLED": "train.compile.enabled",
    "SOLVER.EARLY_STOPPING.ENABLED": "train.early_stopping.enabled",
    "SOLVER.EARLY_STOPPING.PATIENCE": "train.early_stopping.patience",
    "SOLVER.CLIP_GRADIENTS.ENABLED": "train.clip_grad.enabled",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": "train.clip_grad.max_norm",
    "TEST.EVAL_PERIOD": "train.eval_period",
    "TEST.VALIDATION_LOSS.ENABLED": "train.validation_loss.enabled",
    "TEST.BEST_METRICS": "train.best_checkpoint.metrics",
    "LOGGERS.WANDB.ENABLED": "train.wandb.enabled",
    "LOGGERS.WANDB.PROJECT": "train.wandb.project",
    "LOGGERS.MLFLOW.ENABLED": "train.mlflow.enabled",
    "LOGGERS.MLFLOW.TRACKING_URI": "train.mlflow.tracking_uri",
    "LOGGERS.MLFLOW.EXPERIMENT": "train.mlflow.experiment",
    "CUDNN_BENCHMARK": "train.cudnn_benchmark",
    "OUTPUT_DIR": "train.output_dir",
    "MODEL.WEIGHTS": "train.init_checkpoint",
}

# The values for which the lazy config's own value or rule stands.
DERIVED = {
    "INPUT.IMAGE_SIZE": None,
    "SOLVER.MAX_ITER": 0,
    "SOLVER.BASE_LR": 0,
    "SOLVER.CHECKPOINT_PERIOD": 0,
    "TEST.EVAL_PERIOD": 0,
    "OUTPUT_DIR": "./output",  # detectron2's default; here each config has its own folder
}

# Read by `to_lazy` or by the model.
ALSO_READ = (
    "DATASETS.TRAIN",
    "DATASETS.TEST",
    "SOLVER.STEPS",
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE",
    "TEST.DETECTIONS_PER_IMAGE",
    "SEED",
    "VERSION",
    "MODEL.",
)

# The shipped value of DATASETS.TEST: the lazy config checks whether it fits the training set.
DEFAULT_TEST = ("coco_2017_val",)


def default_config() -> CfgNode:
    """detectron2's default config with this project's keys and recipe."""
    cfg = get_cfg()
    add_crossmae_config(cfg)
    return cfg


def read_yaml(path: str, overrides: Sequence[str] = ()) -> CfgNode | None:
    """Read a yaml config with detectron2's keys.

    Args:
        path: the file.
        overrides: alternating keys and values.

    Returns:
        The config; None if the file is a lazy config saved as yaml.

    Raises:
        ValueError: not yaml, an unknown key, or a key that has no effect here.
    """
    try:
        raw = CfgNode.load_yaml_with_base(path)
        given = CfgNode(raw)
    except (yaml.YAMLError, AssertionError, AttributeError, TypeError, UnicodeError) as error:
        raise ValueError(f"{path} is not a yaml config: {error}") from error
    if "dataloader" in raw:
        return None
    pairs = _pairs(path, overrides)
    cfg = default_config()
    defaults = _leaves(cfg)
    for key in [*_leaves(given), *pairs[::2]]:
        if key not in defaults:
            close = difflib.get_close_matches(key.upper(), defaults, n=1, cutoff=0.6)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{path}: unknown config key '{key}'{hint}")
    try:
        cfg.merge_from_other_cfg(given)
        if "INPUT.IMAGE_SIZE" in pairs:
            cfg.INPUT.IMAGE_SIZE = None  # yacs would not replace a number by a pair
        cfg.merge_from_list(pairs)
    except (KeyError, AssertionError, ValueError) as error:
        raise ValueError(f"{path}: {error.args[0]}") from error
    for key, value in _leaves(cfg).items():
        if key not in KEYS and not key.startswith(ALSO_READ) and value != defaults[key]:
            raise ValueError(f"{path}: '{key}' has no effect with this project's recipe: remove it")
    return cfg


def to_lazy(cfg: CfgNode, get_config: Callable[[str], DictConfig]) -> DictConfig:
    """Convert a yaml config to the equivalent lazy config.

    Args:
        cfg: from :func:`read_yaml`.
        get_config: reads a shipped lazy config.

    Raises:
        ValueError: a value that the lazy config cannot express.
    """
    if len(cfg.DATASETS.TEST) > 1:
        raise ValueError(f"DATASETS.TEST must name one dataset, got {cfg.DATASETS.TEST}")
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN names no dataset: add DATASETS.TRAIN \"('NAME',)\"")
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED and (clip.CLIP_TYPE, clip.NORM_TYPE) != ("norm", 2.0):
        raise ValueError(
            "SOLVER.CLIP_GRADIENTS supports the 2-norm of the whole gradient only: set CLIP_TYPE"
            f" to 'norm' and NORM_TYPE to 2.0, not '{clip.CLIP_TYPE}' and {clip.NORM_TYPE}"
        )
    lazy = get_config("common/from_yaml.py")
    lazy.train.output_dir = None  # follows the name of the yaml file
    values = _leaves(cfg)
    for yaml_key, lazy_key in KEYS.items():
        if yaml_key not in DERIVED or values[yaml_key] != DERIVED[yaml_key]:
            OmegaConf.update(lazy, lazy_key, values[yaml_key])
    lazy.dataloader.train.dataset.names = list(cfg.DATASETS.TRAIN)
    lazy.dataloader.train.mapper.min_size = cfg.MODEL.VIT.PATCH_SIZE
    if tuple(cfg.DATASETS.TEST) != DEFAULT_TEST:
        test = formats.for_evaluation(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else None
        lazy.dataloader.test.dataset.names = test
    if cfg.SOLVER.STEPS:
        milestones = [step / lazy.train.max_iter for step in cfg.SOLVER.STEPS]
        lazy.lr_multiplier.milestones = milestones
    if cfg.MODEL.DEVICE != "cuda":  # detectron2's default; "auto" takes CUDA where there is one
        lazy.train.device = cfg.MODEL.DEVICE
    if cfg.SEED >= 0:
        lazy.train.seed = cfg.SEED
    lazy.model = LazyCall(build_yaml_model)(
        config=cfg.dump(),
        num_classes=cfg.MODEL.ROI_HEADS.NUM_CLASSES or "${crossmae.count:${dataloader.categories}}",
        mask_on="${dataloader.train.mapper.use_instance_mask}",
    )
    if not cfg.MODEL.MASK_ON:
        lazy.dataloader.train.mapper.use_instance_mask = False
    return lazy


def build_yaml_model(config: str, num_classes: int, mask_on: bool) -> nn.Module:
    """Build the model of a yaml config.

    Args:
        config: the whole config as yaml text.
        num_classes: number of classes of the data.
        mask_on: predict masks.
    """
    cfg = default_config()
    cfg.merge_from_other_cfg(CfgNode.load_cfg(config))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    cfg.MODEL.MASK_ON = mask_on
    if cfg.MODEL.ROI_MASK_HEAD.NAME == "MaskRCNNConvUpsampleHead":
        # The same head, which also accepts objects without a mask.
        cfg.MODEL.ROI_MASK_HEAD.NAME = "PartiallySupervisedMaskHead"
    # Not build_model, which moves the model to MODEL.DEVICE: the engine does that.
    return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)


def _leaves(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Every key that has a value, with the names of its sections in front."""
    leaves: dict[str, Any] = {}
    for name, value in cfg.items():
        nested = isinstance(value, CfgNode)
        leaves |= _leaves(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return leaves


def _pairs(path: str, overrides: Sequence[str]) -> list[str]:
    """Overrides as alternating keys and values, with a single dataset as a tuple.

    Raises:
        ValueError: they are not pairs; for the syntax of lazy configs with what was meant.
    """
    for key in overrides[::2]:
        name, equals, value = key.partition("=")
        if equals:
            yaml_key = {lazy: yaml for yaml, lazy in KEYS.items()}.get(name, name)
            raise ValueError(
                f"{path}: '{key}': yaml configs take KEY VALUE pairs: write {yaml_key}"
                f" {value or 'VALUE'}"
            )
    if len(overrides) % 2:
        raise ValueError(f"{path}: overrides are KEY VALUE pairs, but {overrides[-1]} has no value")
    return [
        repr((value,))
        if key in ("DATASETS.TRAIN", "DATASETS.TEST") and value[:1] not in "(["
        else value
        for key, value in zip(["", *overrides], overrides, strict=False)
    ]
