"""The plain ViT and its simple feature pyramid as detectron2 backbones.

They have the parameter names of detectron2's ``ViT`` and ``SimpleFeaturePyramid``, so ViTDet
weights load without renaming. Legend: N images, C channels, P patch size.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling import SimpleFeaturePyramid as D2SimpleFeaturePyramid
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from timm.layers import to_2tuple
from torch import Tensor, nn

from crossmae_det.detection.yaml_config import IMAGE_SIZE
from crossmae_det.modeling import ViT, size_arguments


class ViTBackbone(ViT, Backbone):
    """The ViT's feature-map path as a detectron2 backbone with one feature, ``last_feat``.

    Args:
        out_feature: name of the feature.
        **kwargs: see :class:`crossmae_det.modeling.ViT`. There is no class token: the feature-map
            path would leave it without a gradient.

    Raises:
        ValueError: the patch is not square, so the feature has no single stride.
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
        """Images are padded to a multiple of this many pixels: the patch size."""
        return self.patch_size[0]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, height, width) -> {out_feature: (N, C, ceil(height / P), ceil(width / P))}."""
        return {self._out_features[0]: self.forward_map(images)}


def vit_backbone(size: str = "base", **overrides: Any) -> ViTBackbone:
    """A backbone by the name of its size.

    Args:
        size: a name in :data:`crossmae_det.modeling.SIZES`.
        **overrides: any argument of :class:`ViTBackbone`; None means the size's value or the
            default. The patch size is 16 whatever the ViT was pretrained with, because the levels
            of a pyramid need a power of two.

    Raises:
        ValueError: an unknown size, or an argument out of range.
    """
    if overrides.get("patch_size") is None:
        overrides["patch_size"] = 16
    return ViTBackbone(**size_arguments(size, **overrides))


class PaddedSize(int):
    """A ``square_size`` for detectron2's ``ImageList`` that may be a rectangle and is checked.

    ``ImageList`` pads to squares only, and silently crops larger images. It writes ``square_size``
    over the height, then the width of the largest image (``max_size[0] = max_size[1] =
    square_size``), and torch lets the value that is assigned take over through
    ``__torch_function__``. As an int it is the longer side, so 0 for no padding.
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
        """``max_size[axis] = padded_size``; ValueError if an image is larger."""
        max_size, axis, padded = args
        if max_size[axis] > padded.size[axis]:
            height, width = (int(side) for side in max_size)
            raise ValueError(
                f"images of up to {height}x{width} pixels (height x width) exceed the padded size"
                f" {padded.size[0]}x{padded.size[1]}: raise model.backbone.square_pad"
                " (INPUT.IMAGE_SIZE in yaml configs) or resize the images to fit"
            )
        max_size[axis] = padded.size[axis]


class SimpleFeaturePyramid(D2SimpleFeaturePyramid):
    """ViTDet's pyramid: every level is made from the backbone's last feature map (section 3).

    detectron2's, with padding to the coarsest stride (its ``padding_constraints`` misspell the
    key), padding to rectangles, and a top block that extends any coarsest level.

    Args:
        net: the backbone.
        in_feature: name of the backbone's feature.
        out_channels: channels of every level.
        scale_factors: size of each level relative to the backbone's feature map, halving from level
            to level, out of 4, 2, 1 and 0.5.
        top_block: makes ``top_block.num_levels`` further levels from the coarsest one.
        norm: norm of the convolutions, a name that detectron2's ``get_norm`` knows; "" for none.
        square_pad: pad images to squares of this many pixels, or to (height, width); larger images
            are rejected. 0 pads only to a multiple of the coarsest level's stride.

    Raises:
        ValueError: scale factors that do not halve or are not supported, levels whose stride is not
            a power of two, or a padded size that the coarsest stride does not divide.
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
        stride = net.output_shape()[in_feature].stride
        strides = [stride / scale for scale in scale_factors]
        halving = all(a * 2 == b for a, b in itertools.pairwise(strides))
        if not halving or math.log2(strides[0]) % 1 or not {4, 2, 1, 0.5}.issuperset(scale_factors):
            raise ValueError(
                f"scale factors {list(scale_factors)} on a patch of {stride} pixels give strides"
                f" {strides}: use factors out of 4, 2, 1, 0.5, each half the one before, that give"
                " powers of two"
            )
        padded_size = to_2tuple(square_pad)
        if any(side % strides[-1] for side in padded_size):
            raise ValueError(
                f"square_pad={square_pad} is not a multiple of the coarsest stride {strides[-1]:g}:"
                " change it, or dataloader.image_size, which it follows in the configs"
            )
        if top_block is not None:
            top_block.in_feature = f"p{int(math.log2(strides[-1]))}"  # type: ignore[assignment]
        super().__init__(
            net, in_feature, out_channels, scale_factors, top_block, norm, PaddedSize(*padded_size)
        )
        # Parameters stay in the order of checkpointed optimizers: the backbone's come first.
        for name in [name for name in self._modules if name.startswith("simfp_")]:
            self._modules[name] = self._modules.pop(name)

    @property
    def size_divisibility(self) -> int:
        """Images are padded to a multiple of this many pixels: the coarsest stage's stride."""
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """What detectron2's ``ImageList`` pads to: a size if one is set, else the divisibility."""
        return {"size_divisibility": self._size_divisibility, "square_size": self._square_pad}


@BACKBONE_REGISTRY.register()
def build_crossmae_vit_backbone(cfg, input_shape: ShapeSpec) -> ViTBackbone:
    """The plain ViT of ``cfg.MODEL.VIT``; its one feature is called ``last_feat``."""
    # The keys are the arguments of `vit_backbone` in capitals; 0 or an empty list is its default.
    arguments = {key.lower(): value for key, value in cfg.MODEL.VIT.items()}
    for key in ("embed_dim", "depth", "num_heads", "global_blocks"):
        arguments[key] = arguments[key] or None
    image_size = cfg.INPUT.IMAGE_SIZE or IMAGE_SIZE
    return vit_backbone(**arguments, img_size=image_size, in_chans=input_shape.channels)


@BACKBONE_REGISTRY.register()
def build_crossmae_vit_pyramid_backbone(cfg, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """The ViT of ``cfg.MODEL.VIT`` under the simple feature pyramid of ``cfg.MODEL.PYRAMID``."""
    pyramid = cfg.MODEL.PYRAMID
    return SimpleFeaturePyramid(
        build_crossmae_vit_backbone(cfg, input_shape),
        "last_feat",
        pyramid.OUT_CHANNELS,
        pyramid.SCALE_FACTORS,
        top_block=LastLevelMaxPool() if pyramid.TOP_BLOCK else None,
        norm=pyramid.NORM,
        square_pad=(cfg.INPUT.IMAGE_SIZE or IMAGE_SIZE) if pyramid.SQUARE_PAD else 0,
    )
