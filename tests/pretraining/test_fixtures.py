"""Agreement with the published implementations, on tensors that they have written."""

import pytest
import torch

from crossmae_det.checkpoint import load, to_native, to_published
from crossmae_det.modeling import ViT
from crossmae_det.pretraining import MAE, CrossMAE

TOLERANCE = dict(rtol=0, atol=1e-5)
DECODER_OPTIONS = ("decoder_dim", "decoder_depth", "decoder_num_heads", "mask_ratio")
CROSSMAE_OPTIONS = (
    "prediction_ratio",
    "feature_blocks",
    "use_input_feature",
    "decoder_self_attention",
)
POSITION_TABLES = ("encoder.pos_embed", "decoder.pos_embed")


@pytest.fixture(params=["crossmae_tiny", "crossmae_self_attention", "mae_tiny"])
def published(request, fixtures):
    """(format, reference tensors, a model with their weights, its initial position tables)."""
    reference = torch.load(fixtures / f"{request.param}.pt", weights_only=True)
    config = reference["config"]
    sizes = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    encoder = ViT(*(config[name] for name in sizes))
    format = request.param.partition("_")[0]
    kind, names = (CrossMAE, CROSSMAE_OPTIONS) if format == "crossmae" else (MAE, ())
    options = {name: config[name] for name in (*DECODER_OPTIONS, "norm_pix_loss", *names)}
    model = kind(encoder, **options)
    tables = {name: model.state_dict()[name].clone() for name in POSITION_TABLES}
    model.load_state_dict(to_native(reference["state_dict"]))
    return format, reference, model, tables


def test_predictions_targets_and_masking_agree(published):
    name, reference, model, _ = published
    result = model.predict(reference["images"], reference["noise"])
    mask = torch.zeros_like(reference["noise"]).scatter(1, result.predicted, 1)
    assert torch.equal(mask, reference["predicted_mask" if name == "crossmae" else "mask"])
    if name == "crossmae":
        torch.testing.assert_close(result.pred, reference["pred"], **TOLERANCE)
        torch.testing.assert_close(result.target, reference["target"], **TOLERANCE)
    else:
        # MAE's file also has the predictions of visible patches, which the loss ignores.
        pred = reference["pred"].take_along_dim(result.predicted[..., None], dim=1)
        torch.testing.assert_close(result.pred, pred, **TOLERANCE)


@pytest.mark.parametrize("published", ["crossmae_tiny"], indirect=True)
def test_the_published_training_checkpoint_gives_the_same_features(published, fixtures):
    _, reference, model, _ = published
    before = model.encoder.forward_tokens(reference["images"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load(model, fixtures / "crossmae_tiny_training_checkpoint.pth", whole=True)
    after = model.encoder.forward_tokens(reference["images"])
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    result = model.predict(reference["images"], reference["noise"])
    torch.testing.assert_close(result.pred, reference["pred"], **TOLERANCE)


def test_loss_and_every_gradient_agree(published):
    name, reference, model, _ = published
    loss = model(reference["images"], reference["noise"])["loss_reconstruction"]
    torch.testing.assert_close(loss, reference["loss"], **TOLERANCE)
    loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    gradients = to_published(gradients, format=name)
    assert set(gradients) == set(reference["grads"])
    for key, expected in reference["grads"].items():
        torch.testing.assert_close(gradients[key], expected, **TOLERANCE)


def test_position_tables_are_the_published_ones(published):
    _, _, model, tables = published
    for name, table in tables.items():
        torch.testing.assert_close(table, model.state_dict()[name], rtol=0, atol=1e-6)
