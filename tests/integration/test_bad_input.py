"""Errors of the user: one line that says what to do, exit code 2, nothing lost."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tool_calls import call_tool

from crossmae_det import model_zoo
from crossmae_det.modeling import ViT
from crossmae_det.utils import save_checkpoint

CONFIG = "coco/mask_rcnn_crossmae_vit_b_100ep.py"


@pytest.fixture
def tool(repo, monkeypatch, capsys):
    """Run a tool in this process; the last line that it leaves on standard error."""
    monkeypatch.syspath_prepend(str(repo / "tools"))

    def call(name, *arguments):
        with pytest.raises(SystemExit) as stop:
            call_tool(repo, monkeypatch, name, *arguments)
        captured = capsys.readouterr()
        error = captured.err
        assert stop.value.code == 2
        assert "Traceback" not in captured.out + error
        return error.strip().splitlines()[-1]

    return call


@pytest.fixture
def train(tool, tiny_overrides):
    def call(*overrides, flags=()):
        options = [*tiny_overrides, "train.max_iter=1", "train.visualizer=null", *overrides]
        return tool("lazyconfig_train_net", "--config-file", CONFIG, *flags, *options)

    return call


@pytest.fixture
def own_set(tiny_sets, tmp_path):
    """A copy of the training set to spoil: (content of the json, writes it, image folder)."""
    json_file, _, images = tiny_sets[0].rpartition(":")
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    content = json.loads(Path(json_file).read_text())

    def write(content):
        path = tmp_path / "own.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return f"dataloader.train.dataset.names='{path}:{folder}'"

    return content, write, folder


def test_missing_files_are_named(train, tool, tmp_path):
    assert "no config file 'nowhere.py'" in tool(
        "lazyconfig_train_net", "--config-file", "nowhere.py"
    )
    line = train("dataloader.train.dataset.names='nowhere.json:images'")
    assert line.startswith("lazyconfig_train_net.py: error: nowhere.json: no such")
    line = train("train.init_checkpoint=nowhere.pth")
    assert "checkpoint nowhere.pth does not exist" in line
    line = train(flags=["--eval-only"])
    assert "--eval-only needs weights: add train.init_checkpoint=PATH" in line


def test_an_unknown_key_is_named_with_the_nearest(train, tool):
    assert "'train.epoch'; did you mean 'train.epochs'?" in train("train.epoch=3")
    line = tool("train_net", "--config-file", CONFIG.replace(".py", ".yaml"), "SOLVER.EPOCH", "3")
    assert "'SOLVER.EPOCH'; did you mean SOLVER.EPOCHS?" in line


def test_no_config_is_answered_with_the_shipped_ones(tool):
    line = tool("lazyconfig_train_net", "train.epochs=3")
    assert "--config-file" in line and CONFIG in line


def test_options_may_follow_overrides(train):
    # Read as options, not as overrides: the error is that of the evaluation.
    line = train("train.epochs=3", "--eval-only", "optimizer.lr=1e-4")
    assert "--eval-only needs weights" in line


def test_parts_of_a_job_that_do_not_fit_are_one_line(train):
    assert "model.*" in train("model.backbone.norm=no_such_norm")
    for name in ("depth", "num_heads", "embed_dim", "patch_size"):
        assert name in train(f"model.backbone.net.{name}=0")
    assert "optimizer.*" in train("optimizer._target_=torch.optim.SGD")
    assert "optimizer.*" in train("optimizer.betas=[0.9]")
    assert "train.compile.module" in train("train.compile.enabled=True", "train.compile.module=no")
    assert "augmentations" in train("dataloader.train.mapper.augmentations=[1]")
    assert "train.device='meta'" in train("train.device=meta")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("empty.yaml", ""),
        ("text.yaml", "hello"),
        ("syntax.py", "def x(:"),
        ("imports.py", "import no_such_module"),
        ("relative.py", "from .no_such_file import x"),
        ("raises.py", "1 / 0"),
        ("flat.yaml", "{model: 1, dataloader: 1, optimizer: 1, lr_multiplier: 1, train: 1}"),
    ],
)
def test_a_file_that_is_not_a_config_is_named(tool, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert name in tool("lazyconfig_train_net", "--config-file", tmp_path / name)


def test_the_help_shows_the_shipped_configs(repo, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(repo / "tools"))
    for name in ("lazyconfig_train_net", "train_net"):
        with pytest.raises(SystemExit) as stop:
            call_tool(repo, monkeypatch, name, "--help")
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert all(config in text for config in model_zoo.list())
        assert f"{name}.py --config-file" in text and "cfg.yaml" not in text


def test_a_json_that_is_not_coco_is_named(train, own_set):
    _, write, _ = own_set
    for content in ("{'not json", [{"image_id": 1, "bbox": [0, 0, 1, 1]}], {"images": []}):
        assert "own.json" in train(write(content))


def test_annotations_that_point_nowhere_are_named(train, own_set):
    content, write, folder = own_set
    annotation = content["annotations"][3]
    for key in ("image_id", "category_id"):
        good = annotation[key]
        annotation[key] = 999
        line = train(write(content))
        assert "own.json" in line and str(annotation["id"]) in line and "999" in line
        annotation[key] = good
    missing = folder / content["images"][2]["file_name"]
    missing.unlink()
    assert missing.name in train(write(content))


def test_a_mask_without_area_is_named_and_can_be_skipped(train, own_set):
    content, write, _ = own_set
    content["annotations"][3]["segmentation"] = [[5.0, 5.0, 9.0, 5.0, 7.0, 5.0]]
    line = train(write(content))
    assert "own.json" in line and str(content["annotations"][3]["id"]) in line
    assert "dataloader.train.dataset.invalid_annotations=skip" in line
    # With the key that it names, this fault is gone and the next one is met.
    line = train(
        write(content),
        "dataloader.train.dataset.invalid_annotations=skip",
        "train.amp.dtype=fp8",
        "train.amp.enabled=True",
    )
    assert "train.amp.dtype" in line


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named(train, own_set, num_workers):
    content, write, folder = own_set
    for image in content["images"]:
        (folder / image["file_name"]).write_bytes(b"no image")
    line = train(write(content), f"dataloader.train.num_workers={num_workers}")
    assert str(folder) in line and "skip_undecodable" in line


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_test_image_that_cannot_be_decoded_is_named(train, own_set, num_workers):
    content, write, folder = own_set
    broken = folder / content["images"][1]["file_name"]
    broken.write_bytes(b"no image")
    option = write(content).replace("dataloader.train", "dataloader.test")
    line = train(option, f"dataloader.train.num_workers={num_workers}")
    assert line.startswith(f"lazyconfig_train_net.py: error: {broken}")
    assert "worker" not in line


def test_an_image_smaller_than_a_patch_is_named(train, own_set):
    content, write, folder = own_set
    for image in content["images"]:
        pixels = cv2.imread(str(folder / image["file_name"]))
        cv2.imwrite(str(folder / image["file_name"]), pixels[:10])
        image["height"] = 10
    content["annotations"] = [
        {
            "id": i + 1,
            "image_id": image["id"],
            "category_id": 1,
            "bbox": [1, 1, 5, 5],
            "area": 25,
            "iscrowd": 0,
            "segmentation": [[1, 1, 6, 1, 6, 6, 1, 6]],
        }
        for i, image in enumerate(content["images"])
    ]
    line = train(write(content))
    assert str(folder) in line and "64x10" in line or "10x64" in line


def test_a_checkpoint_of_another_size_is_named_with_both_shapes(train, tmp_path):
    path = tmp_path / "other.pth"
    save_checkpoint({"model": ViT(64, 16, 48, 4, 2).state_dict()}, path)
    line = train(f"train.init_checkpoint={path}")
    assert str(path) in line and "'pos_embed' is (1, 17, 48)" in line and "(1, 17, 32)" in line


def test_a_checkpoint_that_lacks_a_tensor_says_how_to_go_on(train, tmp_path):
    path = tmp_path / "other.pth"
    state = ViT(64, 16, 32, 4, 2).state_dict()
    del state["blocks.1.norm1.bias"]
    save_checkpoint({"model": state | {"blocks.1.extra": torch.ones(32)}}, path)
    load = f"train.init_checkpoint={path}"
    line = train(load, flags=["--allow-unexpected", "*.extra"])
    assert "--allow-missing 'backbone.net.blocks.1.norm1.bias' keeps its initial values" in line
    line = train(load, flags=["--allow-missing", "*.norm1.bias"])
    assert "'blocks.1.extra' (32,)" in line


def test_a_device_that_is_not_there_is_named(train):
    assert "train.device='gpu'" in train("train.device=gpu")


def test_a_folder_that_cannot_be_written_is_named(train, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert f"train.output_dir={blocked}/output" in train(f"train.output_dir={blocked}/output")


def test_a_reference_that_leads_nowhere_is_named_with_its_key(train):
    line = train("train.log_period='${train.no_such_key}'")
    assert "train.log_period" in line and "no_such_key" in line


def test_an_empty_batch_is_rejected(train):
    assert "total_batch_size" in train("dataloader.train.total_batch_size=0")


def test_a_loss_that_is_not_finite_stops_with_a_checkpoint_of_the_state_before(train, tmp_path):
    line = train("train.max_iter=9", "optimizer.lr=1e30", "lr_multiplier.warmup_iters=0")
    assert "training stopped at iteration" in line and ".jpg" in line
    assert "model_before_nonfinite.pth" in line
    assert (tmp_path / "output" / "model_before_nonfinite.pth").exists()


def test_inference_names_what_it_cannot_read(tool, tmp_path, tiny_overrides):
    arguments = ["--config-file", CONFIG, "--output", tmp_path / "drawn"]
    line = tool("demo", *arguments, "--input", "nowhere.jpg", "--opts", *tiny_overrides)
    assert "nowhere.jpg" in line
    image = tmp_path / "a.jpg"
    image.write_bytes(b"no image")
    line = tool("demo", *arguments, "--input", image, "--opts", *tiny_overrides)
    assert "the model needs weights" in line


def test_tools_name_a_config_of_another_task(tool, tmp_path, tiny_overrides):
    pretraining = "demo/pretrain.py"
    out = tmp_path / "out"
    opts = ["--opts", *tiny_overrides]
    for folder in ("a", "b"):
        (tmp_path / "sets" / folder).mkdir(parents=True)
    sets = ["--train", tmp_path / "sets", "--test", tmp_path / "sets"]
    assert CONFIG in tool("knn", "--config-file", CONFIG, *sets, *opts)
    demo = ["--config-file", pretraining, "--input", tmp_path, "--output", out]
    cv2.imwrite(str(tmp_path / "image.png"), np.zeros((8, 8, 3), np.uint8))
    assert "dataloader.test.mapper" in tool("demo", *demo)
    compare = ["--config-file", pretraining, "--output", out, "--backbones"]
    assert pretraining in tool("compare_backbones", *compare, "a=")
    compare[1] = CONFIG
    for backbones in (["a=", "a="], ["="], ["a/b="]):
        assert "--backbones" in tool("compare_backbones", *compare, *backbones)


def test_a_checkpoint_is_not_converted_onto_itself(tool, tmp_path):
    path = tmp_path / "vit.pth"
    vit = ViT(embed_dim=16, depth=1, num_heads=1, img_size=32)
    save_checkpoint({"model": vit.state_dict()}, path)
    before = path.read_bytes()
    assert "vit.pth" in tool("convert_checkpoint", path, path, "--to", "timm")
    assert path.read_bytes() == before
