"""Training, evaluation, resuming and prediction on datasets that are in no COCO json."""

import json

import pytest
import yaml
from dataset_layouts import NAMES, write
from tool_calls import call_tool

from crossmae_det.detection.predictor import Predictor
from crossmae_det.model_zoo import get_config

CONFIG = "coco/mask_rcnn_crossmae_vit_b_100ep.py"
MORE = ["train.max_iter=2", "train.eval_period=2"]
LONGER = ["train.max_iter=3", "train.visualizer=null"]


@pytest.fixture
def command(repo, monkeypatch):
    monkeypatch.syspath_prepend(str(repo / "tools"))
    return lambda name, *arguments: call_tool(repo, monkeypatch, name, *arguments)


def test_a_run_of_one_string(tmp_path, tiny_overrides, command):
    spec = write("yolo", tmp_path / "data")
    output = tmp_path / "output"
    options = [o for o in tiny_overrides if "dataset.names" not in o]
    options += [*MORE, f"dataloader.train.dataset.names={spec}"]
    before = sorted((tmp_path / "data").rglob("*"))
    command("lazyconfig_train_net", "--config-file", CONFIG, *options)
    results = json.loads((output / "inference/results.json").read_text())
    assert {f"AP-{name}" for name in NAMES} <= results["results"]["segm"].keys()
    assert (output / "predictions.png").exists()
    saved = yaml.unsafe_load((output / "config.yaml").read_text())["dataloader"]
    assert saved["train"]["dataset"]["names"] == spec
    assert saved["recorded"][f"{spec}:val"]["num_images"] == 4

    # Its config is enough to evaluate, to go on, and to predict.
    run = str(output / "config.yaml")
    command("lazyconfig_train_net", "--config-file", run, "--eval-only")
    again = json.loads((output / "inference/results.json").read_text())
    assert again["results"] == results["results"]
    command("lazyconfig_train_net", "--config-file", CONFIG, "--resume", *options, *LONGER)
    assert "Resumed from" in (output / "log.txt").read_text()
    assert sorted((tmp_path / "data").rglob("*")) == before
    (tmp_path / "data").rename(tmp_path / "moved")
    cfg = get_config(run, trained=True)  # the classes are known without the data
    assert sorted(cfg.dataloader.categories.values()) == sorted(NAMES)
    assert list(Predictor(cfg).metadata.thing_classes) == NAMES


def test_a_broken_label_file_ends_the_command_in_one_line(tmp_path, capsys, command):
    spec = write("yolo", tmp_path / "data")
    path = next((tmp_path / "data/labels/val").iterdir())
    path.write_text("0 0.5 0.5 0.1\n")
    options = [f"dataloader.train.dataset.names={spec}", f"train.output_dir={tmp_path}/output"]
    with pytest.raises(SystemExit) as stop:
        command("lazyconfig_train_net", "--config-file", CONFIG, *options)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and "Traceback" not in captured.out + captured.err
    assert f"error: {path}, line 1" in captured.err.strip().splitlines()[-1]


def test_test_sets_are_validation_splits(tmp_path):
    spec = write("voc", tmp_path)
    train = f"dataloader.train.dataset.names={spec}"
    for test in ([], [f"dataloader.test.dataset.names={spec}"]):
        cfg = get_config(CONFIG, [train, *test])
        assert cfg.dataloader.test.dataset.names == f"{spec}:val"
    cfg = get_config(CONFIG, [train, f"dataloader.test.dataset.names={spec}:train"])
    assert cfg.dataloader.test.dataset.names == f"{spec}:train"
    cfg = get_config(CONFIG, [f"dataloader.train.dataset.names={spec}:val"])
    assert cfg.dataloader.test.dataset.names is None
    cfg = get_config(CONFIG, [train])
    cfg.dataloader.test.dataset.names = spec  # not by an override
    with pytest.raises(Exception, match=f"{spec}:val"):
        cfg.dataloader.categories  # noqa: B018
    cfg = get_config(
        "coco/mask_rcnn_crossmae_vit_b_100ep.yaml", ["DATASETS.TRAIN", spec, "DATASETS.TEST", spec]
    )
    assert list(cfg.dataloader.train.dataset.names) == [spec]
    assert cfg.dataloader.test.dataset.names == f"{spec}:val"
