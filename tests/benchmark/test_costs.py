"""Counted FLOPs and parameters against sums by hand, term by term.

Legend of pretraining: L patches of F values, T = 1 + L_visible tokens of C channels in the encoder;
in the decoder D channels, Q predicted patches, K features that are read.
Legend of detection: L patches of C channels, P channels of the pyramid's levels.
"""

from collections import Counter

import pytest
import torch
from detectron2.config import instantiate
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crossmae_det.benchmark.costs import (
    ModelSpec,
    detection_cost,
    pretraining_cost,
    pretraining_section,
    step_flops,
)
from crossmae_det.engine.trainer import total_loss
from crossmae_det.model_zoo import get_config
from crossmae_det.modeling import ViT
from crossmae_det.pretraining import MAE, CrossMAE

# 32 x 64 pixels in patches of 8: 32 patches, of which 8 are visible.
L, VISIBLE, F, C, DEPTH = 32, 8, 8 * 8 * 3, 24, 4
T = 1 + VISIBLE
D, DECODER_DEPTH = 16, 3


def pretraining_spec(kind, embed_dim=C, **options):
    def build():
        torch.manual_seed(0)
        encoder = ViT((32, 64), 8, embed_dim=embed_dim, depth=DEPTH, num_heads=3)
        return kind(
            encoder,
            decoder_dim=D,
            decoder_depth=DECODER_DEPTH,
            decoder_num_heads=2,
            **options,
        )

    return ModelSpec(kind.__name__, build, torch.optim.AdamW, (32, 64))


def linear(rows, inner, columns):
    return 2 * rows * inner * columns


def attention(queries, keys, channels):
    """Scores and weighted sum; the number of heads does not matter."""
    return 2 * linear(queries, channels, keys)


def mlp(tokens, channels):
    return 2 * linear(tokens, channels, 4 * channels)


def self_attention_block(tokens, channels):
    maps = linear(tokens, channels, 3 * channels) + linear(tokens, channels, channels)
    return maps + attention(tokens, tokens, channels) + mlp(tokens, channels)


PATCH_EMBEDDING = linear(VISIBLE, F, C)
ENCODER = PATCH_EMBEDDING + DEPTH * self_attention_block(T, C)


def mae_decoder():
    blocks = DECODER_DEPTH * self_attention_block(1 + L, D)
    return linear(T, C, D) + blocks + linear(L - VISIBLE, D, F)


def crossmae_decoder(predicted, features):
    maps = 2 * linear(predicted, D, D) + linear(T, C, 2 * D)  # queries, output; keys and values
    block = maps + attention(predicted, T, D) + mlp(predicted, D)
    inter_block = linear(DECODER_DEPTH, features, T * C)
    return inter_block + DECODER_DEPTH * block + linear(predicted, D, F)


CASES = [
    pytest.param(MAE, {}, mae_decoder(), id="mae"),
    pytest.param(CrossMAE, {}, crossmae_decoder(8, DEPTH + 1), id="crossmae"),
    pytest.param(
        CrossMAE, {"prediction_ratio": 0.75}, crossmae_decoder(24, DEPTH + 1), id="all masked"
    ),
    pytest.param(
        CrossMAE,
        {"feature_blocks": [0, -1], "use_input_feature": False},
        crossmae_decoder(8, 2),
        id="two features",
    ),
]


@pytest.mark.parametrize("kind, options, decoder", CASES)
def test_forward_flops_of_pretraining_match_the_manual_sum(kind, options, decoder):
    cost = pretraining_cost(pretraining_spec(kind, **options))
    assert (cost.encoder_flops, cost.decoder_flops) == (ENCODER, decoder)
    assert cost.total_flops == ENCODER + decoder
    assert (cost.method, cost.image_size) == (kind.__name__, (32, 64))
    assert cost.decoder_depth == DECODER_DEPTH
    assert cost.prediction_ratio == (0.75 if kind is MAE else options.get("prediction_ratio", 0.25))


@pytest.mark.parametrize("kind, options, decoder", CASES)
def test_a_step_is_three_forward_passes_less_the_gradient_of_the_images(kind, options, decoder):
    forward = ENCODER + decoder
    assert step_flops(pretraining_spec(kind, **options), 5) == 5 * (3 * forward - PATCH_EMBEDDING)


@pytest.mark.parametrize("kind", [MAE, CrossMAE])
def test_step_flops_match_those_counted_on_the_cpu(kind):
    spec = pretraining_spec(kind)
    model = spec.build()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        total_loss(model(spec.images(3, "cpu"))).backward()
    assert counter.get_total_flops() == step_flops(spec, 3)


@pytest.mark.parametrize("kind", [MAE, CrossMAE])
def test_parameters_of_encoder_and_decoder(kind):
    counted = {"encoder": 0, "decoder": 0}
    for name, parameter in pretraining_spec(kind).build().named_parameters():
        counted[name.split(".")[0]] += parameter.numel()
    cost = pretraining_cost(pretraining_spec(kind))
    assert (cost.encoder_parameters, cost.decoder_parameters) == tuple(counted.values())


def test_parameters_of_the_decoders():
    norm = 2 * D
    block = 2 * norm + 12 * D**2 + 9 * D
    ends = D + norm + (D + 1) * F  # mask token, last norm, map to pixels
    mae = ends + 2 * C + (C + 1) * D + DECODER_DEPTH * block
    assert pretraining_cost(pretraining_spec(MAE)).decoder_parameters == mae
    memory = DEPTH + 1 + 2 * C + (C + 1) * 2 * D - (D + 1) * 2 * D  # weights, norm, keys and values
    crossmae = ends + DECODER_DEPTH * (block + memory)
    assert pretraining_cost(pretraining_spec(CrossMAE)).decoder_parameters == crossmae


def test_ratios_refer_to_the_mae_of_the_same_size():
    specs = [
        pretraining_spec(CrossMAE),
        pretraining_spec(MAE),
        pretraining_spec(CrossMAE, embed_dim=48),
        pretraining_spec(MAE),
    ]
    costs = [pretraining_cost(spec) for spec in specs]
    section = pretraining_section(
        [(spec.name, cost) for spec, cost in zip(specs, costs, strict=True)]
    )
    crossmae, mae, alone, _ = section.values
    assert crossmae["ratio_to_MAE"] == {
        "decoder_parameters": costs[0].decoder_parameters / costs[1].decoder_parameters,
        "decoder_flops": crossmae_decoder(8, DEPTH + 1) / mae_decoder(),
        "total_flops": (ENCODER + crossmae_decoder(8, DEPTH + 1)) / (ENCODER + mae_decoder()),
    }
    assert set(mae["ratio_to_MAE"].values()) == {1}
    assert alone["ratio_to_MAE"] == {}
    assert section.rows[1][4::2] == ["1.00"] * 3
    assert section.rows[2][4::2] == ["-"] * 3


def test_a_model_without_a_decoder_is_rejected():
    with pytest.raises(ValueError, match="backbone: not a pretraining model; it has no decoder"):
        pretraining_cost(ModelSpec("backbone", lambda: ViT(32, 8, 8, 1, 1), torch.optim.AdamW, 32))


MASK_RCNN = "coco/mask_rcnn_crossmae_vit_b_100ep.py"
CASCADE = "coco/cascade_mask_rcnn_crossmae_vit_b_100ep.py"
# 96 x 96 pixels are 6 x 6 patches: windows of 4 x 4 pad them to 8 x 8. Nothing is projected for the
# padding, but it takes part in the attention.
GRID, WINDOW = 6, 4
WIDTH, P, CONV, FC, PROPOSALS, DETECTIONS, CLASSES = 32, 16, 8, 24, 7, 5, 80
LEVELS = [(GRID * 4) ** 2, (GRID * 2) ** 2, GRID**2, (GRID // 2) ** 2, 2**2]


def detector(name, *overrides):
    """A tiny detector on the meta device."""
    heads, predictors = "box_head", ["box_predictor"]
    if "cascade" in name:
        heads, predictors = "box_heads.0", [f"box_predictors.{stage}" for stage in range(3)]
    tiny = [
        *("dataloader.image_size=96", f"model.backbone.out_channels={P}"),
        *(f"model.backbone.net.embed_dim={WIDTH}", "model.backbone.net.depth=3"),
        *("model.backbone.net.num_heads=2", f"model.backbone.net.window_size={WINDOW}"),
        "model.backbone.net.global_blocks=[1]",
        f"model.proposal_generator.post_nms_topk=[11,{PROPOSALS}]",
        f"model.roi_heads.{heads}.conv_dims=[{CONV},{CONV}]",
        f"model.roi_heads.{heads}.fc_dims=[{FC}]",
        f"model.roi_heads.mask_head.conv_dims=[{CONV},{CONV},{CONV}]",
        *(f"model.roi_heads.{p}.test_topk_per_image={DETECTIONS}" for p in predictors),
    ]
    cfg = get_config(name, [*tiny, *overrides])
    with torch.device("meta"):
        return instantiate(cfg.model)


def vitdet_block(windows, side):
    """A block whose attention is within ``windows`` of ``side`` x ``side`` of the tokens."""
    maps = linear(GRID**2, WIDTH, 3 * WIDTH) + linear(GRID**2, WIDTH, WIDTH)
    inside = side**2
    scores = 2 * linear(inside, WIDTH, inside)
    relative_position = 2 * linear(inside, WIDTH, side)  # each query with a row, then with a column
    mlp = 2 * linear(GRID**2, WIDTH, 4 * WIDTH)
    return maps + windows * (scores + relative_position) + mlp


def doubling(pixels, channels):
    """A transposed convolution, 2 x 2 with stride 2, which halves the channels."""
    return linear(pixels, channels, 4 * channels // 2)


def pyramid():
    finest = (
        doubling(GRID**2, WIDTH)
        + doubling(4 * GRID**2, WIDTH // 2)
        + linear(LEVELS[0], WIDTH // 4, P)
    )
    finer = doubling(GRID**2, WIDTH) + linear(LEVELS[1], WIDTH // 2, P)
    same_and_coarser = linear(LEVELS[2] + LEVELS[3], WIDTH, P)
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
    # Mask R-CNN predicts boxes per class, a cascade does not.
    [(MASK_RCNN, box_head(4 * CLASSES)), (CASCADE, 3 * box_head(4))],
)
def test_flops_of_detectors_match_the_manual_sums(name, box_heads):
    cost = detection_cost("tiny", detector(name), 96)
    assert cost.flops == {
        "windowed_blocks": 2 * vitdet_block(windows=4, side=WINDOW),
        "global_blocks": vitdet_block(windows=1, side=GRID),
        "patch_embedding": linear(GRID**2, 3 * 16**2, WIDTH),
        "pyramid": pyramid(),
        "rpn": rpn(),
        "box_heads": box_heads,
        "mask_head": mask_head(),
    }
    assert (cost.image_size, cost.proposals, cost.detections) == (96, PROPOSALS, DETECTIONS)


@pytest.mark.parametrize("name", [MASK_RCNN, CASCADE])
def test_every_parameter_is_counted_in_its_part(name):
    model = detector(name)
    parts = {
        "backbone.net": "backbone",
        "backbone": "pyramid",
        "proposal_generator": "rpn",
        "roi_heads.box": "box_heads",
        "roi_heads.mask": "mask_head",
    }
    expected = Counter()
    for key, value in model.named_parameters():
        part = next(part for prefix, part in parts.items() if key.startswith(prefix))
        expected[part] += value.numel()
    assert detection_cost("tiny", model, 96).parameters == expected


def test_without_masks_there_is_no_mask_head():
    cost = detection_cost("tiny", detector(MASK_RCNN, "model.roi_heads.mask_in_features=null"), 96)
    assert (cost.detections, cost.flops["mask_head"], cost.parameters["mask_head"]) == (0, 0, 0)


def test_other_models_and_images_are_rejected():
    with pytest.raises(ValueError, match="backbone: not a detector"):
        detection_cost("backbone", ViT(32, 8, 8, 1, 1), 32)
    with pytest.raises(ValueError, match=r"tiny: .* not square: \(96, 64\)"):
        detection_cost("tiny", detector(MASK_RCNN), (96, 64))
