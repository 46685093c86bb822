"""Round trips between layouts are exact, and models of other libraries give the same features."""

import argparse
import re

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.vit import ViT as DetectronViT
from timm.models.vision_transformer import VisionTransformer

from crossmae_det.checkpoint import to_native, to_published
from crossmae_det.checkpoint.layouts import export, with_class_row
from crossmae_det.detection import ViTBackbone
from crossmae_det.modeling import ViT
from crossmae_det.modeling.vit import LAYER_NORM
from crossmae_det.pretraining import MAE, CrossMAE
from crossmae_det.pretraining.masked_image_model import mask_patches

KINDS = {"crossmae": CrossMAE, "mae": MAE}


def tiny_state(kind, **options):
    encoder = ViT(16, 8, embed_dim=8, depth=2, num_heads=2)
    options = dict(decoder_dim=8, decoder_depth=2, decoder_num_heads=2) | options
    return KINDS[kind](encoder, **options).state_dict()


def read(path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def assert_identical(got, want):
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert got[name] is tensor


@pytest.mark.parametrize("kind", KINDS)
def test_pretraining_models_survive_the_round_trip(kind):
    state = tiny_state(kind)
    published = to_published(state, format=kind)
    assert not any(name.startswith(("encoder.", "decoder.")) for name in published)
    assert_identical(to_native(published), state)


def test_the_ablation_survives_the_round_trip():
    state = tiny_state("crossmae", decoder_self_attention=True)
    assert "decoder.blocks.0.self_attn.qkv.weight" in state
    published = to_published(state, format="crossmae")
    assert published["decoder_blocks.1.norm0.bias"] is state["decoder.blocks.1.self_norm.bias"]
    assert_identical(to_native(published), state)
    # As this project wrote them before.
    old = {name.replace("norm0", "self_norm"): tensor for name, tensor in published.items()}
    assert_identical(to_native(old), state)


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_alone_survives_the_round_trip(kind):
    state = {k: v for k, v in tiny_state(kind).items() if k.startswith("encoder.")}
    published = to_published(state, format=kind)
    assert {"cls_token", "pos_embed", "patch_embed.proj.bias"} < set(published)
    assert_identical(to_native(published), state)


@pytest.mark.parametrize("name", ["crossmae_tiny", "crossmae_self_attention", "mae_tiny"])
def test_published_files_survive_the_round_trip(name, fixtures):
    published = read(fixtures / f"{name}.pt")["state_dict"]
    kind = name.partition("_")[0]
    assert_identical(to_published(to_native(published), format=kind), published)


def test_a_published_training_checkpoint_loads(fixtures):
    checkpoint = read(fixtures / "crossmae_tiny_training_checkpoint.pth")
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
def test_an_unexpected_key_is_named(kind):
    published = to_published(tiny_state(kind), format=kind) | {"head.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"'head.weight' \(1,\).*published"):
        to_native(published)


@pytest.mark.parametrize("state", [{}, {"encoder.cls_token": torch.zeros(1, 1, 8)}])
def test_unknown_layouts_are_rejected(state):
    with pytest.raises(ValueError, match="patch embedding") as error:
        to_native(state)
    assert "\n" not in str(error.value)


def test_a_mixture_of_layouts_is_rejected():
    mixture = {
        **to_published(tiny_state("crossmae"), format="crossmae"),
        **to_published(tiny_state("mae"), format="mae"),
    }
    with pytest.raises(ValueError, match="'decoder_embed.weight'.*published CrossMAE"):
        to_native(mixture)


def test_an_unknown_target_layout():
    with pytest.raises(ValueError, match="'swin'.*crossmae, mae, timm"):
        to_published(tiny_state("mae"), format="swin")


def test_a_target_layout_of_another_model():
    with pytest.raises(ValueError, match="mae.*'decoder.feature_weights'"):
        to_published(tiny_state("crossmae"), format="mae")


def test_crossmae_without_weights_between_blocks_survives_the_round_trip():
    published = to_published(tiny_state("crossmae"), format="crossmae")
    without = {k: v for k, v in published.items() if not k.startswith(("wfm", "dec_norms"))}
    without |= {"norm.weight": torch.randn(8), "norm.bias": torch.randn(8)}
    native = to_native(without)
    assert native["decoder.feature_weights"].tolist() == [[1.0], [1.0]]
    assert native["decoder.feature_norms.1.bias"] is without["norm.bias"]
    back = to_published(native, format="crossmae")
    assert back.keys() == without.keys()
    assert all(torch.equal(back[name], without[name]) for name in without)
    # It means what it says: every block reads the norm of the last feature.
    model = CrossMAE(
        ViT(16, 8, embed_dim=8, depth=2, num_heads=2),
        **dict(decoder_dim=8, decoder_depth=2, decoder_num_heads=2),
        **dict(feature_blocks=[-1], use_input_feature=False, mask_ratio=0.5),
    )
    model.load_state_dict(native)
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 4)
    decoder, masking = model.decoder, mask_patches(noise, 0.5, 0.25)
    last = model.encoder.forward_tokens(images, masking.visible)[-1]
    weight, bias = without["norm.weight"], without["norm.bias"]
    memory = F.layer_norm(last, (8,), weight, bias, eps=1e-6)
    x = decoder.mask_token + decoder.pos_embed[0, 1:][masking.predicted]
    for block in decoder.blocks:
        x = block(x, memory)
    expected = decoder.pred(decoder.norm(x))
    torch.testing.assert_close(model.predict(images, noise).pred, expected)


def timm_vit(**options):
    sizes = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    model = VisionTransformer(**(sizes | dict(num_classes=3) | options)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


TIMM = {
    "token": {},
    "average": {"global_pool": "avg"},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "class token without a position": {"no_embed_class": True},
    "no norm, no head": {"final_norm": False, "num_classes": 0},
}


@pytest.mark.parametrize("kind", TIMM)
def test_a_vit_of_timm_gives_the_same_features(kind):
    reference = timm_vit(**TIMM[kind])
    model = ViT(32, 8, embed_dim=16, depth=2, num_heads=2)
    state = to_native(reference.state_dict())
    if kind == "class token without a position":
        state["encoder.pos_embed"] = with_class_row(state["encoder.pos_embed"])
    backbone = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    missing = {"cls_token"} if kind == "no class token" else set()
    assert backbone.keys() == model.state_dict().keys() - missing
    model.load_state_dict(backbone, strict=False)
    images = torch.randn(2, 3, 32, 32)
    reference.norm = reference.fc_norm = torch.nn.Identity()
    expected = reference.forward_features(images)
    if kind == "no class token":
        # Nor has the feature-map path; without windows the attention is the same.
        expected_map = expected.transpose(1, 2).unflatten(2, (4, 4))
        torch.testing.assert_close(model.forward_map(images), expected_map, atol=1e-5, rtol=0)
    else:
        torch.testing.assert_close(model.forward_tokens(images)[-1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", TIMM)
def test_timm_survives_the_round_trip(kind):
    reference = timm_vit(**TIMM[kind]).state_dict()
    native = to_native(reference)
    back = to_published(native, format="timm")
    assert back.keys() == reference.keys()
    assert all(torch.equal(back[name], reference[name]) for name in reference)
    assert_same(to_native(back), native)


def assert_same(got, want):
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("norm", [True, False])
def test_timm_loads_an_exported_backbone_and_gives_the_same_features(norm):
    method = MAE if norm else CrossMAE  # MAE's encoder ends with a norm
    encoder = ViT(32, 8, embed_dim=16, depth=2, num_heads=2)
    model = method(encoder, decoder_dim=8, decoder_num_heads=2)
    reference = timm_vit(num_classes=0, final_norm=norm)
    reference.load_state_dict(to_published(model.state_dict(), format="timm"))
    images = torch.randn(2, 3, 32, 32)
    expected = model.encoder.forward_tokens(images)[-1]
    if norm:
        expected = model.decoder.encoder_norm(expected)
    got = reference.forward_features(images)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    back = to_native(reference.state_dict())
    backbone = {k: v for k, v in model.state_dict().items() if k.startswith("encoder.")}
    assert_same({k: v for k, v in back.items() if k.startswith("encoder.")}, backbone)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (dict(reg_tokens=4), "'reg_token'.*register tokens"),
        (dict(init_values=1e-5), "'blocks.0.ls1.gamma'.*LayerScale"),
        (dict(qk_norm=True), r"'blocks.0.attn.q_norm.weight'.*norms inside the attention"),
        (dict(pre_norm=True), "'norm_pre.weight'.*a norm before the first block"),
    ],
)
def test_other_networks_are_rejected(options, name):
    with pytest.raises(ValueError, match=name):
        to_native(timm_vit(**options).state_dict())


def huggingface_names(state):
    """MAE's published names as Hugging Face's: a naive list of replacements."""
    result = {}
    for key, value in state.items():
        key = re.sub(r"^blocks\.", "vit.encoder.layer.", key)
        key = re.sub(r"^decoder_blocks\.", "decoder.decoder_layers.", key)
        key = re.sub(r"^(decoder_(norm|embed|pred|pos_embed)|mask_token)", r"decoder.\1", key)
        key = re.sub(r"^norm\.", "vit.layernorm.", key)
        key = re.sub(r"^(cls_token)", r"vit.embeddings.\1", key)
        key = re.sub(r"^pos_embed", "vit.embeddings.position_embeddings", key)
        key = key.replace("patch_embed.proj", "vit.embeddings.patch_embeddings.projection")
        for old, new in (
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("attn.proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ):
            key = key.replace(f".{old}.", f".{new}.")
        if "attn.qkv" in key:
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                result[key.replace("attn.qkv", f"attention.attention.{name}")] = part
        else:
            result[key] = value
    return result


def test_hugging_face_survives_the_round_trip():
    native = tiny_state("mae")
    reference = huggingface_names(to_published(native, format="mae"))
    assert_same(to_native(reference), native)
    assert_same(to_published(native, format="huggingface"), reference)
    # The model without its decoder has no "vit." in front.
    alone = {k.removeprefix("vit."): v for k, v in reference.items() if k.startswith("vit.")}
    backbone = {k: v for k, v in native.items() if "encoder" in k}
    assert_same(to_native(alone), backbone)
    # As transformers 5 has them in memory.
    new = {"vit.encoder.layer": "vit.layers", "attention.attention.query": "attention.q_proj"}
    new |= {"attention.attention.key": "attention.k_proj"}
    new |= {"attention.attention.value": "attention.v_proj"}
    new |= {"attention.output.dense": "attention.o_proj"}
    new |= {"intermediate.dense": "mlp.fc1", ".output.dense": ".mlp.fc2"}
    renamed = {}
    for key, value in reference.items():
        for old, name in new.items():
            key = key.replace(old, name)
        renamed[key] = value
    assert_same(to_native(renamed), native)


def test_a_query_without_its_key_is_named():
    reference = to_published(tiny_state("mae"), format="huggingface")
    missing = "vit.encoder.layer.1.attention.attention.key.weight"
    del reference[missing]
    with pytest.raises(ValueError, match=f"'{missing}' is missing"):
        to_native(reference)


def detectron2_vit(**options):
    sizes = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    model = DetectronViT(
        **(sizes | dict(window_size=0, use_rel_pos=True, norm_layer=LAYER_NORM) | options)
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("class_row", [True, False])
def test_a_vit_of_detectron2_gives_the_same_feature_map(class_row):
    reference = detectron2_vit(
        pretrain_img_size=32,
        pretrain_use_cls_token=class_row,
        window_size=3,
        window_block_indexes=[0],
    )
    model = ViTBackbone(
        32,
        8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        window_size=3,
        global_blocks=[1],
        use_rel_pos=True,
    )
    # As the backbone of a ViTDet file.
    state = {f"backbone.net.{name}": value for name, value in reference.state_dict().items()}
    native = to_native(state)
    backbone = {name.removeprefix("backbone.net."): value for name, value in native.items()}
    if not class_row:
        backbone["pos_embed"] = with_class_row(backbone["pos_embed"])
    model.load_state_dict(backbone)
    images = torch.randn(2, 3, 32, 32)
    expected = reference(images)["last_feat"]
    torch.testing.assert_close(model(images)["last_feat"], expected, atol=1e-5, rtol=0)


def test_a_pretrained_backbone_survives_the_round_trip_through_vitdet():
    native = tiny_state("crossmae")
    vitdet = to_published(native, format="vitdet")
    assert "backbone.net.blocks.1.mlp.fc2.bias" in vitdet
    assert not [name for name in vitdet if "cls_token" in name or "decoder" in name]
    backbone = to_published(to_native(vitdet), format="timm")
    for name, value in backbone.items():
        if name != "pos_embed":  # timm's without a class token has no row for it
            assert value is native[f"encoder.{name}"]
    assert torch.equal(backbone["pos_embed"], native["encoder.pos_embed"][:, 1:])


def test_a_detector_does_not_fit_other_layouts():
    detector = {f"backbone.net.{k}": v for k, v in detectron2_vit().state_dict().items()}
    detector["roi_heads.box_head.fc1.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="mae .*'encoder.cls_token'"):
        to_published(detector, format="mae")
    with pytest.raises(ValueError, match="'encoder.blocks.0.attn.rel_pos_h'"):
        to_published(detector, format="timm")
    tensors, dropped = export(detector, "timm", lambda name: "rel_pos" in name)
    assert not [name for name in tensors if "rel_pos" in name]
    assert len(dropped) == 5 and "roi_heads.box_head.fc1.weight" in dropped
