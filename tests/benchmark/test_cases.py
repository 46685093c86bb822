"""The backbones and models of the benchmark, built by name."""

import pytest
import torch

from crossmae_det.benchmark.cases import BACKBONES, build, build_block, check_name, variations
from crossmae_det.benchmark.report import published_ap
from crossmae_det.detection import vit_backbone
from crossmae_det.modeling import build_vit
from crossmae_det.utils import save_checkpoint

SMALLEST = (
    *("vit-tiny", "detectron2-vit-tiny", "resnet50", "regnetx-4gf", "swin-tiny", "mvitv2-tiny"),
    *("timm/resnet10t", "timm/vit_tiny_patch16_224"),
)
CONFIG = "coco/mask_rcnn_crossmae_vit_s_100ep.py"


@pytest.mark.parametrize("name", [*SMALLEST, CONFIG])
def test_shapes_of_backbones_and_their_pyramids(name):
    images = torch.zeros(1, 3, 64, 64)
    alone = build(name, "alone", 64).eval()
    with torch.no_grad():
        for feature, shape in alone.output_shape().items():
            side = 64 // shape.stride
            assert alone(images)[feature].shape == (1, shape.channels, side, side)
        maps = build(name, "pyramid", 64).eval()(images)
    assert {level: tuple(m.shape) for level, m in maps.items()} == {
        f"p{level}": (1, 256, 64 >> level, 64 >> level) for level in range(2, 7)
    }


def test_a_config_with_overrides():
    model = build(CONFIG, "alone", 64, ["model.backbone.net.window_size=7"])
    assert model.blocks[0].window_size == 7


def test_a_detector_with_another_backbone():
    model = build("resnet50", "detector", 64)
    assert type(model.backbone.bottom_up).__name__ == "ResNet"
    assert model.roi_heads.num_classes == 80


def test_the_backbone_of_a_checkpoint_has_its_sizes_and_weights(tmp_path):
    backbone = build_vit("tiny", img_size=64)
    save_checkpoint({"model": backbone.state_dict()}, tmp_path / "a.pth")
    model = build(str(tmp_path / "a.pth"), "alone", 64)
    assert len(model.blocks) == 12 and model.embed_dim == 192
    assert torch.equal(model.blocks[3].mlp.fc1.weight, backbone.blocks[3].mlp.fc1.weight)
    sizes = dict(patch_size=8, img_size=64, depth=8, window_size=4, use_rel_pos=True)
    trained = vit_backbone("tiny", **sizes)
    save_checkpoint({"model": trained.state_dict()}, tmp_path / "windows.pth")
    model = build(str(tmp_path / "windows.pth"), "alone", 64)
    assert model.patch_size == (8, 8)
    assert [block.window_size for block in model.blocks] == 4 * [4, 0]
    odd = build_vit("tiny", depth=1)
    save_checkpoint({"model": odd.state_dict()}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"odd\.pth: the number of attention heads"):
        build(str(tmp_path / "odd.pth"), "alone", 64)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("vit-bse", ValueError, "'vit-bse' .*'vit-base'"),
        ("vit-base@fast", ValueError, "'vit-base@fast'.* act-checkpoint"),
        ("timm/no_such_model", ValueError, "'no_such_model'"),
        ("nowhere.pth", FileNotFoundError, r"nowhere\.pth"),
        ("nowhere.py", FileNotFoundError, r"nowhere\.py"),
        ("hf://owner/repository@main", ValueError, "hf://owner/repository@main"),
    ],
)
def test_unknown_names_are_rejected(name, error, message):
    with pytest.raises(error, match=message):
        check_name(name)


def test_missing_parts_are_rejected():
    with pytest.raises(ValueError, match="vit_tiny_r_s16_p8_224.* strides"):
        build("timm/vit_tiny_r_s16_p8_224", "pyramid", 224)
    with pytest.raises(ValueError, match="mae_vit_b_800ep.py .* coco/"):
        build("pretraining/mae_vit_b_800ep.py", "alone", 64)


def test_options_of_our_vits():
    assert build("vit-tiny@eager", "alone", 64).blocks[0].attn.backend == "eager"
    assert build("vit-tiny@act-checkpoint", "alone", 64).use_act_checkpoint


def test_windowed_and_global_blocks():
    assert build_block("tiny", "windowed", 64).block.window_size == 14
    assert build_block("tiny", "global", 64).block.window_size == 0


def test_published_ap_belongs_to_known_backbones():
    assert published_ap().keys() <= BACKBONES.keys()


def test_only_crossmae_is_varied():
    crossmae, mae = (f"pretraining/{name}_vit_b_800ep.py" for name in ("crossmae", "mae"))
    ratios = ("model.prediction_ratio=0.25",), ("model.prediction_ratio=0.5",)
    assert variations(crossmae, [0.25, 0.5], []) == [*ratios]
    assert variations(mae, [0.25, 0.5], [1, 2]) == variations(crossmae, [], []) == [()]
