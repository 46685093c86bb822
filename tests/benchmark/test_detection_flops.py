"""Counted FLOPs of detectors against sums by hand, part by part.

Legend: C channels of the backbone, P of the pyramid's levels; L patches of the image.
"""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from detectron2.config import instantiate

from crossmae_det.benchmark import Candidate, detection_cost
from crossmae_det.model_zoo import get_config
from crossmae_det.modeling import ViT

MASK_RCNN = "coco/mask_rcnn_crossmae_vit_b_100ep.py"
CASCADE = "coco/cascade_mask_rcnn_crossmae_vit_b_100ep.py"
# 96 x 96 pixels are 6 x 6 patches: windows of 4 x 4 pad them to 8 x 8. Nothing is projected for the
# padding, but it takes part in the attention.
GRID, WINDOW, L = 6, 4, 36
C, P, CONV, FC, PROPOSALS, DETECTIONS, CLASSES = 32, 16, 8, 24, 7, 5, 80
LEVELS = [(GRID * 4) ** 2, (GRID * 2) ** 2, GRID**2, (GRID // 2) ** 2, 2**2]


def candidate(name, *overrides):
    heads, predictors = "box_head", ["box_predictor"]
    if "cascade" in name:
        heads, predictors = "box_heads.0", [f"box_predictors.{stage}" for stage in range(3)]
    tiny = [
        *("dataloader.image_size=96", f"model.backbone.out_channels={P}"),
        *(f"model.backbone.net.embed_dim={C}", "model.backbone.net.depth=3"),
        *("model.backbone.net.num_heads=2", f"model.backbone.net.window_size={WINDOW}"),
        "model.backbone.net.global_blocks=[1]",
        f"model.proposal_generator.post_nms_topk=[11,{PROPOSALS}]",
        f"model.roi_heads.{heads}.conv_dims=[{CONV},{CONV}]",
        f"model.roi_heads.{heads}.fc_dims=[{FC}]",
        f"model.roi_heads.mask_head.conv_dims=[{CONV},{CONV},{CONV}]",
        *(f"model.roi_heads.{p}.test_topk_per_image={DETECTIONS}" for p in predictors),
    ]
    cfg = get_config(name, [*tiny, *overrides])
    return Candidate("tiny", partial(instantiate, cfg.model), torch.optim.AdamW, 96)


def linear(rows, inner, columns):
    return 2 * rows * inner * columns


def block(windows, side):
    """A block whose attention is within ``windows`` of ``side`` x ``side`` of the tokens."""
    maps = linear(L, C, 3 * C) + linear(L, C, C)
    inside = side**2
    scores = 2 * linear(inside, C, inside)
    relative_position = 2 * linear(inside, C, side)  # each query with a row, then with a column
    mlp = 2 * linear(L, C, 4 * C)
    return maps + windows * (scores + relative_position) + mlp


def doubling(pixels, channels):
    """A transposed convolution, 2 x 2 with stride 2, which halves the channels."""
    return linear(pixels, channels, 4 * channels // 2)


def pyramid():
    finest = doubling(L, C) + doubling(4 * L, C // 2) + linear(LEVELS[0], C // 4, P)
    finer = doubling(L, C) + linear(LEVELS[1], C // 2, P)
    same_and_coarser = linear(LEVELS[2] + LEVELS[3], C, P)
    return finest + finer + same_and_coarser + linear(sum(LEVELS[:4]), 9 * P, P)


def rpn():
    return sum(2 * linear(level, 9 * P, P) + linear(level, P, 3 + 12) for level in LEVELS)


def box_head(box_outputs):
    convolutions = linear(PROPOSALS * 49, 9 * P, CONV) + linear(PROPOSALS * 49, 9 * CONV, CONV)
    outputs = linear(PROPOSALS, FC, CLASSES + 1 + box_outputs)
    return convolutions + linear(PROPOSALS, 49 * CONV, FC) + outputs


def mask_head():
    inside = DETECTIONS * 14**2
    convolutions = linear(inside, 9 * P, CONV) + linear(inside, 9 * CONV, CONV)
    return convolutions + linear(inside, CONV, 4 * CONV) + linear(4 * inside, CONV, CLASSES)


@pytest.mark.parametrize(
    ("name", "box_heads"),
    # The boxes of a Mask R-CNN are per class, those of a cascade are not.
    [(MASK_RCNN, box_head(4 * CLASSES)), (CASCADE, 3 * box_head(4))],
)
def test_flops_are_those_by_hand(name, box_heads):
    cost = detection_cost(candidate(name))
    assert cost.flops == {
        "windowed_blocks": 2 * block(windows=4, side=WINDOW),
        "global_blocks": block(windows=1, side=GRID),
        "patch_embedding": linear(L, 3 * 16**2, C),
        "pyramid": pyramid(),
        "rpn": rpn(),
        "box_heads": box_heads,
        "mask_head": mask_head(),
    }
    assert cost.total_flops == sum(cost.flops.values())
    assert (cost.name, cost.image_size) == ("tiny", 96)
    assert (cost.proposals, cost.detections) == (PROPOSALS, DETECTIONS)


@pytest.mark.parametrize("name", [MASK_RCNN, CASCADE])
def test_every_parameter_is_counted_in_its_part(name):
    compared = candidate(name)
    parts = {
        "backbone.net": "backbone",
        "backbone": "pyramid",
        "proposal_generator": "rpn",
        "roi_heads.box": "box_heads",
        "roi_heads.mask": "mask_head",
    }
    expected = Counter()
    for key, value in compared.build_on_meta().named_parameters():
        part = next(part for prefix, part in parts.items() if key.startswith(prefix))
        expected[part] += value.numel()
    cost = detection_cost(compared)
    assert cost.parameters == expected
    assert cost.total_parameters == expected.total()


def test_without_masks_there_is_no_mask_head():
    cost = detection_cost(candidate(MASK_RCNN, "model.roi_heads.mask_in_features=null"))
    assert (cost.detections, cost.flops["mask_head"], cost.parameters["mask_head"]) == (0, 0, 0)


def test_other_models_and_images_are_refused():
    backbone = Candidate("backbone", lambda: ViT(32, 8, 8, 1, 1), torch.optim.AdamW, 32)
    with pytest.raises(
        ValueError, match="backbone: not a detector with a backbone, a pyramid and heads"
    ):
        detection_cost(backbone)
    with pytest.raises(ValueError, match=r"tiny: the image is not square: \(96, 64\)"):
        detection_cost(replace(candidate(MASK_RCNN), image_size=(96, 64)))
