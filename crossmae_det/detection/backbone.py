"""The plain ViT and its simple feature pyramid as detectron2 backbones.

Both have the parameter names of detectron2's own ``ViT`` and ``SimpleFeaturePyramid``, so ViTDet
weights load without renaming. Legend: N images, C channels, P patch side, S stride of a level.
"""

import math
from collections.abc import Sequence
from typing import Any

from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from timm.layers import to_2tuple
from torch import Tensor, nn

from crossmae_det.detection.yaml_config import IMAGE_SIZE
from crossmae_det.modeling import ViT, size_arguments


class ViTBackbone(ViT, Backbone):
    """The backbone in map mode as a detectron2 backbone with the one feature ``last_feat``.

    Args:
        out_feature: name of the feature.
        **kwargs: see :class:`crossmae_det.modeling.ViT`. There is no class token: in map mode it
            would be a parameter without a gradient.

    Raises:
        ValueError: the patch is not square, so that the feature has no one stride.
    """

    def __init__(self, *args, out_feature: str = "last_feat", **kwargs):
        super().__init__(*args, class_token=False, **kwargs)
        if self.patch_size[0] != self.patch_size[1]:
            raise ValueError(f"a detection backbone needs square patches, got {self.patch_size}")
        self._out_features = [out_feature]
        self._out_feature_channels = {out_feature: self.embed_dim}
        self._out_feature_strides = {out_feature: self.patch_size[0]}

    @property
    def size_divisibility(self) -> int:
        """Images are padded to a multiple of this many pixels: the patch side."""
        return self.patch_size[0]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, height, width) -> {out_feature: (N, C, ceil(height / P), ceil(width / P))}."""
        return {self._out_features[0]: self.forward_map(images)}


def vit_backbone(size: str = "base", **overrides: Any) -> ViTBackbone:
    """A backbone of the size table.

    Args:
        size: a name in :data:`crossmae_det.modeling.SIZES`.
        **overrides: any argument of :class:`ViTBackbone`; None stands for the table's value or the
            default. The patch is 16 pixels whatever the size was pretrained with: the levels of a
            pyramid need a power of two.

    Raises:
        ValueError: an unknown size, or an argument out of range.
    """
    if (patch_size := overrides.pop("patch_size", None)) is None:
        patch_size = 16
    return ViTBackbone(**size_arguments(size, patch_size=patch_size, **overrides))


class PaddedSize(int):
    """``square_size`` for detectron2's ``ImageList``, also of a rectangle, and with a check.

    As a number it is the longer side, so 0 for no padding. ``ImageList`` crops images that are
    larger, and knows squares only. It writes the number over the height, then the width of the
    largest image (``max_size[0] = max_size[1] = square_size``): the one place where both sizes are
    at hand. torch lets the value that is written take over.
    """

    size: tuple[int, int]

    def __new__(cls, height: int, width: int) -> "PaddedSize":
        padded = super().__new__(cls, max(height, width))
        padded.size = (height, width)
        return padded

    def __getnewargs__(self) -> tuple[int, int]:  # type: ignore[override]
        return self.size  # for copies and pickles

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> None:
        """``max_size[axis] = padded_size``.

        Raises:
            ValueError: an image is larger.
        """
        max_size, axis, padded = args
        height, width = padded.size
        if max_size[axis] > padded.size[axis]:
            given = [int(side) for side in max_size]
            raise ValueError(
                f"images of up to {given[0]}x{given[1]} pixels (height x width) do not fit the"
                f" {height}x{width} that they are padded to: raise model.backbone.square_pad"
                " (INPUT.IMAGE_SIZE in yaml configs), or resize them to fit"
            )
        max_size[axis] = padded.size[axis]


class SimpleFeaturePyramid(Backbone):
    """ViTDet's pyramid: every level is made from the backbone's last map alone (ViTDet, section 3).

    Args:
        net: the backbone.
        in_feature: name of the backbone's feature.
        out_channels: channels of every level.
        scale_factors: size of each level over the backbone's map, halving from level to level, out
            of 4, 2, 1 and 0.5.
        top_block: makes ``top_block.num_levels`` further levels from the coarsest one.
        norm: norm of the convolutions, a name that detectron2's ``get_norm`` knows; "" for none.
        square_pad: pad images to squares of this many pixels, or to (height, width); larger images
            are rejected. 0 pads only to a multiple of the coarsest level's stride.

    Raises:
        ValueError: scale factors that do not halve, levels whose stride is no power of two, or a
            padded size that the coarsest stride does not divide.
    """

    def __init__(
        self,
        net: Backbone,
        in_feature: str,
        out_channels: int,
        scale_factors: Sequence[float],
        top_block: nn.Module | None = None,
        norm: str = "LN",
        square_pad: int | tuple[int, int] = 0,
    ):
        super().__init__()
        shape = net.output_shape()[in_feature]
        strides = [shape.stride / scale for scale in scale_factors]
        halving = all(
            fine * 2 == coarse for fine, coarse in zip(strides, strides[1:], strict=False)
        )
        if not halving or math.log2(strides[0]) % 1:
            raise ValueError(
                f"scale factors {list(scale_factors)} on a patch of {shape.stride} pixels give"
                f" strides {strides}; they must be powers of two, each twice the one before"
            )
        padded_size = to_2tuple(square_pad)
        if any(side % strides[-1] for side in padded_size):
            raise ValueError(
                f"square_pad={square_pad} is not a multiple of the coarsest stride {strides[-1]:g}:"
                " change it, or dataloader.image_size, which it follows in the configs"
            )
        self.net = net
        self.in_feature = in_feature
        self.top_block = top_block
        self._square_pad = PaddedSize(*padded_size)
        self._size_divisibility = int(strides[-1])

        levels = [int(math.log2(stride)) for stride in strides]
        self._stages = [f"simfp_{level}" for level in levels]
        for name, scale in zip(self._stages, scale_factors, strict=True):
            self.add_module(name, self._stage(shape.channels, out_channels, scale, norm))
        if top_block is not None:
            extra: int = top_block.num_levels  # type: ignore[assignment]
            levels += range(levels[-1] + 1, levels[-1] + 1 + extra)
        self._out_features = [f"p{level}" for level in levels]
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        self._out_feature_strides = {f"p{level}": 2**level for level in levels}

    @staticmethod
    def _stage(dim: int, out_channels: int, scale: float, norm: str) -> nn.Sequential:
        """Resize the backbone's map by ``scale``, then a 1x1 and a 3x3 convolution."""
        layers: list[nn.Module]
        if scale == 4:
            layers = [
                nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2),
                get_norm(norm, dim // 2),
                nn.GELU(),
                nn.ConvTranspose2d(dim // 2, dim // 4, kernel_size=2, stride=2),
            ]
            dim = dim // 4
        elif scale == 2:
            layers = [nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2)]
            dim = dim // 2
        elif scale == 1:
            layers = []
        elif scale == 0.5:
            layers = [nn.MaxPool2d(kernel_size=2, stride=2)]
        else:
            raise ValueError(f"scale factor {scale} is not one of 4, 2, 1, 0.5")
        for kernel in (1, 3):
            layers.append(
                Conv2d(
                    dim,
                    out_channels,
                    kernel_size=kernel,
                    padding=kernel // 2,
                    bias=norm == "",
                    norm=get_norm(norm, out_channels),
                )
            )
            dim = out_channels
        return nn.Sequential(*layers)

    @property
    def size_divisibility(self) -> int:
        """Images are padded to a multiple of this many pixels: the coarsest stage's stride."""
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """What detectron2's ``ImageList`` pads to: a size if asked for, else the divisibility."""
        return {"size_divisibility": self._size_divisibility, "square_size": self._square_pad}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute all levels.

        Args:
            images: (N, 3, height, width), both sides multiples of ``size_divisibility``.

        Returns:
            Level name, "p2" for stride 4 and so on, to (N, out_channels, height / S, width / S),
            from fine to coarse.
        """
        feature = self.net(images)[self.in_feature]
        results = [getattr(self, name)(feature) for name in self._stages]
        if self.top_block is not None:
            results.extend(self.top_block(results[-1]))
        return dict(zip(self._out_features, results, strict=True))


@BACKBONE_REGISTRY.register()
def build_crossmae_vit_backbone(cfg, input_shape: ShapeSpec) -> ViTBackbone:
    """The plain ViT of ``cfg.MODEL.VIT``; its one feature is called ``last_feat``."""
    vit = cfg.MODEL.VIT
    return vit_backbone(
        vit.SIZE,
        embed_dim=vit.EMBED_DIM or None,
        depth=vit.DEPTH or None,
        num_heads=vit.NUM_HEADS or None,
        patch_size=vit.PATCH_SIZE,
        img_size=cfg.INPUT.IMAGE_SIZE or IMAGE_SIZE,
        in_chans=input_shape.channels,
        pretrain_img_size=vit.PRETRAIN_IMG_SIZE,
        window_size=vit.WINDOW_SIZE,
        global_blocks=vit.GLOBAL_BLOCKS or None,
        use_rel_pos=vit.USE_REL_POS,
        drop_path_rate=vit.DROP_PATH_RATE,
        use_act_checkpoint=vit.USE_ACT_CHECKPOINT,
        freeze_blocks=vit.FREEZE_BLOCKS,
        attention_backend=vit.ATTENTION_BACKEND,
    )


@BACKBONE_REGISTRY.register()
def build_crossmae_vit_pyramid_backbone(cfg, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """The ViT of ``cfg.MODEL.VIT`` under the simple feature pyramid of ``cfg.MODEL.PYRAMID``."""
    pyramid = cfg.MODEL.PYRAMID
    backbone = build_crossmae_vit_backbone(cfg, input_shape)
    (in_feature,) = backbone.output_shape()
    return SimpleFeaturePyramid(
        backbone,
        in_feature=in_feature,
        out_channels=pyramid.OUT_CHANNELS,
        scale_factors=pyramid.SCALE_FACTORS,
        norm=pyramid.NORM,
        square_pad=(cfg.INPUT.IMAGE_SIZE or IMAGE_SIZE) if pyramid.SQUARE_PAD else 0,
        top_block=LastLevelMaxPool() if pyramid.TOP_BLOCK else None,
    )
