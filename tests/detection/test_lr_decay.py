import pytest
import torch
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from torch import nn

from crossmae_det.detection import SimpleFeaturePyramid, layer_decay_param_groups, vit_backbone


class Detector(nn.Module):
    def __init__(self, depth=3, **overrides):
        super().__init__()
        trunk = vit_backbone(
            "tiny", embed_dim=12, depth=depth, img_size=32, use_rel_pos=True, **overrides
        )
        self.backbone = SimpleFeaturePyramid(trunk, "last_feat", 4, (1.0, 0.5))
        self.head = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))


def by_parameter(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in groups for p in group["params"]}


def test_rates_are_those_of_vitdet_for_every_parameter():
    model = Detector()
    groups = by_parameter(model, layer_decay_param_groups(model, 0.1, lr_decay=0.5))
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, group in groups.items():
        expected = 0.1 * get_vit_lr_decay_rate(name, lr_decay_rate=0.5, num_layers=3)
        assert group["lr"] == pytest.approx(expected), name


def test_norms_and_the_position_embedding_are_not_decayed():
    model = Detector()
    groups = by_parameter(model, layer_decay_param_groups(model, 0.1))
    undecayed = {name for name, group in groups.items() if group.get("weight_decay") == 0}
    expected = {
        name
        for name in groups
        if "norm" in name or name.endswith("pos_embed") or name.startswith("head.1.")
    }
    assert undecayed == expected
    assert "backbone.simfp_4.0.norm.weight" in expected


def test_the_trunk_may_have_a_rate_of_its_own_and_groups_have_names():
    model = Detector(depth=2)
    groups = layer_decay_param_groups(model, 1.0, lr_decay=0.5, trunk_lr_factor=0.1)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == pytest.approx(
        {
            "layer_00": 0.0125,
            "layer_00_no_decay": 0.0125,
            "layer_01": 0.025,
            "layer_01_no_decay": 0.025,
            "layer_02": 0.05,
            "layer_02_no_decay": 0.05,
            "heads": 1.0,
            "heads_no_decay": 1.0,
        }
    )
    torch.optim.AdamW(groups, lr=1.0, weight_decay=0.1)  # takes the groups as they are


def test_frozen_parameters_are_left_out():
    model = Detector(freeze_blocks=1)
    names = by_parameter(model, layer_decay_param_groups(model, 0.1)).keys()
    assert not any(".blocks.0." in name or "patch_embed" in name for name in names)
    assert any(".blocks.1." in name for name in names)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"lr_decay must lie in \(0, 1\], got 1.5"):
        layer_decay_param_groups(Detector(), 0.1, lr_decay=1.5)
    with pytest.raises(ValueError, match="expected one ViT trunk in Linear, found 0"):
        layer_decay_param_groups(nn.Linear(2, 2), 0.1)
