import copy

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling import SimpleFeaturePyramid as D2SimpleFeaturePyramid
from detectron2.modeling import ViT as D2ViT
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.structures import ImageList

from crossmae_det.detection import SimpleFeaturePyramid, ViTBackbone, vit_backbone
from crossmae_det.detection.yaml_config import default_config
from crossmae_det.layers.attention_backends import BACKENDS
from crossmae_det.model_zoo import get_config

SIZES = {
    "img_size": 96,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 3,
    "pretrain_img_size": 64,
    "use_rel_pos": True,
}


def twins(window_size, **overrides):
    """detectron2's ViT and ours with the same random weights, relative positions included."""
    torch.manual_seed(0)
    theirs = D2ViT(
        **SIZES,
        window_size=window_size,
        window_block_indexes=[0, 2],
        norm_layer=lambda dim: torch.nn.LayerNorm(dim, eps=1e-6),
    )
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours = ViTBackbone(**SIZES, window_size=window_size, global_blocks=[1, 3], **overrides)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def relative(difference, reference):
    return (difference.norm() / reference.norm()).item()


WHERE = [("cpu", name) for name in BACKENDS if name != "flex"] + [
    pytest.param(
        "cuda",
        name,
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    )
    for name in BACKENDS
    if name != "chunked"
]


# A grid of 12 x 12, of 8 x 13 and of 5 x 3 patches; windows of 4 divide the first, of 5 none of
# them.
@pytest.mark.parametrize("window_size", [4, 5])
@pytest.mark.parametrize(("device", "backend"), WHERE)
@pytest.mark.parametrize("size", [(96, 96), (64, 104), (40, 24)])
def test_map_mode_is_detectron2s_vit_in_values_and_gradients(window_size, size, device, backend):
    theirs, ours = (x.to(device) for x in twins(window_size, attention_backend=backend))
    images = torch.randn(2, 3, *size).to(device)
    expected, got = theirs(images)["last_feat"], ours(images)["last_feat"]
    assert relative(got - expected, expected) < 1e-4
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), theirs.parameters())
    gradients = torch.autograd.grad((got * weight).sum(), ours.parameters())
    by_name = dict(zip([name for name, _ in theirs.named_parameters()], wanted, strict=True))
    for (name, _), gradient in zip(ours.named_parameters(), gradients, strict=True):
        assert relative(gradient - by_name[name], by_name[name]) < 1e-4, name


def test_one_state_dict_fits_both():
    theirs, ours = twins(4)
    theirs.load_state_dict(ours.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def pyramids(**overrides):
    theirs, ours = twins(4)
    arguments = {
        "in_feature": "last_feat",
        "out_channels": 16,
        "scale_factors": (2.0, 1.0, 0.5),
        **overrides,
    }
    return D2SimpleFeaturePyramid(theirs, **arguments), SimpleFeaturePyramid(ours, **arguments)


def test_pyramid_is_detectron2s():
    theirs, ours = pyramids(scale_factors=(4.0, 2.0, 1.0, 0.5))
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 64, 96)
    expected, got = theirs(images), ours(images)
    assert list(got) == list(expected) == ["p1", "p2", "p3", "p4"]
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4)
    assert ours.output_shape() == theirs.output_shape()


def test_the_top_block_starts_from_the_coarsest_level():
    _, ours = pyramids(top_block=LastLevelMaxPool())
    features = ours(torch.randn(1, 3, 64, 96))
    shapes = ours.output_shape()
    assert [shapes[name].stride for name in features] == [4, 8, 16, 32]
    for name, feature in features.items():
        assert feature.shape == (1, 16, 64 // shapes[name].stride, 96 // shapes[name].stride)
    assert torch.equal(features["p5"], features["p4"][..., ::2, ::2])


@pytest.mark.parametrize(
    ("square_pad", "expected"),
    [(0, (48, 80)), (96, (96, 96)), ((48, 96), (48, 96)), ([96, 80], (96, 80))],
)
def test_images_are_padded_to_the_stride_a_square_or_a_rectangle(square_pad, expected):
    ours = copy.deepcopy(pyramids(square_pad=square_pad)[1])  # as an average of the weights is
    images = [torch.zeros(3, 40, 50), torch.zeros(3, 33, 70)]
    padded = ImageList.from_tensors(
        images, ours.size_divisibility, padding_constraints=ours.padding_constraints
    )
    assert padded.tensor.shape[-2:] == expected
    assert all(f.shape[-1] * s.stride == expected[1] for f, s in levels(ours, padded.tensor))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("square_pad", [64, (64, 96), (32, 80)])
def test_images_larger_than_the_padded_size_are_rejected(square_pad, count):
    _, ours = pyramids(square_pad=square_pad)
    images = [torch.zeros(3, 40, 90), torch.zeros(3, 70, 32)][-count:]
    with pytest.raises(ValueError, match="square_pad") as error:
        ImageList.from_tensors(images, 16, padding_constraints=ours.padding_constraints)
    given = (70, 90) if count == 2 else (70, 32)
    padded = (64, 64) if square_pad == 64 else square_pad
    for height, width in (given, padded):
        assert f"{height}x{width}" in str(error.value)
    assert "\n" not in str(error.value)


def levels(pyramid, images):
    return zip(pyramid(images).values(), pyramid.output_shape().values(), strict=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"scale_factors": (2.0, 0.5)}, "each twice the one before"),
        ({"scale_factors": (3.0, 1.5)}, "powers of two"),
        ({"scale_factors": (8.0,)}, "scale factor 8.0 is not one of"),
        ({"square_pad": 40}, "square_pad=40 is not a multiple of the coarsest stride 16"),
        ({"square_pad": (48, 40)}, r"square_pad=\(48, 40\) is not a multiple of the coarsest"),
    ],
)
def test_impossible_pyramids_are_refused(overrides, message):
    _, backbone = twins(4)
    arguments = {"in_feature": "last_feat", "out_channels": 16, "scale_factors": (2.0, 1.0, 0.5)}
    with pytest.raises(ValueError, match=message):
        SimpleFeaturePyramid(backbone, **(arguments | overrides))


def test_sizes_come_from_the_table_and_can_be_overridden():
    backbone = vit_backbone("tiny", depth=2, num_heads=None)
    assert (backbone.embed_dim, len(backbone.blocks), backbone.blocks[0].attn.num_heads) == (
        192,
        2,
        3,
    )
    with pytest.raises(ValueError, match="unknown backbone size 'giant'; sizes are tiny, small"):
        vit_backbone("giant")
    with pytest.raises(ValueError, match="square patches"):
        vit_backbone("tiny", patch_size=(8, 16))


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("build_crossmae_vit_backbone", ["last_feat"]),
        ("build_crossmae_vit_pyramid_backbone", ["p2", "p3", "p4", "p5", "p6"]),
    ],
)
def test_yaml_configs_can_name_the_backbones(name, features):
    cfg = default_config()
    cfg.MODEL.VIT.SIZE, cfg.MODEL.VIT.DEPTH, cfg.INPUT.IMAGE_SIZE = "tiny", 2, 64
    backbone = BACKBONE_REGISTRY.get(name)(cfg, ShapeSpec(channels=3))
    assert list(backbone.output_shape()) == features
    assert list(backbone(torch.zeros(1, 3, 64, 64))) == features


def test_configs_name_the_attention_backend():
    cfg = default_config()
    cfg.MODEL.VIT.SIZE, cfg.MODEL.VIT.DEPTH, cfg.INPUT.IMAGE_SIZE = "tiny", 2, 64
    cfg.MODEL.VIT.ATTENTION_BACKEND = "sdpa"
    backbone = BACKBONE_REGISTRY.get("build_crossmae_vit_backbone")(cfg, ShapeSpec(channels=3))
    assert [block.attn.backend for block in backbone.blocks] == ["sdpa", "sdpa"]
    lazy = get_config("common/models/mask_rcnn_vit.py").model.backbone.net
    assert lazy.attention_backend == "auto"
    with pytest.raises(ValueError, match="unknown attention backend 'xformers'; backends are auto"):
        vit_backbone("tiny", attention_backend="xformers")
