import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from checkpoint_models import SIZES, Detector, equal, save, values

from crossmae_det.checkpoint import load
from crossmae_det.modeling import ViT


def test_a_whole_model_comes_back_exactly(tmp_path):
    source, target = Detector(), Detector()
    assert not equal(values(source), values(target))
    report = load(target, save(tmp_path, source.state_dict(), iteration=3), whole=True)
    assert equal(values(source), values(target))
    assert report.loaded == list(source.state_dict())
    assert not (report.resampled or report.initialized or report.dropped)


@pytest.mark.parametrize("prefix", ["", "encoder.", "backbone.net."])
def test_a_backbone_goes_into_a_detector_and_all_is_accounted_for(tmp_path, prefix):
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


def test_a_backbone_without_a_class_token_has_its_row_all_the_same(tmp_path):
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
    assert (
        len(report.resampled) == 5
    )  # two tables in each of two blocks, and the absolute positions
    table = source.backbone.net.blocks[1].attn.rel_pos_h.detach()
    expected = torch.nn.functional.interpolate(table.T[None], size=11, mode="linear")[0].T
    torch.testing.assert_close(target.backbone.net.blocks[1].attn.rel_pos_h.detach(), expected)


def test_a_published_training_checkpoint_gives_its_backbone(fixtures):
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


def test_parts_that_only_one_of_two_detectors_has_are_listed(tmp_path):
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
            r"\(taken for: timm ViT.*\): 'blocks.1.mlp.fc1.bias' is \(7,\) in the file and"
            r" \(64,\) in the model; take a checkpoint of this model",
        ),
        (
            "missing",
            r"the file has nothing for 'backbone.net.blocks.0.attn.qkv.weight' \(48, 16\) of the"
            " model; --allow-missing 'backbone.net.blocks.0.attn.qkv.weight' keeps its initial",
        ),
        (
            "unexpected",
            r"'blocks.2.norm1.bias' \(16,\); the file's backbone is 16 wide"
            " with 3 blocks and the model's 16 wide with 2 blocks: make the model of that size",
        ),
        ("position", r"'pos_embed' is \(1, 12, 16\) in the file and \(1, 17, 16\) in the model"),
        ("integers", r"'blocks.0.norm1.bias' is \(16,\) of torch.int64 in the file and \(16,\)"),
        (
            "foreign",
            "no checkpoint of a plain ViT: it has no patch embedding .*'conv1.weight'.*timm",
        ),
        ("no tensor", "entry 'blocks.0.norm1.bias' is a int, not a tensor"),
    ],
)
def test_a_refused_file_is_named_and_leaves_the_model_as_it_was(tmp_path, kind, message):
    model = Detector()
    before = values(model)
    path = save(tmp_path, broken(kind))
    with pytest.raises(ValueError, match=message) as error:
        load(model, path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert equal(values(model), before)


def test_evaluation_wants_the_whole_model(tmp_path):
    with pytest.raises(ValueError, match="nothing for .*; take the checkpoint of a whole model"):
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


def test_what_a_user_knows_about_is_let_pass(tmp_path):
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
    with pytest.raises(ValueError, match="no place for 'blocks.0.extra' .*--allow-unexpected"):
        load(model, path, allow_missing=["*norm2*"], allow_unexpected=["blocks.1.extra"])
    # Another network is no matter of a tensor more or less.
    path = save(tmp_path, state | {"blocks.1.ls1.gamma": torch.ones(16)})
    with pytest.raises(ValueError, match="'blocks.1.ls1.gamma' .* a ViT with LayerScale, another"):
        load(model, path, allow_missing=["*norm2*"], allow_unexpected=["*"])


def test_positions_of_a_grid_that_is_no_square_are_not_guessed(tmp_path):
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
