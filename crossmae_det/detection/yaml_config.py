"""The keys that yaml configs have on top of detectron2's.

Yaml configs: detectron2's keys, run by the one engine.

A yaml config is turned into the lazy config that it stands for, so that every rule (iterations from
epochs, learning rate from batch size, ...) is written once, in the lazy configs.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import yaml
from detectron2.config import CfgNode, LazyCall, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead
from omegaconf import DictConfig, OmegaConf
from torch import nn

from crossmae_det.detection.mask_head import PartiallySupervisedMaskHead

IMAGE_SIZE = 1024  # ViTDet's; where INPUT.IMAGE_SIZE is None


def add_crossmae_config(cfg: CfgNode) -> None:
    """Add the keys of the backbone, the pyramid and the training recipe to a detectron2 config.

    A value of 0 (or "" or an empty list) means "follows from other keys"; each such key says from
    which. The rules are those of the lazy configs.

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
    vit.GLOBAL_BLOCKS = []  # from the depth: four of them, evenly spread
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

    # Side in pixels, or (height, width): large-scale jitter, test size, padding and position tables
    # follow. None is IMAGE_SIZE; as a default it lets yacs take both.
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
    # Here None means "as WEIGHT_DECAY".
    solver.WEIGHT_DECAY_NORM = 0.0  # of norms in the ViT
    solver.WEIGHT_DECAY_CHANNEL_NORM = None  # of norms in pyramid and heads
    solver.WEIGHT_DECAY_POS_EMBED = 0.0
    solver.LR_DECAY = 0.7  # from one layer of the backbone to the one below
    solver.STEPS = ()  # 8/9 and 26/27 of MAX_ITER
    solver.WARMUP_ITERS = 250
    solver.IMS_PER_BATCH = 64
    solver.CHECKPOINT_PERIOD = 0  # a twentieth of MAX_ITER, at least 100
    cfg.TEST.EVAL_PERIOD = 0  # a twentieth of MAX_ITER, at least 500

    # As in the lazy configs' `train`.
    solver.AMP.ENABLED = True
    solver.AMP.DTYPE = "auto"
    solver.GRADIENT_ACCUMULATION_STEPS = 1
    solver.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    solver.EMA = CfgNode({"ENABLED": False, "DECAY": 0.9999})
    solver.COMPILE = CfgNode({"ENABLED": False})


# What the yaml keys are called in the lazy config.
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
    "SOLVER.CLIP_GRADIENTS.ENABLED": "train.clip_grad.enabled",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": "train.clip_grad.max_norm",
    "TEST.EVAL_PERIOD": "train.eval_period",
    "CUDNN_BENCHMARK": "train.cudnn_benchmark",
    "OUTPUT_DIR": "train.output_dir",
    "MODEL.WEIGHTS": "train.init_checkpoint",
}

# Of the shipped configs: the rule of the lazy configs says whether it fits the training set.
DEFAULT_TEST = ("coco_2017_val",)

# detectron2's own default of OUTPUT_DIR: each config has a folder of its own instead.
DEFAULT_OUTPUT_DIR = "./output"

# Where 0 or None stands for the value or the rule of the lazy config.
FOLLOWING = (
    "INPUT.IMAGE_SIZE",
    "SOLVER.MAX_ITER",
    "SOLVER.BASE_LR",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
)

# Read by to_lazy itself or by the model.
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
        The config; None where the file is a lazy config that was saved as yaml.

    Raises:
        ValueError: not yaml, an unknown key, or a key that has no effect here.
    """
    cfg = default_config()
    try:
        raw = CfgNode.load_yaml_with_base(path)
        keys = CfgNode(raw)
    except (yaml.YAMLError, AttributeError, TypeError, UnicodeDecodeError) as error:
        # A file without keys (empty, a list, a text) is not found out before they are read.
        raise ValueError(f"{path} is not a yaml config: {error}") from error
    if "dataloader" in raw:
        return None
    known = list(_keys(cfg))
    overrides = _pairs(path, overrides)

    def merge_overrides() -> None:
        if "INPUT.IMAGE_SIZE" in overrides:
            cfg.INPUT.IMAGE_SIZE = None  # yacs would not take a pair for a number
        cfg.merge_from_list(overrides)

    for given, merge in (
        (list(_keys(keys)), lambda: cfg.merge_from_other_cfg(keys)),
        (overrides[::2], merge_overrides),
    ):
        for key in given:
            if key not in known:
                raise ValueError(f"{path}: unknown config key '{key}'{_did_you_mean(key, known)}")
        try:
            merge()
        except (KeyError, AssertionError, ValueError) as error:
            raise ValueError(f"{path}: {error.args[0]}") from error
    _refuse_keys_without_effect(path, cfg)
    return cfg


def to_lazy(cfg: CfgNode, get_config: Callable[[str], DictConfig]) -> DictConfig:
    """The lazy config that a yaml config stands for.

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
        raise ValueError("SOLVER.CLIP_GRADIENTS clips by the 2-norm of the whole gradient only")
    lazy = get_config("common/from_yaml.py")
    lazy.train.output_dir = None  # named after the yaml file
    for yaml_key, lazy_key in KEYS.items():
        value = _select(cfg, yaml_key)
        if yaml_key == "OUTPUT_DIR" and value == DEFAULT_OUTPUT_DIR:
            continue
        if value or yaml_key not in FOLLOWING:
            OmegaConf.update(lazy, lazy_key, value)
    lazy.dataloader.train.dataset.names = list(cfg.DATASETS.TRAIN)
    lazy.dataloader.train.mapper.min_size = cfg.MODEL.VIT.PATCH_SIZE
    if tuple(cfg.DATASETS.TEST) != DEFAULT_TEST:
        lazy.dataloader.test.dataset.names = cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else None
    if cfg.SOLVER.STEPS:
        steps = [step / lazy.train.max_iter for step in cfg.SOLVER.STEPS]
        lazy.lr_multiplier.milestones = steps
    if cfg.MODEL.DEVICE != "cuda":  # detectron2's default; ours takes CUDA where there is one
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
    if MaskRCNNConvUpsampleHead.__name__ == cfg.MODEL.ROI_MASK_HEAD.NAME:
        # The same head, for data in which some objects have no mask.
        cfg.MODEL.ROI_MASK_HEAD.NAME = PartiallySupervisedMaskHead.__name__
    # Not build_model: it moves the model to MODEL.DEVICE, which is the engine's task.
    return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    """Every key of a yaml config, sections and values."""
    for name, value in cfg.items():
        yield prefix + name
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")


def _pairs(path: str, overrides: Sequence[str]) -> list[str]:
    """Overrides as alternating keys and values, with a single dataset as a tuple of one.

    Raises:
        ValueError: they are not pairs, as those of lazy configs; with what was probably meant.
    """
    for key in overrides[::2]:
        name, equals, value = key.partition("=")
        if equals:
            yaml_key = {lazy: yaml for yaml, lazy in KEYS.items()}.get(name, name)
            raise ValueError(
                f"{path}: override '{key}': yaml configs take PATH.KEY VALUE pairs; write "
                f"{yaml_key} {value or 'VALUE'}"
            )
    if len(overrides) % 2:
        raise ValueError(
            f"{path}: the overrides must be PATH.KEY VALUE pairs, and {overrides[-1]} has no value"
        )
    pairs = list(overrides)
    for index in range(0, len(pairs), 2):
        if pairs[index] in ("DATASETS.TRAIN", "DATASETS.TEST") and pairs[index + 1][:1] not in "([":
            pairs[index + 1] = repr((pairs[index + 1],))
    return pairs


def _did_you_mean(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key.upper(), known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _select(cfg: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _refuse_keys_without_effect(path: str, cfg: CfgNode) -> None:
    """A key that nothing reads would be a setting silently ignored."""

    def visit(node: CfgNode, default: CfgNode, prefix: str) -> None:
        for name, value in node.items():
            key = prefix + name
            if isinstance(value, CfgNode) and not key.startswith(ALSO_READ):
                visit(value, default[name], f"{key}.")
            elif key not in KEYS and not key.startswith(ALSO_READ) and value != default[name]:
                raise ValueError(
                    f"{path}: '{key}' has no effect with this project's recipe; leave it out"
                )

    visit(cfg, default_config(), "")
