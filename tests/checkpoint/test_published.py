import argparse

import pytest
import torch

from crossmae_det.checkpoint import to_native, to_published
from crossmae_det.modeling import ViT
from crossmae_det.pretraining import MAE, CrossMAE

KINDS = {"crossmae": CrossMAE, "mae": MAE}


def tiny_state(kind, **options):
    encoder = ViT(16, 8, embed_dim=8, depth=2, num_heads=2)
    options = dict(decoder_dim=8, decoder_depth=2, decoder_num_heads=2) | options
    return KINDS[kind](encoder, **options).state_dict()


def fixture(repo, name):
    path = repo.parent / "shared" / "fixtures" / name
    if not path.is_file():
        pytest.skip(f"the published files' copies are not here: {path} is missing")
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def assert_identical(got, want):
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert got[name] is tensor


@pytest.mark.parametrize("kind", KINDS)
def test_our_models_survive_the_round_trip(kind):
    state = tiny_state(kind)
    published = to_published(state, format=kind)
    assert not any(name.startswith(("encoder.", "decoder.")) for name in published)
    assert_identical(to_native(published), state)


def test_the_ablation_survives_the_round_trip():
    state = tiny_state("crossmae", decoder_self_attention=True)
    assert "decoder.blocks.0.self_attn.qkv.weight" in state
    assert_identical(to_native(to_published(state, format="crossmae")), state)


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_alone_survives_the_round_trip(kind):
    state = {k: v for k, v in tiny_state(kind).items() if k.startswith("encoder.")}
    published = to_published(state, format=kind)
    assert {"cls_token", "pos_embed", "patch_embed.proj.bias"} < set(published)
    assert_identical(to_native(published), state)


@pytest.mark.parametrize("kind", KINDS)
def test_published_files_survive_the_round_trip(kind, repo):
    published = fixture(repo, f"{kind}_tiny.pt")["state_dict"]
    assert_identical(to_published(to_native(published), format=kind), published)


def test_a_published_training_checkpoint_loads(repo):
    checkpoint = fixture(repo, "crossmae_tiny_training_checkpoint.pth")
    encoder = ViT(64, 16, embed_dim=48, depth=3, num_heads=3)
    depth = checkpoint["args"].decoder_depth
    model = CrossMAE(encoder, decoder_dim=32, decoder_depth=depth, decoder_num_heads=4)
    model.load_state_dict(to_native(checkpoint["model"]))
    loaded = model.state_dict()
    assert torch.equal(loaded["decoder.feature_weights"], checkpoint["model"]["wfm.linear.weight"])
    with pytest.raises(ValueError, match="no patch embedding"):
        to_native(checkpoint)


def test_the_mae_encoder_file_keeps_its_final_norm():
    published = to_published(tiny_state("mae"), format="mae")
    encoder = {k: v for k, v in published.items() if "decoder" not in k and k != "mask_token"}
    native = to_native(encoder)
    assert native["decoder.encoder_norm.weight"] is published["norm.weight"]
    assert_identical(to_published(native, format="mae"), encoder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_without_a_place_is_named(kind):
    published = to_published(tiny_state(kind), format=kind) | {"head.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="place for 'head.weight'$"):
        to_native(published)


@pytest.mark.parametrize("state", [{}, {"encoder.cls_token": torch.zeros(1, 1, 8)}])
def test_other_layouts_are_refused_in_one_line(state):
    with pytest.raises(ValueError, match="^no published crossmae or mae checkpoint") as error:
        to_native(state)
    assert "\n" not in str(error.value)


def test_a_mixture_of_both_formats_is_refused():
    mixture = {
        **to_published(tiny_state("crossmae"), format="crossmae"),
        **to_published(tiny_state("mae"), format="mae"),
    }
    with pytest.raises(ValueError, match="neither has a place for '(norm|decoder_embed|dec_|wfm)"):
        to_native(mixture)


def test_an_unknown_format():
    with pytest.raises(ValueError, match="no checkpoint format 'timm'; take crossmae or mae"):
        to_published({}, format="timm")


def test_a_format_of_another_model():
    with pytest.raises(ValueError, match="format mae has no place for 'decoder.feature_weights'"):
        to_published(tiny_state("crossmae"), format="mae")
