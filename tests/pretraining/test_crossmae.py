"""What CrossMAE has and MAE has not: independent queries, inter-block attention, low cost."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from crossmae_det.modeling import SIZES, ViT
from crossmae_det.pretraining import MAE, CrossMAE
from crossmae_det.pretraining.masked_image_model import mask_patches


def tiny_model(**options):
    torch.manual_seed(0)
    encoder = ViT(64, 16, embed_dim=24, depth=4, num_heads=3)
    options = dict(decoder_dim=16, decoder_depth=3, decoder_num_heads=2) | options
    return CrossMAE(encoder, **options).eval()


@pytest.mark.parametrize("self_attention", [False, True])
def test_changing_one_query_leaves_the_other_predictions_bit_identical(self_attention):
    model = tiny_model(prediction_ratio=0.5, decoder_self_attention=self_attention)
    images, noise = torch.randn(1, 3, 64, 64), torch.rand(1, 16)
    before = model.predict(images, noise)
    patch = before.predicted[0, 3]
    model.decoder.pos_embed[0, 1 + patch] += 1
    after = model.predict(images, noise)
    others = [i for i in range(8) if i != 3]
    assert not torch.equal(after.pred[:, 3], before.pred[:, 3])
    assert torch.equal(after.pred[:, others], before.pred[:, others]) != self_attention


@pytest.mark.parametrize("self_attention", [False, True])
def test_predicting_one_other_patch_leaves_the_predictions_bit_identical(self_attention):
    model = tiny_model(prediction_ratio=0.5, decoder_self_attention=self_attention)
    images, noise = torch.randn(1, 3, 64, 64), torch.linspace(0, 1, 17)[None, :16]
    # Patches 0 to 3 are visible; of 4 to 15 the last eight are predicted.
    before = model.predict(images, noise)
    swapped = noise.clone()
    swapped[0, [7, 8]] = noise[0, [8, 7]]
    after = model.predict(images, swapped)
    assert before.predicted.tolist() == [[8, 9, 10, 11, 12, 13, 14, 15]]
    assert after.predicted.tolist() == [[7, 9, 10, 11, 12, 13, 14, 15]]
    assert not torch.equal(after.pred[:, 0], before.pred[:, 0])
    assert torch.equal(after.pred[:, 1:], before.pred[:, 1:]) != self_attention


@pytest.mark.parametrize("self_attention", [False, True])
def test_gradients_flow_between_predicted_patches_only_with_self_attention(self_attention):
    model = tiny_model(decoder_self_attention=self_attention)
    queries = []
    model.decoder.blocks[0].register_forward_pre_hook(lambda _, inputs: queries.append(inputs[0]))
    pred = model.predict(torch.randn(2, 3, 64, 64)).pred
    (gradient,) = torch.autograd.grad(pred[:, 1].sum(), queries)
    assert gradient[:, 1].any()
    assert gradient[:, [0, 2, 3]].any() == self_attention


def test_feature_weights_start_with_a_variance_of_one_over_their_number():
    torch.manual_seed(0)
    encoder = ViT(16, 8, embed_dim=8, depth=7, num_heads=1)
    model = CrossMAE(encoder, decoder_dim=4, decoder_depth=200, decoder_num_heads=1)
    weights = model.decoder.feature_weights
    assert weights.shape == (200, 8)
    assert weights.std().item() == pytest.approx(8**-0.5, rel=0.1)
    assert weights.mean().item() == pytest.approx(0, abs=0.05)


def test_queries_read_the_class_token():
    model = tiny_model()
    images, noise = torch.randn(1, 3, 64, 64), torch.rand(1, 16)
    features = [torch.randn(1, 5, 24) for _ in range(5)]
    masking = mask_patches(noise, 0.75, 0.25)
    before = model.decoder(features, masking, (4, 4))
    for feature in features:
        feature[:, 0] += 1
    assert not torch.equal(model.decoder(features, masking, (4, 4)), before)
    assert model.predict(images, noise).visible.shape == (1, 4)


@pytest.mark.parametrize("index", [4, -5])
def test_a_feature_block_that_does_not_exist(index):
    with pytest.raises(ValueError, match=f"feature block {index} "):
        tiny_model(feature_blocks=[0, index])


def test_no_feature_block():
    with pytest.raises(ValueError, match="feature_blocks is empty"):
        tiny_model(feature_blocks=[])


def test_blocks_that_the_decoder_does_not_read_are_logged(caplog):
    tiny_model(feature_blocks=[-1])
    assert not caplog.records
    tiny_model(feature_blocks=[1])
    (record,) = caplog.records
    assert record.args == (1, 2)  # the last block that is read, and how many are not


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        (dict(feature_blocks=[0, 1]), [2, 3]),
        (dict(feature_blocks=[-4], use_input_feature=False), [1, 2, 3]),
        (dict(feature_blocks=[0, 3]), []),
        (dict(), []),
    ],
)
def test_blocks_that_the_decoder_does_not_read_are_frozen(options, frozen, tmp_path):
    model = tiny_model(**options)
    everything = tiny_model().state_dict()
    assert model.state_dict().keys() == everything.keys()  # a checkpoint is whole
    still = {name for name, p in model.encoder.blocks.named_parameters() if not p.requires_grad}
    assert {int(name.partition(".")[0]) for name in still} == set(frozen)

    # DistributedDataParallel stops at its second iteration where a gradient is missing.
    images = torch.randn(2, 3, 64, 64)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        parallel = DistributedDataParallel(model)
        for _ in range(2):
            parallel(images)["loss_reconstruction"].backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def decoder_flops(kind, size, **options):
    """Of a decoder, for one image of 224 x 224; a multiplication and an addition are two."""
    size = SIZES[size]
    with torch.device("meta"):
        encoder = ViT(224, size.patch_size, size.embed_dim, size.depth, size.num_heads)
        decoder = kind(encoder, **options).decoder
        features = [torch.randn(1, 50, size.embed_dim) for _ in range(size.depth + 1)]
        prediction_ratio = options.get("prediction_ratio", 0.75)
        masking = mask_patches(torch.rand(1, 196), 0.75, prediction_ratio)
        with FlopCounterMode(display=False) as counter:
            decoder(features, masking, (14, 14))
    return counter.get_total_flops()


def test_decoder_cost_of_vit_base():
    mae = decoder_flops(MAE, "base")
    crossmae = decoder_flops(CrossMAE, "base", prediction_ratio=0.25)
    # Per block of width D: 12 D^2 for each token and 2 D for each pair; then the maps in and out.
    tokens, dim = 197, 512
    block = 12 * dim**2 * tokens + 2 * dim * tokens**2
    assert mae == 2 * (8 * block + 50 * 768 * dim + 147 * dim * 768)
    # The paper: 2.5 times less, 4.1 GFLOPs.
    assert crossmae == pytest.approx(4.1e9, rel=0.05)
    assert mae / crossmae == pytest.approx(2.5, rel=0.05)
