"""Counted FLOPs against sums by hand, term by term.

Legend: L patches of F values, T = 1 + L_visible tokens of C channels in the backbone; in the
decoder D channels, Q predicted patches, K features that are read.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crossmae_det.benchmark import Candidate, pretraining_cost, pretraining_section, step_flops
from crossmae_det.benchmark.costs import total_loss
from crossmae_det.modeling import ViT
from crossmae_det.pretraining import MAE, CrossMAE

# 32 x 64 pixels in patches of 8: 32 patches, of which 8 are visible.
L, VISIBLE, F, C, DEPTH = 32, 8, 8 * 8 * 3, 24, 4
T = 1 + VISIBLE
D, DECODER_DEPTH = 16, 3


def candidate(kind, embed_dim=C, **options):
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

    return Candidate(kind.__name__, build, torch.optim.AdamW, (32, 64))


def linear(rows, inner, columns):
    return 2 * rows * inner * columns


def attention(queries, keys, channels):
    """Scores, and the sum that they weigh; however many heads share the channels."""
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
def test_forward_flops_are_those_by_hand(kind, options, decoder):
    cost = pretraining_cost(candidate(kind, **options))
    assert (cost.encoder_flops, cost.decoder_flops) == (ENCODER, decoder)
    assert cost.total_flops == ENCODER + decoder
    assert (cost.name, cost.method) == (kind.__name__, kind.__name__)
    assert cost.decoder_depth == DECODER_DEPTH
    assert cost.prediction_ratio == (0.75 if kind is MAE else options.get("prediction_ratio", 0.25))


@pytest.mark.parametrize("kind, options, decoder", CASES)
def test_a_step_is_three_forward_passes_but_for_the_gradient_of_the_images(kind, options, decoder):
    forward = ENCODER + decoder
    assert step_flops(candidate(kind, **options), 5) == 5 * (3 * forward - PATCH_EMBEDDING)


@pytest.mark.parametrize("kind", [MAE, CrossMAE])
def test_a_step_on_the_cpu_with_attention_in_its_parts_does_as_many(kind):
    compared = candidate(kind)
    model = compared.build()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        total_loss(model(compared.images(3, "cpu"))).backward()
    assert counter.get_total_flops() == step_flops(compared, 3)


@pytest.mark.parametrize("kind", [MAE, CrossMAE])
def test_parameters_are_divided_into_encoder_and_decoder(kind):
    counted = {"encoder": 0, "decoder": 0}
    for name, parameter in candidate(kind).build().named_parameters():
        counted[name.split(".")[0]] += parameter.numel()
    cost = pretraining_cost(candidate(kind))
    assert (cost.encoder_parameters, cost.decoder_parameters) == tuple(counted.values())


def test_parameters_of_the_decoders():
    norm = 2 * D
    block = 2 * norm + 12 * D**2 + 9 * D
    ends = D + norm + (D + 1) * F  # mask token, last norm, map to pixels
    mae = ends + 2 * C + (C + 1) * D + DECODER_DEPTH * block
    assert pretraining_cost(candidate(MAE)).decoder_parameters == mae
    memory = DEPTH + 1 + 2 * C + (C + 1) * 2 * D - (D + 1) * 2 * D  # weights, norm, keys and values
    crossmae = ends + DECODER_DEPTH * (block + memory)
    assert pretraining_cost(candidate(CrossMAE)).decoder_parameters == crossmae


def test_ratios_are_to_the_mae_of_the_same_size():
    compared = [
        candidate(CrossMAE),
        candidate(MAE),
        candidate(CrossMAE, embed_dim=48),
        candidate(MAE),
    ]
    costs = [pretraining_cost(each) for each in compared]
    section = pretraining_section(costs)
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
    assert any("2 FLOPs for each multiply-add" in note for note in section.notes)


def test_a_model_without_a_decoder_is_refused():
    with pytest.raises(ValueError, match="backbone: not a pretraining model; it has no decoder"):
        pretraining_cost(Candidate("backbone", lambda: ViT(32, 8, 8, 1, 1), torch.optim.AdamW, 32))
