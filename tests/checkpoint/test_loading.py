"""Loading into models: what is loaded, resampled, initialized, dropped or rejected."""

import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from checkpoint_models import SIZES, Detector, autoencoder, equal, save, values

from crossmae_det.checkpoint import convert, inspect, load, read_checkpoint, to_published
from crossmae_det.engine.checkpointing import Checkpointer
from crossmae_det.modeling import ViT
from crossmae_det.pretraining import MAE, CrossMAE


def test_a_whole_model_comes_back_exactly(tmp_path):
    source, target = Detector(), Detector()
    assert not equal(values(source), values(target))
    report = load(target, save(tmp_path, source.state_dict(), iteration=3), whole=True)
    assert equal(values(source), values(target))
    assert report.loaded == list(source.state_dict())
    assert not (report.resampled or report.initialized or report.dropped)


@pytest.mark.parametrize("prefix", ["", "encoder.", "backbone.net."])
def test_a_backbone_loads_into_a_detector_and_every_tensor_is_listed(tmp_path, prefix):
    backbone = ViT(**SIZES)
    state = {prefix + name: tensor for name, tensor in backbone.state_dict().items()}
    # What is after the backbone: a classifier's head, a decoder, a detector's.
    beside = {
        "": "head.bias",
        "encoder.": "decoder.mask_token",
        "backbone.net.": "backbone.other.w",
    }
    state[beside[prefix]] = torch.zeros(1, 1, 8)
    model = Detector()
    before = values(model)
    report = load(model, save(tmp_path, state))
    after = values(model)
    for name, tensor in backbone.state_dict().items():
        if name != "cls_token":
            assert torch.equal(after[f"backbone.net.{name}"], tensor)
    assert set(report.initialized) == {n for n in after if "rel_pos" in n or ".simfp" in n}
    assert all(torch.equal(after[name], before[name]) for name in report.initialized)
    assert sorted(report.dropped) == sorted([prefix + "cls_token", beside[prefix]])
    assert len(report.loaded) + len(report.initialized) == len(after)


def test_a_position_embedding_has_a_row_for_an_absent_class_token(tmp_path):
    """As detectron2's ViT and a backbone for maps: 17 rows are 4 x 4 and the class token's."""
    source, target = Detector().backbone.net, Detector()
    report = load(target, save(tmp_path, source.state_dict()))
    assert not report.resampled and "backbone.net.pos_embed" in report.loaded
    assert torch.equal(target.backbone.net.pos_embed, source.pos_embed)


def test_a_position_embedding_of_another_grid_is_resampled(tmp_path):
    backbone = ViT(**(SIZES | {"img_size": 64}))
    model = ViT(**(SIZES | {"img_size": (32, 48)}))
    report = load(model, save(tmp_path, backbone.state_dict()))
    assert report.resampled == ["pos_embed"]
    grid = backbone.pos_embed[:, 1:].view(1, 8, 8, 16).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(4, 6), mode="bicubic")
    torch.testing.assert_close(model.pos_embed[:, 1:], expected.flatten(2).transpose(1, 2))


def test_relative_positions_of_another_size_are_resampled(tmp_path):
    source, target = Detector(), Detector(img_size=48)
    torch.nn.init.normal_(source.backbone.net.blocks[1].attn.rel_pos_h)
    report = load(target, save(tmp_path, source.state_dict()), whole=True)
    assert len(report.resampled) == 5  # two tables in each block, and the absolute positions
    table = source.backbone.net.blocks[1].attn.rel_pos_h.detach()
    expected = torch.nn.functional.interpolate(table.T[None], size=11, mode="linear")[0].T
    torch.testing.assert_close(target.backbone.net.blocks[1].attn.rel_pos_h.detach(), expected)


def test_the_backbone_of_a_published_training_checkpoint(fixtures):
    path = fixtures / "crossmae_tiny_training_checkpoint.pth"
    state = torch.load(fixtures / "crossmae_tiny.pt", weights_only=True)
    config, published = state["config"], state["state_dict"]
    sizes = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    backbone = ViT(**{name: config[name] for name in sizes})
    report = load(backbone, path)
    assert sorted(report.loaded) == sorted(backbone.state_dict())
    assert {"mask_token", "wfm.linear.weight"} <= set(report.dropped)
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, published[name]), name


class Classifying(Detector):
    """A detector with the last layers of ``classes`` classes."""

    def __init__(self, classes, **overrides):
        super().__init__(**overrides)
        self.roi_heads = torch.nn.ModuleDict(
            {
                "box_head": torch.nn.Linear(4, 4),
                "box_predictor": torch.nn.ModuleDict({"cls_score": torch.nn.Linear(4, classes)}),
            }
        )


def test_a_detector_fine_tunes_on_other_classes(tmp_path):
    source, target = Classifying(81), Classifying(4)
    before = values(target)
    report = load(target, save(tmp_path, source.state_dict()))
    last = ["roi_heads.box_predictor.cls_score.weight", "roi_heads.box_predictor.cls_score.bias"]
    assert report.initialized == report.dropped == last
    after = values(target)
    for name, tensor in source.state_dict().items():
        assert torch.equal(after[name], before[name] if name in last else tensor)


def test_parts_of_one_of_two_detectors_are_listed(tmp_path):
    source, target = Classifying(4), Detector()
    report = load(target, save(tmp_path, source.state_dict()))
    assert sorted(report.loaded) == sorted(target.state_dict())
    assert len(report.dropped) == 4


def test_resuming_does_not_resample(tmp_path):
    path = save(tmp_path, Detector().state_dict())
    with pytest.raises(
        ValueError, match=r"pos_embed' is \(1, 17, 16\) in the file and \(1, 37, 16\)"
    ):
        load(Detector(img_size=48), path, whole=True, exact=True)


def test_averaged_weights_are_loaded_by_name(tmp_path):
    source, averaged, target = Detector(), Detector(), Detector()
    ema = {f"module.{name}": tensor for name, tensor in averaged.state_dict().items()}
    ema["n_averaged"] = torch.tensor(3)
    path = save(tmp_path, source.state_dict(), ema=ema)
    load(target, path, whole=True, weights="ema")
    assert equal(values(target), values(averaged))
    with pytest.raises(ValueError, match="holds no averaged weights"):
        load(target, save(tmp_path, source.state_dict()), whole=True, weights="ema")


def broken(kind):
    state = ViT(**SIZES).state_dict()
    if kind == "shape":
        state["blocks.1.mlp.fc1.bias"] = torch.zeros(7)
    elif kind == "missing":
        del state["blocks.0.attn.qkv.weight"]
    elif kind == "unexpected":
        state["blocks.2.norm1.bias"] = torch.zeros(16)
    elif kind == "position":
        state["pos_embed"] = torch.zeros(1, 12, 16)
    elif kind == "integers":
        state["blocks.0.norm1.bias"] = torch.zeros(16, dtype=torch.int64)
    elif kind == "foreign":
        state = {"conv1.weight": torch.zeros(3)}
    elif kind == "no tensor":
        state["blocks.0.norm1.bias"] = 3
    return state


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "shape",
            r"timm ViT.*'blocks.1.mlp.fc1.bias' is \(7,\) in the file and \(64,\) in the model",
        ),
        (
            "missing",
            r"'backbone.net.blocks.0.attn.qkv.weight' \(48, 16\)"
            ".*--allow-missing 'backbone.net.blocks.0.attn.qkv.weight'",
        ),
        (
            "unexpected",
            r"'blocks.2.norm1.bias' \(16,\).*16 wide with 3 blocks.*16 wide with 2 blocks",
        ),
        ("position", r"'pos_embed' is \(1, 12, 16\) in the file and \(1, 17, 16\) in the model"),
        ("integers", r"'blocks.0.norm1.bias' is \(16,\) of torch.int64 in the file and \(16,\)"),
        ("foreign", "patch embedding .*'conv1.weight'.*timm"),
        ("no tensor", "blocks.0.norm1.bias. is a int"),
    ],
)
def test_an_error_names_the_file_and_leaves_the_model_unchanged(tmp_path, kind, message):
    model = Detector()
    before = values(model)
    path = save(tmp_path, broken(kind))
    with pytest.raises(ValueError, match=message) as error:
        load(model, path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert equal(values(model), before)


def test_evaluation_needs_the_whole_model(tmp_path):
    with pytest.raises(ValueError, match="'backbone.*whole model"):
        load(Detector(), save(tmp_path, ViT(**SIZES).state_dict()), whole=True)


def test_the_report_counts_and_groups(tmp_path):
    report = load(Detector(), save(tmp_path, ViT(**SIZES).state_dict()))
    lines = str(report).splitlines()
    assert lines[0].startswith("weights from ")
    counts = {line.split()[0]: int(line.split()[1]) for line in lines[3:]}
    expected = {"loaded": 27, "resampled": 0, "initialized": 16, "dropped": 1, "unexpected": 0}
    assert counts == expected
    whole = json.loads(json.dumps(report.to_dict()))
    assert {kind: len(whole[kind]) for kind in expected} == expected
    assert whole["layout"].startswith("timm ViT") and whole["dropped"] == ["cls_token"]


def test_the_report_says_what_was_resampled(tmp_path):
    report = load(Detector(img_size=48), save(tmp_path, Detector().state_dict()))
    lines = str(report).splitlines()
    assert "resampled backbone.net.pos_embed: (1, 17, 16) -> (1, 37, 16)" in lines
    # Of the four tables, which are resampled alike, one of each axis stands for the others.
    tables = [line for line in lines if "rel_pos" in line and "->" in line]
    assert tables == [
        f"resampled backbone.net.blocks.0.attn.rel_pos_{axis}: (7, 8) -> (11, 8)" for axis in "hw"
    ]
    assert report.to_dict()["shapes"]["backbone.net.blocks.1.attn.rel_pos_w"] == ((7, 8), (11, 8))


def test_a_patch_kernel_of_another_size_is_resampled(tmp_path):
    source = ViT(**(SIZES | {"img_size": 24, "patch_size": 6}))
    target = ViT(**SIZES)
    report = load(target, save(tmp_path, source.state_dict()))
    assert report.resampled == ["patch_embed.proj.weight"]
    # A patch enlarged to 8 x 8 is embedded as the patch of 6 x 6 was.
    patch = torch.randn(2, 3, 6, 6)
    enlarged = F.interpolate(patch, size=8, mode="bicubic", antialias=True)
    torch.testing.assert_close(
        target.patch_embed(enlarged), source.patch_embed(patch), atol=1e-4, rtol=0
    )


def test_patterns_allow_missing_and_unexpected_keys(tmp_path):
    state = ViT(**SIZES).state_dict()
    del state["blocks.1.norm2.bias"], state["blocks.1.norm2.weight"]
    state["blocks.0.extra"] = torch.ones(16)
    state["blocks.1.extra"] = torch.ones(16)
    path, model = save(tmp_path, state), Detector()
    before = values(model)
    report = load(
        model,
        path,
        allow_missing=["backbone.net.blocks.?.norm2.*"],
        allow_unexpected=["blocks.0.*", "blocks.1.extra"],
    )
    assert sorted(report.unexpected) == ["blocks.0.extra", "blocks.1.extra"]
    assert {"backbone.net.blocks.1.norm2.bias"} < set(report.initialized)
    after = values(model)
    assert torch.equal(after["backbone.net.blocks.1.norm2.weight"], torch.ones(16))
    assert not torch.equal(
        after["backbone.net.blocks.1.attn.qkv.weight"],
        before["backbone.net.blocks.1.attn.qkv.weight"],
    )
    with pytest.raises(ValueError, match="'blocks.0.extra' .*--allow-unexpected"):
        load(model, path, allow_missing=["*norm2*"], allow_unexpected=["blocks.1.extra"])
    # Patterns do not allow another network.
    path = save(tmp_path, state | {"blocks.1.ls1.gamma": torch.ones(16)})
    with pytest.raises(ValueError, match="'blocks.1.ls1.gamma' .*LayerScale"):
        load(model, path, allow_missing=["*norm2*"], allow_unexpected=["*"])


def test_the_grid_of_a_rectangular_position_embedding_is_not_guessed(tmp_path):
    """25 rows are 4 x 6 and the class token's, not 5 x 5."""
    source = ViT(**(SIZES | {"img_size": (32, 48)}))
    target = ViT(**(SIZES | {"img_size": 32}))
    with pytest.raises(ValueError, match=r"'pos_embed' is \(1, 25, 16\) in the file and \(1, 17"):
        load(target, save(tmp_path, source.state_dict()))
    same = ViT(**(SIZES | {"img_size": (32, 48)}))
    assert "pos_embed" in load(same, save(tmp_path, source.state_dict())).loaded


def test_a_part_of_a_detector_is_whole_or_absent(tmp_path):
    model = Classifying(4)
    for change in ("missing", "unexpected"):
        state = dict(Classifying(4).state_dict())
        if change == "missing":
            del state["backbone.simfp_3.0.weight"]
        else:
            state["backbone.simfp_3.9.weight"] = torch.zeros(1)
        with pytest.raises(ValueError, match=r"'backbone.simfp_3.[09].weight'"):
            load(model, save(tmp_path, state))
    # Buffers of older versions of detectron2 are no weights.
    old = {"pixel_mean": torch.zeros(3, 1, 1)}
    old["proposal_generator.anchor_generator.cell_anchors.0"] = torch.zeros(3, 4)
    report = load(model, save(tmp_path, model.state_dict() | old), whole=True)
    assert sorted(report.dropped) == sorted(old)


def test_a_vitdet_file_of_numpy_arrays_loads_into_a_detector(tmp_path):
    source, target = Detector(), Detector()
    arrays = {name: tensor.numpy() for name, tensor in source.state_dict().items()}
    path = tmp_path / "model_final_61ccd1.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "detectron2"}))
    load(target, path, whole=True)
    assert equal(values(source), values(target))


def test_positions_without_a_row_for_the_class_token(tmp_path):
    state = Detector().state_dict()
    state["backbone.net.pos_embed"] = torch.randn(1, 16, 16)  # as without a class token
    model = Detector()
    assert load(model, save(tmp_path, state)).resampled == ["backbone.net.pos_embed"]
    loaded = values(model)["backbone.net.pos_embed"]
    assert torch.equal(loaded[:, 1:], state["backbone.net.pos_embed"]) and not loaded[:, 0].any()


def test_pretraining_continues_at_another_size(tmp_path):
    source, target = autoencoder(), autoencoder(img_size=(48, 64))
    report = load(target, save(tmp_path, source.state_dict()))
    assert sorted(report.resampled) == ["decoder.pos_embed", "encoder.pos_embed"]
    assert not report.initialized and not report.dropped
    # The decoder's table is the one that it would have at that size.
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


def test_a_file_without_a_decoder_is_not_a_whole_model(tmp_path):
    model = autoencoder()
    before = values(model)
    backbone = {f"encoder.{name}": tensor for name, tensor in model.encoder.state_dict().items()}
    for state in (backbone, model.encoder.state_dict()):
        path = save(tmp_path, state)
        with pytest.raises(ValueError, match="weights.pth .*'decoder.*whole model"):
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


def test_a_decoder_of_another_width_is_left_out_by_patterns(tmp_path):
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


def test_an_incomplete_decoder_is_an_error(tmp_path):
    model = autoencoder()
    for format, name in (
        ("native", "decoder.blocks.1.norm1.bias"),
        ("crossmae", "dec_norms.1.bias"),
    ):
        state = dict(model.state_dict())
        if format != "native":
            state = to_published(state, format)
        del state[name]
        with pytest.raises(ValueError, match="the file lacks 'decoder"):
            load(autoencoder(), save(tmp_path, state))


SQUARE, WIDE = {"img_size": 48}, {"img_size": (32, 72)}  # 6 x 6 and 4 x 9 patches


def resampled(table, old, new):
    grid = table[:, 1:].view(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic")
    return grid.flatten(2).transpose(1, 2)


def randomized(model):
    """With position embeddings that are not sine-cosine tables, as after training."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("pos_embed"):
                tensor.normal_()
    return model


@pytest.mark.parametrize("random", [True, False])
def test_a_square_table_is_resampled_to_a_grid_with_as_many_positions(tmp_path, random):
    source, target = ViT(**(SIZES | SQUARE)), ViT(**(SIZES | WIDE))
    if random:
        randomized(source)
    table = source.pos_embed.detach().clone()
    report = load(target, save(tmp_path, source.state_dict()))
    assert report.resampled == ["pos_embed"]
    torch.testing.assert_close(target.pos_embed[:, 1:], resampled(table, (6, 6), (4, 9)))
    # Also without a row for the class token.
    state = source.state_dict() | {"pos_embed": table[:, 1:]}
    load(target, save(tmp_path, state))
    torch.testing.assert_close(target.pos_embed[:, 1:], resampled(table, (6, 6), (4, 9)))
    # Into its own grid it goes as it is.
    same = ViT(**(SIZES | SQUARE))
    assert "pos_embed" in load(same, save(tmp_path, source.state_dict())).loaded
    assert torch.equal(same.pos_embed, table)


def test_checkpoints_of_runs_record_their_grid(tmp_path):
    source = randomized(Detector(pretrain_img_size=WIDE["img_size"]))
    Checkpointer(source, str(tmp_path)).save("model_final")
    path = tmp_path / "model_final.pth"
    table = source.backbone.net.pos_embed.detach()
    for image_size, grid in ((WIDE["img_size"], (4, 9)), (48, (6, 6)), ((16, 40), (2, 5))):
        target = Detector(pretrain_img_size=image_size)
        report = load(target, path)
        name = "backbone.net.pos_embed"
        assert name in (report.loaded if grid == (4, 9) else report.resampled)
        expected = table[:, 1:] if grid == (4, 9) else resampled(table, (4, 9), grid)
        torch.testing.assert_close(target.backbone.net.pos_embed[:, 1:], expected)
    assert inspect(path).img_size == (32, 72)
    with pytest.raises(ValueError, match="pos_embed"):
        load(Detector(pretrain_img_size=48), path, whole=True, exact=True)
    # Converted, it still does.
    convert(path, tmp_path / "vitdet.pkl", "vitdet")
    assert read_checkpoint(tmp_path / "vitdet.pkl")["position_grid"] == [4, 9]


def test_a_pretraining_run_is_recognized_by_its_sine_cosine_table(tmp_path):
    """A file without its grid: of other tools, or of an earlier version."""
    source, target = autoencoder(**WIDE), autoencoder(**WIDE)
    report = load(target, save(tmp_path, source.state_dict()), whole=True)
    assert not report.resampled
    half = {name: tensor.bfloat16() for name, tensor in source.state_dict().items()}
    assert not load(target, save(tmp_path, half), whole=True).resampled


def test_resuming_a_file_without_a_recorded_grid_does_not_resample(tmp_path):
    source, target = (randomized(autoencoder(**WIDE)) for _ in range(2))
    load(target, save(tmp_path, source.state_dict()), whole=True, exact=True)
    assert torch.equal(target.encoder.pos_embed, source.encoder.pos_embed)


@pytest.mark.parametrize("grid", [[4, 8], [0, 36], "4x9", [[4], 9], [-4, -9]])
def test_an_invalid_recorded_grid_is_ignored(tmp_path, grid):
    source, target = ViT(**(SIZES | SQUARE)), ViT(**(SIZES | SQUARE))
    report = load(target, save(tmp_path, source.state_dict(), position_grid=grid))
    assert "pos_embed" in report.loaded
