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

SIZES = {
    "img_size": 96,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 3,
    "pretrain_img_size": 64,
    "use_rel_pos": True,
}


def equal_vits(window_size, **overrides):
    """detectron2's ViT and ours with the same random weights, relative positions included."""
    torch.manual_seed(0)
    reference = D2ViT(
        **SIZES,
        window_size=window_size,
        window_block_indexes=[0, 2],
        norm_layer=lambda dim: torch.nn.LayerNorm(dim, eps=1e-6),
    )
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = ViTBackbone(**SIZES, window_size=window_size, global_blocks=[1, 3], **overrides)
    model.load_state_dict(reference.state_dict())
    return reference, model


def relative(difference, reference):
    return (difference.norm() / reference.norm()).item()


WHERE = [("cpu", name) for name in BACKENDS if name != "flex"] + [
    pytest.param("cuda", name, marks=pytest.mark.cuda) for name in BACKENDS if name != "chunked"
]


# Grids of 12 x 12, 8 x 13 and 5 x 3 patches: windows of 4 divide the first, windows of 5 none.
@pytest.mark.parametrize("window_size", [4, 5])
@pytest.mark.parametrize(("device", "backend"), WHERE)
@pytest.mark.parametrize("size", [(96, 96), (64, 104), (40, 24)])
def test_feature_map_matches_detectron2_in_values_and_gradients(window_size, size, device, backend):
    reference, model = (x.to(device) for x in equal_vits(window_size, attention_backend=backend))
    images = torch.randn(2, 3, *size).to(device)
    expected, got = reference(images)["last_feat"], model(images)["last_feat"]
    assert relative(got - expected, expected) < 1e-4
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), reference.parameters())
    gradients = torch.autograd.grad((got * weight).sum(), model.parameters())
    by_name = dict(zip([name for name, _ in reference.named_parameters()], wanted, strict=True))
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert relative(gradient - by_name[name], by_name[name]) < 1e-4, name


def test_state_dicts_are_interchangeable_with_detectron2():
    reference, model = equal_vits(4)
    reference.load_state_dict(model.state_dict())
    assert model.state_dict().keys() == reference.state_dict().keys()


def pyramids(**overrides):
    reference, model = equal_vits(4)
    arguments = {
        "in_feature": "last_feat",
        "out_channels": 16,
        "scale_factors": (2.0, 1.0, 0.5),
        **overrides,
    }
    return D2SimpleFeaturePyramid(reference, **arguments), SimpleFeaturePyramid(model, **arguments)


def test_pyramid_matches_detectron2():
    reference, model = pyramids(scale_factors=(4.0, 2.0, 1.0, 0.5))
    model.load_state_dict(reference.state_dict())
    images = torch.randn(1, 3, 64, 96)
    expected, got = reference(images), model(images)
    assert list(got) == list(expected) == ["p1", "p2", "p3", "p4"]
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4)
    assert model.output_shape() == reference.output_shape()


def test_the_top_block_starts_from_the_coarsest_level():
    _, model = pyramids(top_block=LastLevelMaxPool())
    features = model(torch.randn(1, 3, 64, 96))
    shapes = model.output_shape()
    assert [shapes[name].stride for name in features] == [4, 8, 16, 32]
    for name, feature in features.items():
        assert feature.shape == (1, 16, 64 // shapes[name].stride, 96 // shapes[name].stride)
    assert torch.equal(features["p5"], features["p4"][..., ::2, ::2])


@pytest.mark.parametrize(
    ("square_pad", "expected"),
    [(0, (48, 80)), (96, (96, 96)), ((48, 96), (48, 96)), ([96, 80], (96, 80))],
)
def test_images_are_padded_to_the_stride_a_square_or_a_rectangle(square_pad, expected):
    model = copy.deepcopy(pyramids(square_pad=square_pad)[1])  # as an average of the weights is
    images = [torch.zeros(3, 40, 50), torch.zeros(3, 33, 70)]
    padded = ImageList.from_tensors(
        images, model.size_divisibility, padding_constraints=model.padding_constraints
    )
    assert padded.tensor.shape[-2:] == expected
    assert all(f.shape[-1] * s.stride == expected[1] for f, s in levels(model, padded.tensor))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("square_pad", [64, (64, 96), (32, 80)])
def test_images_larger_than_the_padded_size_are_rejected(square_pad, count):
    _, model = pyramids(square_pad=square_pad)
    images = [torch.zeros(3, 40, 90), torch.zeros(3, 70, 32)][-count:]
    with pytest.raises(ValueError, match="square_pad") as error:
        ImageList.from_tensors(images, 16, padding_constraints=model.padding_constraints)
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
        ({"scale_factors": (2.0, 0.5)}, r"scale factors \[2.0, 0.5\]"),
        ({"scale_factors": (3.0, 1.5)}, r"scale factors \[3.0, 1.5\]"),
        ({"scale_factors": (8.0,)}, r"scale factors \[8.0\]"),
        ({"square_pad": 40}, "square_pad=40 .* 16"),
        ({"square_pad": (48, 40)}, r"square_pad=\(48, 40\) .* 16"),
    ],
)
def test_impossible_pyramids_are_rejected(overrides, message):
    _, backbone = equal_vits(4)
    arguments = {"in_feature": "last_feat", "out_channels": 16, "scale_factors": (2.0, 1.0, 0.5)}
    with pytest.raises(ValueError, match=message):
        SimpleFeaturePyramid(backbone, **(arguments | overrides))


def test_sizes_come_from_the_table_and_can_be_overridden():
    backbone = vit_backbone("tiny", depth=2, num_heads=None)
    assert (backbone.embed_dim, len(backbone.blocks)) == (192, 2)
    assert backbone.blocks[0].attn.num_heads == 3
    with pytest.raises(ValueError, match="'giant'.* tiny, small"):
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
def test_yaml_configs_build_the_registered_backbones(name, features):
    cfg = default_config()
    cfg.MODEL.VIT.SIZE, cfg.MODEL.VIT.DEPTH, cfg.INPUT.IMAGE_SIZE = "tiny", 2, 64
    cfg.MODEL.VIT.GLOBAL_BLOCKS, cfg.MODEL.VIT.ATTENTION_BACKEND = [0], "sdpa"
    backbone = BACKBONE_REGISTRY.get(name)(cfg, ShapeSpec(channels=3))
    assert list(backbone.output_shape()) == features
    assert list(backbone(torch.zeros(1, 3, 64, 64))) == features
    vit = backbone if len(features) == 1 else backbone.net
    assert [block.attn.backend for block in vit.blocks] == ["sdpa", "sdpa"]
    assert [block.window_size for block in vit.blocks] == [0, 14]


def test_attention_backends_are_named():
    with pytest.raises(ValueError, match="'xformers'.* auto"):
        vit_backbone("tiny", attention_backend="xformers")
