import json
import re

import pytest
import torch

from crossmae_det.checkpoint import inspect, to_published
from crossmae_det.checkpoint.conversion import format_facts
from crossmae_det.checkpoint.layouts import describe_backbone
from crossmae_det.detection import vit_backbone
from crossmae_det.modeling import build_vit
from crossmae_det.pretraining import MAE, CrossMAE
from crossmae_det.utils import save_checkpoint


def facts(tmp_path, state, **beside):
    save_checkpoint({"model": state, **beside}, tmp_path / "a.pth")
    got = inspect(tmp_path / "a.pth")
    assert json.loads(json.dumps(got)) == got
    return got


def test_a_pretraining_model(tmp_path):
    model = CrossMAE(build_vit("tiny", img_size=64), decoder_dim=32, decoder_depth=3)
    got = facts(tmp_path, to_published(model.state_dict(), "crossmae"), epoch=7)
    expected = {
        "format": "published CrossMAE",
        "size": "tiny",
        "width": 192,
        "depth": 12,
        "heads": 3,
        "MLP ratio": 4.0,
        "patch": [16, 16],
        "image size": [64, 64],
        "class token": True,
        "decoder": "CrossMAE",
        "decoder width": 32,
        "decoder depth": 3,
        "features that the decoder reads": 13,
        "decoder self-attention": False,
        "parameters": sum(tensor.numel() for tensor in model.state_dict().values()),
        "beside the weights": ["epoch", "model"],
    }
    assert {name: got[name] for name in expected} == expected
    assert re.search(r"image size +64, 64\n", format_facts(got))
    assert re.search(r"class token +yes\n", format_facts(got))


def test_mae_and_a_backbone_alone(tmp_path):
    backbone = build_vit("tiny", img_size=32, patch_size=8, depth=2)
    model = MAE(backbone, decoder_dim=32, decoder_depth=1)
    got = facts(tmp_path, model.state_dict())
    assert (got["decoder"], got["decoder depth"], got["size"]) == ("MAE", 1, "none of the usual")
    assert "heads" not in got  # no weight tells
    got = facts(tmp_path, backbone.state_dict())
    assert got["decoder"] == "none" and got["format"].startswith("timm ViT")
    assert got["parameters of the backbone"] == got["parameters"]


def test_a_detector(tmp_path):
    backbone = vit_backbone(
        "tiny", img_size=64, window_size=2, use_rel_pos=True, pretrain_img_size=32
    )
    state = {f"backbone.net.{name}": tensor for name, tensor in backbone.state_dict().items()}
    state["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(5, 8)
    got = facts(tmp_path, state)
    assert got["format"].startswith("detectron2 ViTDet")
    assert got["heads"] == 3 and got["sides of relative positions"] == [2, 4]
    assert got["image size"] == [32, 32] and not got["class token"]
    assert got["rows of the classifier"] == 5 and got["parts beside the backbone"] == ["roi_heads"]


def test_the_published_training_checkpoint(fixtures):
    got = inspect(fixtures / "crossmae_tiny_training_checkpoint.pth")
    assert got["format"] == "published CrossMAE" and got["decoder"] == "CrossMAE"
    assert {"args", "epoch", "optimizer"} < set(got["beside the weights"])
    assert got["trained with mask_ratio"] == "0.75"


def test_what_is_no_vit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a.pth: no checkpoint of a plain ViT.*'conv1.weight'"):
        facts(tmp_path, {"conv1.weight": torch.zeros(1)})


def test_a_backbone_in_words():
    backbone = build_vit("tiny")
    assert describe_backbone(backbone.state_dict()) == "ViT-T, 192 wide with 12 blocks"
