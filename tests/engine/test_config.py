"""Configs that are resolved, checked and saved: still configs, with and without their data."""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from detectron2.config import instantiate

from crossmae_det.engine.config import is_run_of, log_data, resolve, save
from crossmae_det.model_zoo import get_config
from crossmae_det.pretraining import find_images

B_100 = "coco/mask_rcnn_crossmae_vit_b_100ep.py"
NEW_RUN = Namespace(eval_only=False, resume=False)


@pytest.fixture
def own_sets(tiny_sets, tmp_path):
    """Writable copies of the two sets: their specs, and a function that edits their JSON files."""
    specs = {}
    for split, spec in zip(("train", "val"), tiny_sets, strict=True):
        json_file, _, images = spec.rpartition(":")
        shutil.copy(json_file, tmp_path / f"{split}.json")
        specs[split] = f"{tmp_path}/{split}.json:{images}"

    def change(split, edit):
        path = tmp_path / f"{split}.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    return specs, change


def with_one_class_more(content):
    content["categories"].append({"id": 77, "name": "spiral"})


@pytest.fixture
def saved(own_sets, tiny_overrides, tmp_path):
    """The config.yaml of a run on the two sets, their specs, and the function that edits them."""
    specs, change = own_sets
    options = [
        f"dataloader.{s}.dataset.names={specs[n]}" for s, n in (("train", "train"), ("test", "val"))
    ]
    cfg = get_config(B_100, [*tiny_overrides, *options, "train.epochs=2"])
    path = tmp_path / "config.yaml"
    save(cfg, resolve(cfg), path)
    return str(path), specs, change


def test_a_saved_config_follows_overrides(saved):
    path, _, _ = saved
    assert resolve(get_config(path)).train.max_iter == 8  # 2 epochs x 8 images / 2
    cfg = resolve(get_config(path, ["train.epochs=4"]))
    assert cfg.train.max_iter == cfg.lr_multiplier.max_iter == 16
    cfg = resolve(get_config(path, ["dataloader.train.total_batch_size=4"]))
    assert cfg.train.max_iter == 4
    assert cfg.optimizer.lr == pytest.approx(1e-4 * 4 / 64)
    cfg = resolve(get_config(path, ["dataloader.train.dataset.max_images=2", "train.epochs=3"]))
    assert cfg.train.max_iter == 3
    cfg = resolve(get_config(path, ["train.max_iter=700", "dataloader.image_size=128"]))
    assert cfg.lr_multiplier.max_iter == 700
    assert cfg.model.backbone.square_pad == 128


def test_a_saved_config_follows_the_data(saved, caplog):
    path, _, change = saved
    change("train", with_one_class_more)
    change("val", with_one_class_more)
    cfg = get_config(path)
    resolved = resolve(cfg)
    assert resolved.model.roi_heads.num_classes == 7
    with caplog.at_level("WARNING", "crossmae_det"):
        log_data(cfg, resolved, training=True)
    assert "categories was 6" in caplog.text and "is 7" in caplog.text and "spiral" in caplog.text


def test_a_saved_config_works_without_its_data(saved, tmp_path):
    path, specs, _ = saved
    before = resolve(get_config(path))
    for split in specs:
        (tmp_path / f"{split}.json").unlink()
    cfg = get_config(path)
    resolved = resolve(cfg)
    assert resolved == before
    assert instantiate(cfg.model).roi_heads.num_classes == 6
    assert resolve(get_config(path, ["train.epochs=4"])).train.max_iter == 16


def test_a_run_is_identified_by_its_config_data_and_initial_weights(saved, tmp_path):
    path, _, change = saved
    start = tmp_path / "start.pth"
    start.write_bytes(b"weights")
    options = [f"train.init_checkpoint={start}"]
    cfg = get_config(path, options)
    assert not is_run_of(tmp_path, cfg)
    os.utime(start, (0, 0))
    save(cfg, resolve(cfg), path)
    assert is_run_of(tmp_path, cfg)
    assert not is_run_of(tmp_path, get_config(path, [*options, "optimizer.lr=0.01"]))
    assert not is_run_of(tmp_path / "elsewhere", cfg)
    os.utime(start)  # newer than the run
    assert not is_run_of(tmp_path, cfg)
    os.utime(start, (0, 0))
    change("train", with_one_class_more)
    change("val", with_one_class_more)
    assert not is_run_of(tmp_path, cfg)


def test_lazyconfig_itself_reads_a_saved_config(saved):
    path, _, _ = saved
    program = (
        "import crossmae_det; from detectron2.config import LazyConfig; "
        f"print(LazyConfig.load({path!r}).model.roi_heads.num_classes)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "6\n", result.stderr


def test_a_saved_pretraining_config_follows_overrides_and_its_record(tmp_path, tiny_sets):
    images = tmp_path / "images"
    shutil.copytree(tiny_sets[0].rpartition(":")[2], images)
    options = [f"dataloader.train.dataset.name={images}", "dataloader.train.total_batch_size=2"]
    cfg = get_config("pretraining/crossmae_vit_s_800ep.py", [*options, "train.epochs=2"])
    path = tmp_path / "config.yaml"
    save(cfg, resolve(cfg), path)
    sorted(images.iterdir())[0].unlink()
    find_images.cache_clear()
    assert resolve(get_config(str(path), ["train.epochs=4"])).train.max_iter == 14
    shutil.rmtree(images)
    find_images.cache_clear()
    assert resolve(get_config(str(path))).train.max_iter == 8


def test_iterations_count_the_images_that_are_used(own_sets, tiny_overrides):
    specs, change = own_sets

    def empty_half(content):
        kept = {image["id"] for image in content["images"][:4]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]

    change("train", empty_half)
    options = [
        *tiny_overrides,
        f"dataloader.train.dataset.names={specs['train']}",
        "train.epochs=3",
    ]
    assert resolve(get_config(B_100, options)).train.max_iter == 6  # 3 x 4 images / 2
    every = "dataloader.train.dataset.filter_empty=False"
    assert resolve(get_config(B_100, [*options, every])).train.max_iter == 12
    two = "dataloader.train.dataset.max_images=2"
    assert resolve(get_config(B_100, [*options, two])).train.max_iter == 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs=-1", "train.epochs"),
        ("train.epochs=0", "train.epochs"),
        ("dataloader.train.total_batch_size=0", "total_batch_size"),
        ("dataloader.train.total_batch_size=2.5", "total_batch_size"),
        ("dataloader.train.num_workers=-1", "num_workers"),
        ("train.max_iter=0", "train.max_iter"),
        ("train.max_iter=null", "train.max_iter"),
        ("train.log_period=0", "train.log_period"),
        ("train.checkpointer.period=0", "train.checkpointer.period"),
        ("train.seed=-1", "train.seed"),
        ("optimizer.lr=-1", "optimizer.lr"),
        ("optimizer.lr=inf", "optimizer.lr"),
        ("train.seed=9999999999", "train.seed"),
        ("train.early_stopping.patience=0", "train.early_stopping.patience"),
        ("lr_multiplier.warmup_iters=-1", "lr_multiplier.warmup_iters"),
        ("dataloader.image_size=0", "dataloader.image_size"),
    ],
)
def test_values_out_of_range_are_rejected(override, words, tiny_overrides):
    with pytest.raises(Exception) as error:
        resolve(get_config(B_100, [*tiny_overrides, override]))
    assert words in str(error.value)


def test_a_whole_float_counts_as_its_integer(tiny_overrides):
    cfg = resolve(get_config(B_100, [*tiny_overrides, "train.max_iter=1e3"]))
    assert cfg.train.max_iter == 1000 and isinstance(cfg.train.max_iter, int)


def test_missing_keys_of_a_config_are_named(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("model = dict(a=1)\n")
    with pytest.raises(ValueError, match="dataloader, optimizer, lr_multiplier, train"):
        resolve(get_config(str(path)))


def test_each_config_has_its_own_output_folder(tmp_path):
    names = ["pretraining/crossmae_vit_b_800ep", B_100[:-3], "demo/mask_rcnn", "demo/pretrain"]
    folders = [get_config(f"{name}.py").train.output_dir for name in names]
    assert len(set(folders)) == len(folders)
    assert folders[1] == "output/mask_rcnn_crossmae_vit_b_100ep"
    mine = tmp_path / "mine.py"
    source = Path(__file__).parents[2] / "configs" / B_100
    mine.write_text(
        f"from crossmae_det.model_zoo import get_config\n_cfg = get_config({str(source)!r})\n"
        "model, dataloader, train = _cfg.model, _cfg.dataloader, _cfg.train\n"
        "optimizer, lr_multiplier = _cfg.optimizer, _cfg.lr_multiplier\n"
    )
    assert get_config(str(mine)).train.output_dir == folders[1]  # set in the config it loads
    assert get_config(B_100, ["train.output_dir=here"]).train.output_dir == "here"


def test_a_number_of_classes_other_than_that_of_the_data_is_rejected(tiny_overrides):
    for number in (5, 9):
        cfg = get_config(B_100, [*tiny_overrides, f"model.roi_heads.num_classes={number}"])
        with pytest.raises(ValueError, match=r"model.roi_heads.num_classes=.* 6 \(ellipse"):
            resolve(cfg)
