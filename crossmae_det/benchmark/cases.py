"""Backbones by name: ours, detectron2's and timm's, alone, with their pyramid, or in a detector.

All get the same heads in a detector, those of ViTDet's Mask R-CNN, so that what differs is the
backbone. Weights are random unless a checkpoint is named: time and memory do not depend on them.
"""

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
from detectron2 import model_zoo
from detectron2.config import LazyCall, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, MViT, SwinTransformer
from detectron2.modeling import SimpleFeaturePyramid as DetectronPyramid
from detectron2.modeling import ViT as DetectronViT
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn

from crossmae_det.benchmark.comparison import OneBlock
from crossmae_det.benchmark.costs import backbone_of
from crossmae_det.benchmark.zoo_page import name_classes
from crossmae_det.checkpoint import inspect, load
from crossmae_det.detection import SimpleFeaturePyramid, vit_backbone
from crossmae_det.layers.attention_backends import BACKENDS
from crossmae_det.model_zoo.records import read_records
from crossmae_det.model_zoo.zoo import get_config, list_configs
from crossmae_det.modeling import SIZES, ViT
from crossmae_det.modeling.vit import LAYER_NORM

DETECTOR = "coco/mask_rcnn_crossmae_vit_b_100ep.py"

IN_FEATURE = "last_feat"

PYRAMID: dict[str, Any] = dict(scale_factors=(4.0, 2.0, 1.0, 0.5), norm="LN", out_channels=256)

# After an @, beside the attention backends: recompute the activations of every block.
ACT_CHECKPOINT = "act-checkpoint"

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
    """A model of timm with ``features_only`` as a detectron2 backbone.

    Args:
        name: as ``timm.create_model`` takes it.
        image_size: side of the images, which some models are made for.

    Raises:
        ValueError: timm does not know the name, or the model has no features.
    """

    def __init__(self, name: str, image_size: int):
        super().__init__()
        options: dict[str, Any] = dict(features_only=True, pretrained=False)
        try:
            try:
                self.body = timm.create_model(name, img_size=image_size, **options)
            except TypeError:  # most models take any size
                self.body = timm.create_model(name, **options)
        except (RuntimeError, AttributeError) as error:
            raise ValueError(f"timm has no features of '{name}': {error}") from error
        info: Any = self.body.feature_info
        self._names = [f"feature{index}" for index in range(len(info.channels()))]
        self._shapes = {
            name: ShapeSpec(channels=channels, stride=stride)
            for name, channels, stride in zip(
                self._names, info.channels(), info.reduction(), strict=True
            )
        }
        self._channels_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> name of a feature to (N, C, H / stride, W / stride)."""
        features = self.body(images)
        if self._channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return dict(zip(self._names, features, strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes


def _ours(size: str, image_size: int, **options: Any) -> Backbone:
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
    {f"vit-{size}": partial(_ours, size) for size in SIZES}
    | {f"detectron2-vit-{size}": partial(_detectron_vit, size) for size in SIZES}
    | {f"resnet{depth}": partial(_resnet, depth) for depth in (50, 101)}
    | {f"regnet{kind}-4gf": partial(_regnet, kind) for kind in "xy"}
    | {f"swin-{size}": partial(_swin, size) for size in SWIN}
    | {f"mvitv2-{size}": partial(_mvit, size) for size in MVITV2}
)


def build(name: str, part: str, image_size: int, overrides: Sequence[str] = ()) -> nn.Module:
    """A backbone by name.

    Args:
        name: a key of :data:`BACKBONES`, of ours with ``@`` and an attention backend or
            ``act-checkpoint`` behind it; ``timm/NAME``; a checkpoint, whose backbone is built in
            the sizes that it has and loaded; or a config of a detector, with ``=CHECKPOINT`` or
            not.
        part: "alone", "pyramid" (the simple one for plain ViTs, FPN for others) or "detector".
        image_size: side of the images in pixels.
        overrides: of a config.

    Returns:
        "alone" and "pyramid": (N, 3, H, W) to a dict of maps. "detector": detectron2's
        ``GeneralizedRCNN``.

    Raises:
        ValueError: an unknown name, or one that has no such part.
        OSError: a checkpoint cannot be read.
    """
    if is_config(name):
        config, _, checkpoint = name.partition("=")
        return _part_of_config(config, overrides, checkpoint, part, image_size)
    if part == "detector":
        return _detector(name, image_size)
    backbone = _backbone(name, image_size)
    if part == "alone":
        return backbone
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
            f"'{name}' has maps of strides {list(strides.values())}: a pyramid wants 4, 8, 16, 32,"
            " or 16 alone"
        )
    return FPN(backbone, names, PYRAMID["out_channels"], top_block=LastLevelMaxPool())


def is_config(name: str) -> bool:
    """Whether the name of a backbone is ``CONFIG`` or ``CONFIG=CHECKPOINT``."""
    return name.partition("=")[0].endswith((".py", ".yaml"))


def check_name(name: str, overrides: Sequence[str] = ()) -> None:
    """Refuse a name that :func:`build` does not know, without building anything.

    Raises:
        ValueError: an unknown name, or overrides that the config does not know.
        FileNotFoundError: a config or a checkpoint that is not there.
    """
    if is_config(name):
        get_config(name.partition("=")[0], overrides)
    elif name.startswith("timm/"):
        if not timm.is_model(name.removeprefix("timm/").partition(".")[0]):
            raise ValueError(f"timm has no model '{name.removeprefix('timm/')}'")
    elif name.endswith(CHECKPOINT_SUFFIXES):
        if "://" not in name and not Path(name).is_file():
            raise FileNotFoundError(f"checkpoint {name} does not exist")
    elif "://" in name:
        raise ValueError(
            f"'{name}' names no file: of a checkpoint that is elsewhere, name the file, which ends"
            f" in {', '.join(CHECKPOINT_SUFFIXES)}"
        )
    elif "@" in name:
        _options(name)
    elif name not in BACKBONES:
        close = difflib.get_close_matches(name, BACKBONES, n=1, cutoff=0.3)
        hint = f"did you mean '{close[0]}'? There" if close else "there"
        raise ValueError(
            f"there is no backbone '{name}'; {hint} are {', '.join(BACKBONES)}, timm/NAME,"
            " checkpoints and configs"
        )


def _backbone(name: str, image_size: int) -> Backbone:
    check_name(name)
    if name.startswith("timm/"):
        return TimmBackbone(name.removeprefix("timm/"), image_size)
    if name.endswith(CHECKPOINT_SUFFIXES):
        return _backbone_of_checkpoint(name, image_size)
    if "@" in name:
        size, options = _options(name)
        return _ours(size, image_size, **options)
    return BACKBONES[name](image_size)


def _options(name: str) -> tuple[str, dict[str, Any]]:
    """The size and the options of ``vit-SIZE@OPTION``.

    Raises:
        ValueError: no size of ours, or no such option.
    """
    backbone, _, option = name.partition("@")
    size = backbone.removeprefix("vit-")
    if size not in SIZES or option not in (*BACKENDS, ACT_CHECKPOINT):
        raise ValueError(
            f"there is no backbone '{name}': options are vit-SIZE@OPTION, of"
            f" {', '.join((*BACKENDS, ACT_CHECKPOINT))}"
        )
    if option == ACT_CHECKPOINT:
        return size, {"use_act_checkpoint": True}
    return size, {"attention_backend": option}


def _backbone_of_checkpoint(path: str, image_size: int) -> Backbone:
    info = inspect(path)
    if info.num_heads is None:
        raise ValueError(
            f"{path} does not tell the number of attention heads; name the config of its model:"
            f" CONFIG={path}"
        )
    patch = info.patch_size[0]
    # The tables of the windows are the smallest; those of global blocks are made for the image.
    window_size = info.rel_pos_sizes[0] if info.rel_pos_sizes else 14
    backbone = vit_backbone(
        embed_dim=info.embed_dim,
        depth=info.depth,
        num_heads=info.num_heads,
        mlp_ratio=info.mlp_ratio,
        patch_size=patch if patch & (patch - 1) == 0 else None,  # a pyramid needs a power of two
        img_size=image_size,
        pretrain_img_size=info.img_size or 224,
        window_size=window_size,
        use_rel_pos=True,
    )
    load(backbone, path)
    return backbone


def _part_of_config(
    config: str, overrides: Sequence[str], checkpoint: str, part: str, image_size: int
) -> nn.Module:
    cfg = get_config(config, overrides)
    if "backbone" not in cfg.model:
        detectors = [name for name in list_configs() if name.startswith("coco/")]
        raise ValueError(f"{config} is not of a detector; take {detectors[0]}, say")
    name_classes(cfg)
    cfg.dataloader.image_size = image_size
    model: Any = instantiate(cfg.model)
    if checkpoint:
        load(model, checkpoint)
    if part == "detector":
        return model
    return backbone_of(model.backbone)[1] if part == "alone" else model.backbone


def _detector(name: str, image_size: int) -> nn.Module:
    cfg = get_config(DETECTOR)
    name_classes(cfg)
    cfg.model.backbone = LazyCall(_pyramid)(
        name=name, image_size=image_size, out_channels=PYRAMID["out_channels"]
    )
    return instantiate(cfg.model)


def _pyramid(name: str, image_size: int, out_channels: int) -> nn.Module:
    """For a config: the heads refer to ``out_channels``."""
    assert out_channels == PYRAMID["out_channels"]
    return build(name, "pyramid", image_size)


def build_block(size: str, kind: str, image_size: int) -> nn.Module:
    """One block of our backbone as a model of images, for how its cost grows.

    Args:
        size: a name in :data:`crossmae_det.modeling.SIZES`.
        kind: "windowed" or "global".
        image_size: side of the images in pixels.
    """
    blocks = {"windowed": (), "global": (0,)}
    backbone = _ours(size, image_size, depth=1, global_blocks=blocks[kind])
    assert isinstance(backbone, ViT)
    return OneBlock(backbone.blocks[0], backbone.embed_dim, backbone.patch_size[0])


def published_precision() -> dict[str, tuple[float, str]]:
    """Box AP on COCO of backbones by name, and of which weights (MODEL_ZOO.md has the sources)."""
    known = {}
    sizes = {f"ViT-{size[0].upper()}": size for size in SIZES}
    for table in read_records("published")["tables"]:
        for row in table["rows"]:
            if "box AP" not in row:
                continue
            if str(row.get("pretraining", "")).startswith("CrossMAE"):
                known[f"vit-{sizes[row['backbone']]}"] = (row["box AP"], "CrossMAE")
            elif row.get("detector") == "Mask R-CNN":
                known[f"detectron2-vit-{sizes[row['backbone']]}"] = (row["box AP"], "MAE")
    return known
