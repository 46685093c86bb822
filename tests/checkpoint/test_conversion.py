import json
import pickle
import re

import pytest
import safetensors.torch
import torch
from checkpoint_models import SIZES
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling.backbone.vit import ViT as DetectronViT
from timm.models.vision_transformer import VisionTransformer

from crossmae_det.checkpoint import convert, inspect, load, read_checkpoint, to_published
from crossmae_det.detection import ViTBackbone, vit_backbone
from crossmae_det.modeling import ViT, build_vit
from crossmae_det.modeling.vit import LAYER_NORM
from crossmae_det.pretraining import MAE, CrossMAE
from crossmae_det.utils import save_checkpoint


@pytest.fixture
def model():
    backbone = ViT(**SIZES)
    return CrossMAE(backbone, decoder_dim=8, decoder_depth=1, decoder_num_heads=2)


@pytest.fixture
def source(model, tmp_path):
    save_checkpoint({"model": model.state_dict(), "iteration": 3}, tmp_path / "model.pth")
    return tmp_path / "model.pth"


def assert_same(got, want):
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_to_published_and_back_is_exact(fixtures, tmp_path):
    source = fixtures / "crossmae_tiny_training_checkpoint.pth"
    report = convert(source, tmp_path / "native.safetensors", "native")
    assert report.layout == "published CrossMAE" and not report.dropped
    convert(tmp_path / "native.safetensors", tmp_path / "published.pth", "published")
    want = read_checkpoint(source)["model"]
    assert_same(read_checkpoint(tmp_path / "published.pth")["model"], want)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_to_native_in_every_format(model, source, tmp_path, suffix):
    convert(source, tmp_path / f"out{suffix}", "native")
    target = CrossMAE(ViT(**SIZES), decoder_dim=8, decoder_depth=1, decoder_num_heads=2)
    load(target, tmp_path / f"out{suffix}", whole=True)
    assert_same(target.state_dict(), model.state_dict())


def test_timm_loads_it_strictly(model, source, tmp_path):
    report = convert(source, tmp_path / "vit.safetensors", "timm")
    assert len(report.dropped) == len([n for n in model.state_dict() if n.startswith("decoder.")])
    reference = VisionTransformer(**SIZES, num_classes=0, final_norm=False).eval()
    reference.load_state_dict(safetensors.torch.load_file(tmp_path / "vit.safetensors"))
    images = torch.randn(1, 3, 32, 32)
    expected = model.encoder.forward_tokens(images)[-1]
    torch.testing.assert_close(reference.forward_features(images), expected, atol=1e-5, rtol=0)


class Detector(torch.nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = torch.nn.Module()
        self.backbone.net = backbone


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_detectron2_loads_it(model, source, tmp_path, suffix):
    report = convert(source, tmp_path / f"vitdet{suffix}", "vitdet")
    assert "encoder.cls_token" in report.dropped
    sizes = dict(window_size=0, pretrain_img_size=32, norm_layer=LAYER_NORM)
    reference = Detector(DetectronViT(**SIZES, **sizes)).eval()
    DetectionCheckpointer(reference).load(str(tmp_path / f"vitdet{suffix}"))
    own = Detector(ViTBackbone(**SIZES)).eval()
    load(own, tmp_path / f"vitdet{suffix}", whole=True)
    images = torch.randn(1, 3, 32, 32)
    expected = model.encoder.forward_map(images)
    for detector in (reference, own):
        got = detector.backbone.net(images)["last_feat"]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_averaged_weights_and_half_precision(model, tmp_path):
    averaged = {f"module.{n}": t + 1 for n, t in model.state_dict().items()}
    content = {"model": model.state_dict(), "ema": averaged | {"n_averaged": torch.tensor(3)}}
    save_checkpoint(content, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b.pth", "published", weights="ema")
    got = read_checkpoint(tmp_path / "b.pth")["model"]["mask_token"]
    assert torch.equal(got, model.decoder.mask_token + 1)
    half = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    save_checkpoint(half, tmp_path / "half.pth")
    convert(tmp_path / "half.pth", tmp_path / "half.pkl", "vitdet")
    arrays = pickle.loads((tmp_path / "half.pkl").read_bytes())["model"]
    name = "encoder.blocks.0.attn.qkv.weight"
    got = torch.from_numpy(arrays[name.replace("encoder", "backbone.net")])
    assert torch.equal(got, half[name].float())


def test_huggingface_of_mae(tmp_path):
    model = MAE(ViT(**SIZES), decoder_dim=8, decoder_depth=1, decoder_num_heads=2)
    save_checkpoint({"model": model.state_dict()}, tmp_path / "mae.pth")
    convert(tmp_path / "mae.pth", tmp_path / "model.safetensors", "huggingface")
    want = to_published(model.state_dict(), "huggingface")
    assert_same(read_checkpoint(tmp_path / "model.safetensors"), want)


@pytest.mark.parametrize(
    ("output", "to", "message"),
    [
        ("out.pkl", "timm", r"out.pkl.*timm.*\.pth, "),
        ("out.npz", "native", r"out.npz.*native.*\.pkl"),
        ("out.pth", "safetensors", "out.pth.*safetensors"),
        ("out.pth", "swin", "'swin'.*native, published"),
        ("out.pth", "published", "needs 'encoder.cls_token'.*--allow-missing 'encoder.cls_token'"),
    ],
)
def test_invalid_outputs_are_rejected_before_writing(tmp_path, output, to, message):
    backbone = ViT(**SIZES, class_token=False)
    save_checkpoint({"model": backbone.state_dict()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "a.pth", tmp_path / output, to)
    assert not (tmp_path / output).exists()


def test_patterns_allow_missing_and_unexpected_keys(tmp_path):
    backbone = ViTBackbone(**SIZES, use_rel_pos=True)
    state = {f"backbone.net.{name}": tensor for name, tensor in backbone.state_dict().items()}
    save_checkpoint({"model": state}, tmp_path / "a.pth")
    report = convert(
        tmp_path / "a.pth",
        tmp_path / "b.pth",
        "published",
        allow_missing=["encoder.cls_token"],
        allow_unexpected=["*rel_pos*"],
    )
    assert len(report.unexpected) == 4 and "pos_embed" in report.loaded


def test_the_source_is_not_overwritten(source):
    before = source.read_bytes()
    for location in (source, f"{source}:encoder.", source.parent):
        with pytest.raises(ValueError, match="model.pth: .* another output"):
            convert(location, source, "native")
    assert source.read_bytes() == before


def saved_info(tmp_path, state, **beside):
    save_checkpoint({"model": state, **beside}, tmp_path / "a.pth")
    return inspect(tmp_path / "a.pth")


def test_the_sizes_of_a_pretraining_model(tmp_path):
    model = CrossMAE(build_vit("tiny", img_size=64), decoder_dim=32, decoder_depth=3)
    got = saved_info(tmp_path, to_published(model.state_dict(), "crossmae"), epoch=7)
    expected = {
        "layout": "published CrossMAE",
        "size": "tiny",
        "embed_dim": 192,
        "depth": 12,
        "num_heads": 3,
        "mlp_ratio": 4.0,
        "patch_size": (16, 16),
        "img_size": (64, 64),
        "class_token": True,
        "rel_pos_sizes": None,
        "decoder": "CrossMAE",
        "decoder_dim": 32,
        "decoder_depth": 3,
        "decoder_features": 13,
        "decoder_self_attention": False,
        "parameters": sum(tensor.numel() for tensor in model.state_dict().values()),
        "entries": ["epoch", "model"],
    }
    assert {name: getattr(got, name) for name in expected} == expected
    assert json.loads(json.dumps(got.to_dict()))["img_size"] == [64, 64]
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in str(got).splitlines())
    assert lines["img size"] == "64, 64" and lines["class token"] == "yes"
    assert "rel pos sizes" not in lines


def test_the_sizes_of_mae_and_of_a_backbone_alone(tmp_path):
    backbone = build_vit("tiny", img_size=32, patch_size=8, depth=2)
    model = MAE(backbone, decoder_dim=32, decoder_depth=1)
    got = saved_info(tmp_path, model.state_dict())
    assert (got.decoder, got.decoder_depth, got.size) == ("MAE", 1, None)
    assert got.num_heads is None  # no weight tells
    got = saved_info(tmp_path, backbone.state_dict())
    assert got.decoder is None and got.layout.startswith("timm ViT")
    assert got.backbone_parameters == got.parameters


def test_the_sizes_of_a_detector(tmp_path):
    backbone = vit_backbone(
        "tiny", img_size=64, window_size=2, use_rel_pos=True, pretrain_img_size=32
    )
    state = {f"backbone.net.{name}": tensor for name, tensor in backbone.state_dict().items()}
    state["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(5, 8)
    got = saved_info(tmp_path, state)
    assert got.layout.startswith("detectron2 ViTDet")
    assert got.num_heads == 3 and got.rel_pos_sizes == [2, 4]
    assert got.img_size == (32, 32) and not got.class_token
    assert got.classifier_rows == 5 and got.parts == ["roi_heads"]


def test_a_published_training_checkpoint_is_described(fixtures):
    got = inspect(fixtures / "crossmae_tiny_training_checkpoint.pth")
    assert got.layout == "published CrossMAE" and got.decoder == "CrossMAE"
    assert {"args", "epoch", "optimizer"} < set(got.entries)
    assert got.options["mask_ratio"] == "0.75"


def test_inspecting_another_network_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"a.pth: .*'conv1.weight'"):
        saved_info(tmp_path, {"conv1.weight": torch.zeros(1)})
