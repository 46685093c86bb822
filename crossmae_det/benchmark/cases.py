"""Benchmark cases by name: backbones (ours, detectron2's, timm's), checkpoints and configs.

A backbone is built alone, with its pyramid, or in a detector. All detectors have the heads of
ViTDet's Mask R-CNN, so that only the backbone differs. Weights are random unless a checkpoint is
named: time and memory do not depend on them.
"""

import difflib
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, MViT, SwinTransformer
from detectron2.modeling import SimpleFeaturePyramid as DetectronPyramid
from detectron2.modeling import ViT as DetectronViT
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from omegaconf import DictConfig
from torch import Tensor, nn

from crossmae_det.benchmark.costs import ModelSpec, backbone_of
from crossmae_det.checkpoint import inspect, load
from crossmae_det.detection import SimpleFeaturePyramid, vit_backbone
from crossmae_det.engine import keep_freed_memory
from crossmae_det.engine.train import build_optimizer
from crossmae_det.layers.attention_backends import BACKENDS
from crossmae_det.model_zoo.zoo import get_config
from crossmae_det.modeling import SIZES, ViT
from crossmae_det.modeling.vit import LAYER_NORM

# Config of the detector around a backbone.
DETECTOR = "coco/mask_rcnn_crossmae_vit_b_100ep.py"

IN_FEATURE = "last_feat"

PYRAMID: dict[str, Any] = dict(scale_factors=(4.0, 2.0, 1.0, 0.5), norm="LN", out_channels=256)

# Options of our ViTs, after an @: attention backends, or activation checkpointing of each block.
OPTIONS: dict[str, dict[str, Any]] = {
    **{backend: {"attention_backend": backend} for backend in BACKENDS},
    "act-checkpoint": {"use_act_checkpoint": True},
}

CHECKPOINT_SUFFIXES = (".pth", ".pt", ".pkl", ".safetensors")

# Sizes as published: Swin's table 7, MViTv2's table 2.
SWIN = {
    "tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "large": dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
}
MVITV2 = {
    "tiny": dict(depth=10, last_block_indexes=(0, 2, 7, 9)),
    "small": dict(depth=16, last_block_indexes=(0, 2, 13, 15)),
    "base": dict(depth=24, last_block_indexes=(1, 4, 20, 23)),
    "large": dict(embed_dim=144, depth=48, num_heads=2, last_block_indexes=(1, 7, 43, 47)),
}


class TimmBackbone(Backbone):
    """A timm model with ``features_only`` as a detectron2 backbone.

    Args:
        name: as in ``timm.create_model``.
        image_size: in pixels; some models are built for one size.

    Raises:
        ValueError: timm does not know the name, or the model has no features.
    """

    def __init__(self, name: str, image_size: int):
        super().__init__()
        create = partial(timm.create_model, name, features_only=True, pretrained=False)
        try:
            try:
                self.body = create(img_size=image_size)
            except TypeError:  # most models accept any size
                self.body = create()
        except (RuntimeError, AttributeError) as error:
            raise ValueError(f"timm cannot extract features of '{name}': {error}") from error
        feature_info: Any = self.body.feature_info
        self._shapes = {
            f"feature{index}": ShapeSpec(channels=info["num_chs"], stride=info["reduction"])
            for index, info in enumerate(feature_info.get_dicts())
        }
        self._channels_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> feature name to (N, C, H / stride, W / stride)."""
        features = self.body(images)
        if self._channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return dict(zip(self._shapes, features, strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes


def _vit(size: str, image_size: int, **options: Any) -> Backbone:
    sizes: dict[str, Any] = dict(img_size=image_size, pretrain_img_size=224, window_size=14)
    return vit_backbone(size, **sizes, use_rel_pos=True, **options)


def _detectron_vit(size: str, image_size: int) -> Backbone:
    sizes = SIZES[size]
    windows = [index for index in range(sizes.depth) if index not in sizes.global_blocks]
    return DetectronViT(
        img_size=image_size,
        embed_dim=sizes.embed_dim,
        depth=sizes.depth,
        num_heads=sizes.num_heads,
        window_size=14,
        window_block_indexes=windows,
        use_rel_pos=True,
        norm_layer=LAYER_NORM,
        out_feature=IN_FEATURE,
    )


def _resnet(depth: int, image_size: int) -> Backbone:
    bottom_up = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model.backbone.bottom_up
    bottom_up.stages.depth = depth
    return instantiate(bottom_up)


def _regnet(kind: str, image_size: int) -> Backbone:
    config = f"COCO-InstanceSegmentation/mask_rcnn_regnet{kind}_4gf_dds_fpn_1x.py"
    return instantiate(model_zoo.get_config(config).model.backbone.bottom_up)


def _swin(size: str, image_size: int) -> Backbone:
    return SwinTransformer(**SWIN[size])


def _mvit(size: str, image_size: int) -> Backbone:
    return MViT(**MVITV2[size], norm_layer=LAYER_NORM)


BACKBONES: dict[str, Callable[[int], Backbone]] = (
    {f"vit-{size}": partial(_vit, size) for size in SIZES}
    | {f"detectron2-vit-{size}": partial(_detectron_vit, size) for size in SIZES}
    | {f"resnet{depth}": partial(_resnet, depth) for depth in (50, 101)}
    | {f"regnet{kind}-4gf": partial(_regnet, kind) for kind in "xy"}
    | {f"swin-{size}": partial(_swin, size) for size in SWIN}
    | {f"mvitv2-{size}": partial(_mvit, size) for size in MVITV2}
)


def check_name(name: str, overrides: Sequence[str] = ()) -> None:
    """Check a name for :func:`build` without building anything.

    Raises:
        ValueError: an unknown name, or overrides that the config does not have.
        FileNotFoundError: a config or a checkpoint does not exist.
    """
    if is_config(name):
        get_config(name.partition("=")[0], overrides)
    else:
        _builder(name)


def is_config(name: str) -> bool:
    """Whether the name of a backbone is ``CONFIG`` or ``CONFIG=CHECKPOINT``."""
    return name.partition("=")[0].endswith((".py", ".yaml"))


def build(name: str, part: str, image_size: int, overrides: Sequence[str] = ()) -> nn.Module:
    """Build a backbone by name.

    Args:
        name: a key of :data:`BACKBONES`, for our ViTs also followed by ``@`` and a key of
            :data:`OPTIONS`; ``timm/NAME``; a checkpoint, whose backbone is built in its sizes and
            loaded; or a config of a detector, also as ``CONFIG=CHECKPOINT``.
        part: "alone", "pyramid" (the simple one for plain ViTs, FPN for others) or "detector".
        image_size: side of the images in pixels.
        overrides: overrides of the config, for a named backbone of the detector around it.

    Returns:
        "alone" and "pyramid": a module from (N, 3, H, W) to a dict of maps. "detector":
        detectron2's ``GeneralizedRCNN``.

    Raises:
        ValueError: an unknown name, or one that has no such part.
        OSError: a checkpoint cannot be read.
    """
    if is_config(name):
        return _build_config(name, part, image_size, overrides)
    if part == "detector":
        cfg = get_config(DETECTOR, overrides)
        name_classes(cfg)
        out_channels = PYRAMID["out_channels"]
        cfg.model.backbone = LazyCall(_pyramid)(
            name=name, image_size=image_size, out_channels=out_channels
        )
        return instantiate(cfg.model)
    if part == "alone":
        return _builder(name)(image_size)
    return _pyramid(name, image_size, PYRAMID["out_channels"])


def _build_config(name: str, part: str, image_size: int, overrides: Sequence[str]) -> nn.Module:
    config, _, checkpoint = name.partition("=")
    cfg = get_config(config, overrides)
    if "backbone" not in cfg.model:
        raise ValueError(f"{config} is not a lazy detector config: use {DETECTOR}, for example")
    name_classes(cfg)
    cfg.dataloader.image_size = image_size
    model: Any = instantiate(cfg.model)
    if checkpoint:
        load(model, checkpoint)
    if part == "detector":
        return model
    return backbone_of(model.backbone)[1] if part == "alone" else model.backbone


def _pyramid(name: str, image_size: int, out_channels: int) -> nn.Module:
    """A backbone with its pyramid. The heads of a config refer to ``out_channels``."""
    assert out_channels == PYRAMID["out_channels"]
    backbone = _builder(name)(image_size)
    if isinstance(backbone, DetectronViT):
        return DetectronPyramid(backbone, IN_FEATURE, top_block=LastLevelMaxPool(), **PYRAMID)
    shapes = backbone.output_shape()
    strides = {feature: shape.stride for feature, shape in shapes.items()}
    if set(strides.values()) == {16}:  # a plain ViT: the last map alone
        last = list(strides)[-1]
        return SimpleFeaturePyramid(backbone, last, top_block=LastLevelMaxPool(), **PYRAMID)
    names = [feature for feature, stride in strides.items() if stride >= 4]
    if [strides[feature] for feature in names] != [4, 8, 16, 32]:
        raise ValueError(
            f"'{name}' has maps of strides {list(strides.values())}: a pyramid needs 4, 8, 16, 32,"
            " or only 16"
        )
    return FPN(backbone, names, PYRAMID["out_channels"], top_block=LastLevelMaxPool())


def _builder(name: str) -> Callable[[int], Backbone]:
    """The function that builds a backbone for an image size. Only the name is checked here."""
    if name.startswith("timm/"):
        name = name.removeprefix("timm/")
        if not timm.is_model(name.partition(".")[0]):
            raise ValueError(f"timm has no model '{name}'")
        return partial(TimmBackbone, name)
    if name.endswith(CHECKPOINT_SUFFIXES):
        if "://" not in name and not Path(name).is_file():
            raise FileNotFoundError(f"checkpoint {name} does not exist")
        return partial(_backbone_of_checkpoint, name)
    if "://" in name:
        raise ValueError(
            f"'{name}' is not a file: use a file that ends in {', '.join(CHECKPOINT_SUFFIXES)}"
        )
    backbone, at, option = name.partition("@")
    if at:
        size = backbone.removeprefix("vit-")
        if size not in SIZES or option not in OPTIONS:
            raise ValueError(
                f"unknown backbone '{name}': use vit-SIZE@OPTION with one of {', '.join(OPTIONS)}"
            )
        return partial(_vit, size, **OPTIONS[option])
    if name not in BACKBONES:
        close = difflib.get_close_matches(name, BACKBONES, n=1, cutoff=0.3)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        raise ValueError(
            f"unknown backbone '{name}'{hint}: use one of {', '.join(BACKBONES)}, timm/NAME, a"
            " checkpoint or a config"
        )
    return BACKBONES[name]


def _backbone_of_checkpoint(path: str, image_size: int) -> Backbone:
    info = inspect(path)
    if info.num_heads is None:
        raise ValueError(
            f"{path}: the number of attention heads is unknown: name the config of its model,"
            f" CONFIG={path}"
        )
    patch = info.patch_size[0]
    backbone = vit_backbone(
        embed_dim=info.embed_dim,
        depth=info.depth,
        num_heads=info.num_heads,
        mlp_ratio=info.mlp_ratio,
        patch_size=patch if patch & (patch - 1) == 0 else None,  # a pyramid needs a power of two
        img_size=image_size,
        pretrain_img_size=info.img_size or 224,
        # The tables of the windows are the smallest; those of global blocks depend on the image.
        window_size=info.rel_pos_sizes[0] if info.rel_pos_sizes else 14,
        use_rel_pos=True,
    )
    load(backbone, path)
    return backbone


class OneBlock(nn.Module):
    """A block of a ViT as a model of images; only the size of the images matters.

    Args:
        block: of the feature-map path.
        dim: channels C.
        patch_size: in pixels.
    """

    def __init__(self, block: nn.Module, dim: int, patch_size: int):
        super().__init__()
        self.block = block
        self.dim = dim
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, S, S) -> {"tokens": (N, L, C)}."""
        grid = images.shape[2] // self.patch_size, images.shape[3] // self.patch_size
        tokens = images.new_ones(len(images), grid[0] * grid[1], self.dim)
        return {"tokens": self.block(tokens, grid)}


def build_block(size: str, kind: str, image_size: int) -> nn.Module:
    """One block of our ViT as a model of images, to measure how its cost grows.

    Args:
        size: a name in :data:`crossmae_det.modeling.SIZES`.
        kind: "windowed" or "global".
        image_size: side of the images in pixels.
    """
    blocks = {"windowed": (), "global": (0,)}
    backbone = _vit(size, image_size, depth=1, global_blocks=blocks[kind])
    assert isinstance(backbone, ViT)
    return OneBlock(backbone.blocks[0], backbone.embed_dim, backbone.patch_size[0])


def config_spec(cfg: DictConfig, name: str) -> ModelSpec:
    """The :class:`ModelSpec` of a config."""
    return ModelSpec(
        name=name,
        build=partial(instantiate, cfg.model),
        optimizer=partial(build_optimizer, cfg.optimizer),
        image_size=cfg.dataloader.image_size,
    )


def pretraining_spec(
    device: str, config_file: str, overrides: Sequence[str] = (), variation: Sequence[str] = ()
) -> ModelSpec:
    """The :class:`ModelSpec` of a pretraining config.

    Afterwards this process keeps freed memory, as in training.

    Args:
        device: device of the model.
        config_file: as in :func:`get_config`.
        overrides: as in :func:`get_config`.
        variation: further overrides, of the model, which become part of the name.

    Raises:
        FileNotFoundError, ValueError: as in :func:`get_config`.
    """
    keep_freed_memory(torch.device(device))
    cfg = get_config(config_file, [*overrides, *variation])
    varied = (override.removeprefix("model.") for override in variation)
    return config_spec(cfg, " ".join([Path(config_file).stem, *varied]))


def variations(
    config_file: str, ratios: Sequence[float], depths: Sequence[int]
) -> list[tuple[str, ...]]:
    """Overrides for :func:`pretraining_spec`: CrossMAE with each ratio and each depth.

    Args:
        config_file: of a pretraining model. An MAE is not varied: it predicts all patches, and is
            the baseline.
        ratios: prediction ratios; empty for the one in the config.
        depths: numbers of decoder blocks; empty for the one in the config.
    """
    by_key = (("prediction_ratio", ratios), ("decoder_depth", depths))
    axes = [[f"model.{key}={value}" for value in values] for key, values in by_key if values]
    if axes and "prediction_ratio" not in get_config(config_file).model:
        return [()]
    return list(itertools.product(*axes))


def name_classes(cfg: DictConfig) -> None:
    """Take the classes of a detector from detectron2's metadata, without reading annotations or
    drawing built-in images. The config of a run has them already."""
    names = cfg.dataloader.train.dataset.names
    name = names if isinstance(names, str) else names[0]
    if name in DatasetCatalog.list():
        classes = MetadataCatalog.get(name).thing_classes
        cfg.dataloader.categories = dict(enumerate(classes, 1))
    cfg.dataloader.train.mapper.use_instance_mask = True
