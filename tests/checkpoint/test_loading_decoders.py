"""Loading into pretraining models: decoders are loaded whole, or not at all."""

import pytest
import torch
from checkpoint_models import SIZES, autoencoder, equal, save, values

from crossmae_det.checkpoint import load, to_published
from crossmae_det.modeling import ViT
from crossmae_det.pretraining import MAE, CrossMAE


def test_pretraining_continues_at_another_size(tmp_path):
    source, target = autoencoder(), autoencoder(img_size=(48, 64))
    report = load(target, save(tmp_path, source.state_dict()))
    assert sorted(report.resampled) == ["decoder.pos_embed", "encoder.pos_embed"]
    assert not report.initialized and not report.dropped
    # Both mean the same places still: the decoder's table is what it would resample to by itself.
    expected = source.decoder.positions((6, 8))
    torch.testing.assert_close(target.decoder.pos_embed, expected)


@pytest.mark.parametrize("format", ["crossmae", "mae"])
def test_a_published_file_of_a_whole_model_loads_as_it_is(tmp_path, format):
    def build():
        return autoencoder() if format == "crossmae" else MAE(ViT(**SIZES), decoder_depth=1)

    source, target = build(), build()
    path = save(tmp_path, to_published(source.state_dict(), format))
    report = load(target, path, whole=True)
    assert equal(values(source), values(target))
    assert sorted(report.loaded) == sorted(source.state_dict())


def test_a_file_without_a_decoder_is_refused_by_name(tmp_path):
    model = autoencoder()
    before = values(model)
    backbone = {f"encoder.{name}": tensor for name, tensor in model.encoder.state_dict().items()}
    for state in (backbone, model.encoder.state_dict()):
        path = save(tmp_path, state)
        with pytest.raises(ValueError, match="weights.pth .*nothing for 'decoder.*; take the"):
            load(model, path, whole=True)
    assert equal(values(model), before)


def test_the_decoder_of_the_other_method_is_dropped(tmp_path):
    source, target = MAE(ViT(**SIZES), decoder_dim=8, decoder_num_heads=2), autoencoder()
    before = values(target)
    report = load(target, save(tmp_path, source.state_dict()))
    assert sorted(report.loaded) == sorted(n for n in before if n.startswith("encoder."))
    assert sorted(report.initialized) == sorted(n for n in before if n.startswith("decoder."))
    assert sorted(report.dropped) == sorted(
        n for n in source.state_dict() if n.startswith("decoder.")
    )


def test_a_decoder_of_another_width_is_left_out_by_name(tmp_path):
    source = CrossMAE(ViT(**SIZES), decoder_dim=16, decoder_depth=2, decoder_num_heads=2)
    path, target = save(tmp_path, source.state_dict()), autoencoder()
    with pytest.raises(ValueError, match="--allow-missing 'decoder.*' --allow-unexpected 'decoder"):
        load(target, path)
    report = load(target, path, allow_missing=["decoder.*"], allow_unexpected=["decoder.*"])
    assert {f"encoder.{name}" for name in source.encoder.state_dict()} < set(report.loaded)
    assert "decoder.mask_token" in report.unexpected and "decoder.mask_token" in report.initialized


@pytest.mark.parametrize("method", [CrossMAE, MAE])
def test_an_encoder_with_its_norm_starts_pretraining(tmp_path, method):
    """As MAE's encoder files are, and timm's ViTs."""
    source = MAE(ViT(**SIZES), decoder_dim=8, decoder_depth=1, decoder_num_heads=2)
    torch.nn.init.normal_(source.decoder.encoder_norm.weight)
    state = to_published(source.state_dict(), "mae")
    state = {k: v for k, v in state.items() if "decoder" not in k and k != "mask_token"}
    model = method(ViT(**SIZES), decoder_dim=8, decoder_depth=1, decoder_num_heads=2)
    report = load(model, save(tmp_path, state))
    backbone = {name for name in model.state_dict() if name.startswith("encoder.")}
    norm = {f"decoder.encoder_norm.{last}" for last in ("weight", "bias")}
    assert set(report.loaded) == (backbone | norm if method is MAE else backbone)
    assert report.dropped == ([] if method is MAE else ["norm.weight", "norm.bias"])
    assert report.initialized


def test_half_a_decoder_is_refused(tmp_path):
    model = autoencoder()
    for format, name in (
        ("native", "decoder.blocks.1.norm1.bias"),
        ("crossmae", "dec_norms.1.bias"),
    ):
        state = dict(model.state_dict())
        if format != "native":
            state = to_published(state, format)
        del state[name]
        with pytest.raises(ValueError, match="the file has nothing for 'decoder"):
            load(autoencoder(), save(tmp_path, state))
