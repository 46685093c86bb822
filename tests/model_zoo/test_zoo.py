"""Shipped configs by name, and their published weights."""

import re

import pytest
import torch
from detectron2.config import instantiate

from crossmae_det import model_zoo
from crossmae_det.model_zoo import records
from crossmae_det.model_zoo.zoo import CHECKOUT_CONFIGS
from crossmae_det.pretraining import MAE, CrossMAE

CROSSMAE = "pretraining/crossmae_vit_b_800ep_pred75.py"
DETECTOR = "coco/mask_rcnn_crossmae_vit_b_100ep.py"
ROWS = [row for row in records.checkpoints() if row["config"]]
TINY = [
    *("dataloader.image_size=32", "model.encoder.embed_dim=24", "model.encoder.depth=2"),
    *("model.encoder.num_heads=2", "model.decoder_dim=16", "model.decoder_depth=2"),
    "model.decoder_num_heads=2",
]


def test_list_has_every_config_that_can_be_run():
    names = model_zoo.list()
    files = {path for path in CHECKOUT_CONFIGS.rglob("*") if path.suffix in (".py", ".yaml")}
    assert names == sorted(names)
    assert {CHECKOUT_CONFIGS / name for name in names} == {
        path for path in files if "common" not in path.parts
    }
    for name in names:
        assert model_zoo.get_config_file(name).endswith(name)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['name']}, {row['holds']}")
def test_checkpoints_match_the_recipe_of_their_config(row, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))  # the published number of images
    cfg = model_zoo.get_config(row["config"])
    with torch.device("meta"):
        model = instantiate(cfg.model)
    method, size, patch = re.match(r"(\w+) ViT-(\w)/(\d+)", row["name"]).groups()
    assert type(model) is {"MAE": MAE, "CrossMAE": CrossMAE}[method]
    assert f"_vit_{size.lower()}_" in row["config"]
    assert model.encoder.patch_size == (int(patch), int(patch))
    assert model.prediction_ratio == row["predicted"]
    assert (cfg.train.epochs, cfg.dataloader.image_size) == (row["epochs"], row["pixels"])


def test_names_of_crossmae_files_match_their_records():
    pattern = r"cross-vit(\w)-pretrain-wfm-mr0\.75-kmr([\d.]+)-dd12-ep(\d+)-ui(?:-res-(\d+))?\.pth$"
    rows = [row for row in ROWS if row["name"].startswith("CrossMAE")]
    assert len(rows) == 5
    for row in rows:
        size, ratio, epochs, pixels = re.search(pattern, row["url"]).groups()
        assert f"ViT-{size.upper()}/" in row["name"]
        assert (float(ratio), int(epochs)) == (row["predicted"], row["epochs"])
        assert int(pixels or 224) == row["pixels"]


def test_a_config_has_at_most_one_url():
    whole = [row["config"] for row in ROWS if row["holds"] == "whole model"]
    assert len(whole) == len(set(whole)) == 8
    for row in ROWS:
        if row["holds"] == "whole model":
            assert model_zoo.get_checkpoint_url(row["config"]) == row["url"]
    assert all(row["url"].startswith("https://") for row in records.checkpoints())


@pytest.mark.parametrize(
    "name", [DETECTOR, "pretraining/crossmae_vit_b_800ep.py", "demo/mask_rcnn.py"]
)
def test_a_config_without_a_checkpoint_is_rejected_with_those_that_have_one(name):
    for call in (model_zoo.get_checkpoint_url, lambda name: model_zoo.get(name, trained=True)):
        with pytest.raises(ValueError, match=f"'{name}'.*{CROSSMAE}") as error:
            call(name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("call", [model_zoo.get_checkpoint_url, model_zoo.get])
def test_an_unknown_config_is_rejected_with_a_suggestion(call):
    with pytest.raises(ValueError, match=f"800_pred75.py'.*'{CROSSMAE}'"):
        call("pretraining/crossmae_vit_b_800_pred75.py")


def test_get_returns_a_model_with_random_weights_in_training_mode():
    torch.manual_seed(0)
    first, second = (model_zoo.get(CROSSMAE, device="cpu", overrides=TINY) for _ in range(2))
    assert isinstance(first, CrossMAE) and first.training
    assert first.encoder.embed_dim == 24
    assert not first.encoder.blocks[0].mlp.fc1.weight.equal(second.encoder.blocks[0].mlp.fc1.weight)
    assert next(model_zoo.get(CROSSMAE, device="meta", overrides=TINY).parameters()).is_meta


def test_get_takes_yaml_configs(tiny_sets):
    train, val = tiny_sets
    options = [
        *("DATASETS.TRAIN", f"('{train}',)", "DATASETS.TEST", f"('{val}',)"),
        *("INPUT.IMAGE_SIZE", "64", "MODEL.VIT.EMBED_DIM", "32", "MODEL.VIT.DEPTH", "1"),
        *("MODEL.VIT.NUM_HEADS", "2"),
    ]
    name = "coco/mask_rcnn_crossmae_vit_b_100ep.yaml"
    model = model_zoo.get(name, device="cpu", overrides=options)
    assert model.roi_heads.num_classes == 6 and model.backbone.net.embed_dim == 32


def test_get_trained_loads_the_whole_model_from_the_url_of_the_config(tmp_path, monkeypatch):
    published = model_zoo.get(CROSSMAE, device="cpu", overrides=TINY)
    path = tmp_path / "published.pth"
    torch.save({"model": published.state_dict()}, path)
    rows = [{"config": CROSSMAE, "holds": "whole model", "url": str(path)}]
    monkeypatch.setattr(records, "checkpoints", lambda: rows)
    model = model_zoo.get(CROSSMAE, trained=True, device="cpu", overrides=TINY)
    for name, tensor in published.state_dict().items():
        assert tensor.equal(model.state_dict()[name]), name
    with pytest.raises(ValueError, match="published.pth"):
        model_zoo.get(CROSSMAE, True, "cpu", [*TINY, "model.decoder_depth=3"])


def test_an_unknown_device_is_rejected():
    with pytest.raises(ValueError, match="'abacus'"):
        model_zoo.get(CROSSMAE, device="abacus", overrides=TINY)
