from functools import partial

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from crossmae_det.detection import SimpleFeaturePyramid, layer_decay_param_groups, vit_backbone
from crossmae_det.engine.train import build_optimizer
from crossmae_det.model_zoo import get_config


class Detector(nn.Module):
    def __init__(self, depth=3, **overrides):
        super().__init__()
        backbone = vit_backbone(
            "tiny", embed_dim=12, depth=depth, img_size=32, use_rel_pos=True, **overrides
        )
        self.backbone = SimpleFeaturePyramid(backbone, "last_feat", 4, (1.0, 0.5))
        self.head = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))


def by_parameter(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in groups for p in group["params"]}


def test_rates_match_vitdet_for_every_parameter():
    model = Detector()
    groups = by_parameter(model, layer_decay_param_groups(model, 0.1, lr_decay=0.5))
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, group in groups.items():
        expected = 0.1 * get_vit_lr_decay_rate(name, lr_decay_rate=0.5, num_layers=3)
        assert group["lr"] == pytest.approx(expected), name


def test_backbone_lr_factor_and_group_names():
    model = Detector(depth=2)
    groups = layer_decay_param_groups(model, 1.0, lr_decay=0.5, backbone_lr_factor=0.1)
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


def test_the_model_may_be_a_vit():
    model = vit_backbone("tiny", embed_dim=12, depth=3, img_size=32)
    groups = by_parameter(model, layer_decay_param_groups(model, 0.1, lr_decay=0.5))
    assert groups.keys() == dict(model.named_parameters()).keys()
    assert groups["pos_embed"]["lr"] == groups["patch_embed.proj.weight"]["lr"] == 0.1 * 0.5**4
    assert groups["pos_embed"]["weight_decay"] == 0
    assert groups["blocks.2.mlp.fc1.weight"]["lr"] == 0.1 * 0.5


def test_bad_arguments_are_rejected():
    with pytest.raises(ValueError, match="lr_decay .* 1.5"):
        layer_decay_param_groups(Detector(), 0.1, lr_decay=1.5)
    with pytest.raises(ValueError, match="ViT .*Linear"):
        layer_decay_param_groups(nn.Linear(2, 2), 0.1)


# ViTDet's configs (detectron2, projects/ViTDet/configs/COCO): depth, learning-rate decay, and their
# arguments of detectron2's `get_default_optimizer_params`.
B_AND_L = {"weight_decay_norm": 0.0, "overrides": {"pos_embed": {"weight_decay": 0.0}}}
PUBLISHED = {
    "b_100ep": (12, 0.7, B_AND_L),
    "l_100ep": (24, 0.8, B_AND_L),
    "h_75ep": (32, 0.9, {"weight_decay_norm": None, "overrides": {}}),
}


def detectron2_model(depth, cascade):
    """detectron2's ViTDet, but narrow: names and types of modules depend on the depth alone."""
    model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    model.backbone.net.update(embed_dim=16, depth=depth, num_heads=2, window_block_indexes=[0])
    if cascade:
        model.roi_heads = model_zoo.get_config("common/models/cascade_rcnn.py").model.roi_heads
        model.roi_heads.mask_head.conv_norm = "LN"
    box_heads = model.roi_heads.box_heads if cascade else [model.roi_heads.box_head]
    predictors = model.roi_heads.box_predictors if cascade else [model.roi_heads.box_predictor]
    for box_head, predictor in zip(box_heads, predictors, strict=True):
        box_head.update(conv_dims=[8, 8, 8, 8], fc_dims=[16], conv_norm="LN")
        predictor.input_shape.channels = 16
    return instantiate(model)


def rates_by_name(model, optimizer):
    """Learning rate and weight decay of every parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize("kind", ["mask_rcnn", "cascade_mask_rcnn"])
@pytest.mark.parametrize("size", PUBLISHED)
def test_every_parameter_has_the_published_rate_and_decay(kind, size):
    depth, lr_decay, arguments = PUBLISHED[size]
    reference = detectron2_model(depth, kind.startswith("cascade"))
    groups = get_default_optimizer_params(
        reference,
        base_lr=1e-4,
        lr_factor_func=partial(get_vit_lr_decay_rate, num_layers=depth, lr_decay_rate=lr_decay),
        **arguments,
    )
    published = rates_by_name(reference, torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.1))

    cfg = get_config(f"coco/{kind}_crossmae_vit_{size}.py")
    with torch.device("meta"):
        model = instantiate(cfg.model)
    rates = rates_by_name(model, build_optimizer(cfg.optimizer, model))
    assert rates.keys() == published.keys() == dict(model.named_parameters()).keys()
    for name, expected in published.items():
        assert rates[name] == pytest.approx(expected, rel=1e-9), name
    decays = {name: decay for name, (_, decay) in rates.items()}
    assert decays["backbone.simfp_4.0.norm.weight"] == 0.1
    assert decays["backbone.net.blocks.0.norm1.weight"] == (0.1 if size == "h_75ep" else 0)


def test_weight_decay_of_norms_and_positions_is_configurable():
    cfg = get_config(
        "coco/mask_rcnn_crossmae_vit_b_100ep.py",
        [
            "optimizer.params.weight_decay_norm=0.02",
            "optimizer.params.weight_decay_channel_norm=0",
            "optimizer.params.weight_decay_pos_embed=null",
        ],
    )
    with torch.device("meta"):
        model = instantiate(cfg.model)
    optimizer = build_optimizer(cfg.optimizer, model)
    decays = {name: decay for name, (_, decay) in rates_by_name(model, optimizer).items()}
    assert decays["backbone.net.blocks.3.norm2.bias"] == 0.02
    assert decays["backbone.simfp_4.0.norm.weight"] == 0
    assert decays["roi_heads.box_head.conv1.norm.bias"] == 0
    assert decays["backbone.net.pos_embed"] == 0.1
    assert {group["name"] for group in optimizer.param_groups} >= {
        *("layer_00", "layer_04", "layer_04_decay_0.02", "heads", "heads_no_decay")
    }
    yaml = get_config(
        "coco/mask_rcnn_crossmae_vit_b_100ep.yaml", ["SOLVER.WEIGHT_DECAY_NORM", "None"]
    )
    assert yaml.optimizer.params.weight_decay_norm is None
