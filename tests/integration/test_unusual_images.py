"""Unusual and undecodable image files in every task."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import cv2
import numpy as np
import pytest
from image_files import encode, photo
from PIL import Image
from shorthand import one_line
from tool_calls import call_tool

from crossmae_det.engine import run
from crossmae_det.model_zoo import get_config
from crossmae_det.utils.image_reading import UndecodableImageError

CONFIG = "coco/mask_rcnn_crossmae_vit_b_100ep.py"
NEW = Namespace(eval_only=False, resume=False)
# A PNG without its last third, and a file of 0 bytes: disks that were full leave such files.
PNG = encode(photo(64, 64))
BAD = {"truncated": PNG[: 2 * len(PNG) // 3], "empty": b""}


def test_a_one_channel_model_trains_evaluates_and_predicts(
    repo, monkeypatch, capsys, tiny_overrides, tmp_path
):
    options = ["train.max_iter=1", "model.input_format=L", "model.pixel_mean=[118.0]"]
    run(get_config(CONFIG, [*tiny_overrides, *options, "model.pixel_std=[58.0]"]), NEW)
    output = tmp_path / "output"
    results = json.loads((output / "inference" / "results.json").read_text())["results"]
    assert {"bbox", "segm"} == results.keys()
    assert cv2.imread(str(output / "predictions.png")).std() > 10  # drawn in color

    # Files that cannot be decoded do not stop the others.
    folder = tmp_path / "in"
    (folder / "deeper").mkdir(parents=True)
    color = photo(64, 80)
    (folder / "color.jpg").write_bytes(encode(color, "JPEG"))
    (folder / "deeper" / "color.jpg").write_bytes(encode(color[::-1].copy(), "JPEG"))
    gray = np.asarray(Image.fromarray(color).convert("L")).astype(np.uint16) * 257
    Image.fromarray(gray).save(folder / "deep.tif")
    (folder / "thin.png").write_bytes(encode(np.full((16, 3300), 90, np.uint8)))
    for name, content in BAD.items():
        (folder / f"a {name}.png").write_bytes(content)
    (folder / "deeper" / "z.mp4").write_bytes(b"no video")
    arguments = ["--config-file", output / "config.yaml", "--input", folder]
    arguments += ["--output", folder / "drawn", "--score-threshold", "0.99"]
    weights = f"train.init_checkpoint={output}/model_final.pth"
    for _ in range(2):  # the second time, the output is below the input
        with pytest.raises(SystemExit) as stop:
            call_tool(repo, monkeypatch, "demo", *arguments, "--opts", weights)
        assert stop.value.code == 1
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        bad = ["a truncated.png", "a empty.png", "deeper/z.mp4"]
        assert all(f"{folder}/{name}" in captured.out for name in bad)
        assert "3 of 7 files" in captured.out
        drawn = folder / "drawn"
        names = sorted(str(p.relative_to(drawn)) for p in drawn.rglob("*.*") if p.is_file())
        expected = ["color.jpg", "deep.tif", "deeper/color.jpg", "images.json"]
        assert names == [*expected, "predictions.json", "thin.png"]
        listed = json.loads((drawn / "images.json").read_text())["images"]
        assert [Path(image["file_name"]).name for image in listed] == [
            *("color.jpg", "deep.tif", "thin.png", "color.jpg")
        ]
    assert cv2.imread(str(drawn / "color.jpg")).std(axis=2).mean() > 5  # in color


def test_a_wrong_number_of_channels_is_an_error(tiny_overrides):
    options = ["train.max_iter=1", "model.backbone.net.in_chans=1"]
    with pytest.raises(ValueError, match="images of 3 channels .* takes 1") as error:
        run(get_config(CONFIG, [*tiny_overrides, *options]), NEW)
    one_line(error)


@pytest.fixture
def damaged(tiny_sets, tmp_path):
    """A copy of the training set in which a part of the images is bad: json:folder, bad files."""
    json_file, _, images = tiny_sets[0].rpartition(":")
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    bad = sorted(folder.iterdir())[1:4:2]
    for path, content in zip(bad, BAD.values(), strict=True):
        path.write_bytes(content)
    return f"{json_file}:{folder}", bad


TINY_PRETRAINING = [
    *("dataloader.image_size=64", "model.encoder.embed_dim=32", "model.encoder.depth=2"),
    *("model.encoder.num_heads=2", "model.decoder_dim=16", "model.decoder_depth=1"),
    *("model.decoder_num_heads=2", "train.device=cpu", "train.amp.enabled=False"),
    *("dataloader.train.total_batch_size=8", "dataloader.train.num_workers=0"),
]


@pytest.mark.parametrize("task", ["pretraining", "detection"])
def test_bad_images_stop_training_or_are_skipped(task, damaged, tiny_overrides, tmp_path):
    dataset, bad = damaged
    if task == "detection":
        config = CONFIG
        options = [*tiny_overrides, "dataloader.train.total_batch_size=8", "train.eval_period=0"]
        options.append(f"dataloader.train.dataset.names='{dataset}'")
    else:
        config = "pretraining/crossmae_vit_b_800ep.py"
        options = [*TINY_PRETRAINING, f"dataloader.train.dataset.name='{dataset}'"]
    options += ["train.max_iter=2", "train.visualizer=null"]

    def train(name, skip):
        more = [f"dataloader.train.skip_undecodable={skip}", f"train.output_dir={tmp_path}/{name}"]
        run(get_config(config, [*options, *more]), NEW)

    with pytest.raises(UndecodableImageError) as error:
        train("strict", False)
    line = one_line(error)
    assert any(line.startswith(f"{path}: ") for path in bad)
    assert "dataloader.train.skip_undecodable=True" in line
    train("lenient", True)
    assert (tmp_path / "lenient" / "model_final.pth").exists()
    log = (tmp_path / "lenient" / "log.txt").read_text()
    assert all(str(path) in log for path in bad) and "2 images so far" in log
    if task == "pretraining":  # the summary of what was found; the truncated file has a header
        summary = next(line for line in log.splitlines() if "8 images" in line)
        assert "8 jpg" in summary and "64x64" in summary and "1 of 8" in summary


def test_knn_names_bad_images_or_skips_them(repo, monkeypatch, capsys, tmp_path):
    for split in ("train", "val"):
        for name, level in (("dark", 40), ("light", 200)):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(3):
                pixels = np.full((32, 32, 3), level + index, np.uint8)
                (tmp_path / split / name / f"{index}.png").write_bytes(encode(pixels))
    bad = tmp_path / "train" / "dark" / "1.png"
    bad.write_bytes(BAD["truncated"])
    arguments = ["--config-file", "demo/pretrain_cifar10.py", "--neighbors", "1"]
    arguments += ["--train", tmp_path / "train", "--test", tmp_path / "val"]
    options = ["--opts", "model.encoder.embed_dim=24", "model.encoder.depth=1", "train.device=cpu"]
    with pytest.raises(SystemExit) as stop:
        call_tool(repo, monkeypatch, "knn", *arguments, *options)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and "Traceback" not in captured.err
    assert captured.err.strip().splitlines()[-1].startswith(f"knn.py: error: {bad}: ")
    call_tool(repo, monkeypatch, "knn", *arguments, "--skip-undecodable", *options)
    out = capsys.readouterr().out
    assert "100.00 % on 6 images" in out and "5 training images" in out
    assert str(bad) in out and "1 of 6 images" in out
    assert "6 images (6 png) of 2 classes" in out and "32x32" in out
