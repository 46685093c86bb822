"""Runs on custom data, and their configs reused on other data."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from crossmae_det.checkpoint import read_checkpoint
from crossmae_det.detection.predictor import Predictor
from crossmae_det.engine import run
from crossmae_det.model_zoo import get_config

CONFIG = "coco/mask_rcnn_crossmae_vit_b_100ep.py"
TRAIN = Namespace(eval_only=False, resume=False)
EVALUATE = Namespace(eval_only=True, resume=False)


def rewrite(spec, path, edit):
    """The spec of a dataset whose json is an edited copy of another's."""
    json_file, _, images = spec.rpartition(":")
    content = json.loads(Path(json_file).read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return f"{path}:{images}"


def permute_ids(content):
    """The same classes under other ids, in another order."""
    ids = [category["id"] for category in content["categories"]]
    new = dict(zip(ids, reversed([10 * id_ for id_ in ids]), strict=True))
    for entry, key in [(c, "id") for c in content["categories"]] + [
        (a, "category_id") for a in content["annotations"]
    ]:
        entry[key] = new[entry[key]]


def add_class(content):
    content["categories"].append({"id": 99, "name": "spiral"})


def rename_class(content):
    content["categories"][0]["name"] = "oval"


@pytest.fixture(scope="module")
def trained(tiny_sets, tmp_path_factory):
    """The folder of a short run, its results, and the overrides of its config."""
    folder = tmp_path_factory.mktemp("run")
    options = [
        f"dataloader.train.dataset.names={tiny_sets[0]}",
        f"dataloader.test.dataset.names={tiny_sets[1]}",
        *["dataloader.image_size=64", "dataloader.train.total_batch_size=2"],
        *["dataloader.train.num_workers=0", "train.amp.enabled=False", "train.device=cpu"],
        *["model.backbone.net.embed_dim=32", "model.backbone.net.depth=2"],
        *["model.backbone.net.num_heads=2", "model.backbone.out_channels=16"],
        *["model.roi_heads.mask_head.conv_dims=[16,16]", "model.roi_heads.box_head.conv_dims=[16]"],
        *["model.roi_heads.box_head.fc_dims=[32]", "train.visualizer=null", "train.epochs=25"],
        *["optimizer.lr=2e-3", "lr_multiplier.warmup_iters=0", f"train.output_dir={folder}"],
        "model.roi_heads.box_predictor.test_score_thresh=0.0",
    ]
    results = run(get_config(CONFIG, options), TRAIN)
    assert results["bbox"]["AP"] > 0  # so that a different result would show
    return folder, results, options


def evaluate(folder, *options):
    return run(get_config(str(folder / "config.yaml"), options, trained=True), EVALUATE)


def test_evaluation_maps_classes_by_name(trained, tiny_sets, tmp_path):
    folder, results, options = trained
    permuted = rewrite(tiny_sets[1], tmp_path / "permuted.json", permute_ids)
    test = f"dataloader.test.dataset.names={permuted}"
    assert json.dumps(evaluate(folder, test)) == json.dumps(results)
    detections = json.loads((folder / "inference" / "coco_instances_results.json").read_text())
    assert {d["category_id"] for d in detections} <= {10, 20, 30, 40, 50, 60}
    # The classes of the weights are known even if the training set changes.
    train = rewrite(tiny_sets[0], tmp_path / "train.json", permute_ids)
    both = [*options, test, f"dataloader.train.dataset.names={train}"]
    checkpoint = f"train.init_checkpoint={folder}/model_final.pth"
    again = run(get_config(CONFIG, [*both, checkpoint]), EVALUATE)
    assert json.dumps(again) == json.dumps(results)


@pytest.mark.parametrize(("edit", "name"), [(add_class, "spiral"), (rename_class, "oval")])
def test_evaluation_rejects_other_classes(trained, tiny_sets, tmp_path, edit, name):
    folder, _, _ = trained
    spec = rewrite(tiny_sets[1], tmp_path / "other.json", edit)
    with pytest.raises(ValueError, match=name) as error:
        evaluate(folder, f"dataloader.test.dataset.names={spec}")
    assert "\n" not in str(error.value)


def test_a_run_without_weights_named_is_evaluated_with_its_own(trained):
    folder, results, _ = trained
    assert json.dumps(evaluate(folder)) == json.dumps(results)
    cfg = get_config(str(folder / "config.yaml"), trained=True)
    assert cfg.train.init_checkpoint == str(folder / "model_best.pth")
    assert list(Predictor(cfg).metadata.thing_classes) == list(cfg.dataloader.categories.values())
    named = get_config(str(folder / "config.yaml"), ["train.init_checkpoint=a.pth"], trained=True)
    assert named.train.init_checkpoint == "a.pth"
    # Training again starts from the original weights.
    assert get_config(str(folder / "config.yaml")).train.init_checkpoint == ""


def test_the_last_checkpoint_serves_where_there_is_no_best(trained, tmp_path):
    folder, _, _ = trained
    copy = tmp_path / "moved"
    shutil.copytree(folder, copy)
    (copy / "model_best.pth").unlink()
    cfg = get_config(str(copy / "config.yaml"), trained=True)
    assert cfg.train.init_checkpoint == str(copy / "model_final.pth")


def test_training_again_on_more_classes_trains_them(trained, tiny_sets, tmp_path):
    folder, _, _ = trained
    specs = [rewrite(spec, tmp_path / f"{i}.json", add_class) for i, spec in enumerate(tiny_sets)]
    names = [
        f"dataloader.{k}.dataset.names={s}" for k, s in zip(("train", "test"), specs, strict=True)
    ]
    output = [f"train.output_dir={tmp_path}/again", "train.max_iter=1"]
    results = run(get_config(str(folder / "config.yaml"), [*names, *output]), TRAIN)
    assert "AP-spiral" in results["bbox"]
    state = read_checkpoint(tmp_path / "again" / "model_final.pth")
    assert state["model"]["roi_heads.box_predictor.cls_score.weight"].shape[0] == 8
    assert list(state["settings"]["dataloader.categories"].values())[-1] == "spiral"


def test_training_without_a_validation_set(trained, tiny_sets, tmp_path):
    _, _, options = trained
    kept = [option for option in options if "dataloader.test" not in option]
    output = [f"train.output_dir={tmp_path}/output", "train.max_iter=1"]
    assert run(get_config(CONFIG, [*kept, *output]), TRAIN) == {}
    assert (tmp_path / "output" / "model_final.pth").exists()
    assert not (tmp_path / "output" / "inference").exists()
    assert "without evaluation" in (tmp_path / "output" / "log.txt").read_text()
    with pytest.raises(ValueError, match="dataloader.test.dataset.names"):
        evaluate(tmp_path / "output")


def test_different_classes_of_train_and_val_are_named(trained, tiny_sets, tmp_path):
    _, _, options = trained
    spec = rewrite(tiny_sets[1], tmp_path / "other.json", rename_class)
    cfg = get_config(CONFIG, [*options, f"dataloader.test.dataset.names={spec}"])
    with pytest.raises(Exception, match="oval") as error:
        OmegaConf.resolve(cfg)
    assert "ellipse" in str(error.value)


def test_boxes_alone_are_trained_without_a_mask_head(trained, tmp_path):
    _, _, options = trained
    options = [option for option in options if "mask_head" not in option]
    options += ["model.roi_heads.mask_head=null", "train.max_iter=1"]
    cfg = get_config(CONFIG, [*options, f"train.output_dir={tmp_path}/boxes"])
    assert run(cfg, TRAIN).keys() == {"bbox"}
