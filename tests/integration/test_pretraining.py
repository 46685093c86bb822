"""From images to a detector as a user goes: pretrain, kill, resume, visualize, fine-tune."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace

import cv2
import pytest
import torch
from detectron2.config import instantiate
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crossmae_det.__main__ import run_command
from crossmae_det.checkpoint import read_checkpoint
from crossmae_det.engine import run
from crossmae_det.model_zoo import get_config
from crossmae_det.utils import save_checkpoint

TINY_MODEL = [
    "dataloader.image_size=64",  # 16 patches
    "model.encoder.embed_dim=32",
    "model.encoder.depth=4",
    "model.encoder.num_heads=2",
    "model.decoder_dim=16",
    "model.decoder_depth=2",
    "model.decoder_num_heads=2",
    "train.device=cpu",
    "train.amp.enabled=False",
]
TRAIN = Namespace(eval_only=False, resume=False)


@pytest.fixture
def options(tiny_sets, tmp_path):
    return [
        *TINY_MODEL,
        f"dataloader.train.dataset.name='{tiny_sets[0]}'",
        "dataloader.train.total_batch_size=4",
        "dataloader.train.num_workers=0",
        "optimizer.lr=0.01",
        "train.max_iter=6",
        "train.checkpointer.period=2",
        f"train.output_dir={tmp_path}/output",
    ]


def command(repo, tool, *arguments):
    return [sys.executable, str(repo / "tools" / tool), *map(str, arguments)]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def call(repo, tool, *arguments):
    return subprocess.run(
        command(repo, tool, *arguments), env=ENVIRONMENT, capture_output=True, text=True
    )


def error_line(process):
    """The one line that rejects an input."""
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stdout + process.stderr
    return process.stderr.strip().splitlines()[-1]


def test_pretraining_draws_reconstructions_and_starts_detectors(
    repo, options, tiny_overrides, tmp_path
):
    run(get_config("pretraining/crossmae_vit_b_800ep.py", options), TRAIN)
    output = tmp_path / "output"
    checkpoint = f"train.init_checkpoint={output}/model_final.pth"
    drawings = sorted(path.name for path in (output / "reconstructions").iterdir())
    assert drawings == ["0000002.png", "0000004.png", "0000006.png"]
    first, last = (cv2.imread(str(output / "reconstructions" / drawings[i])) for i in (0, -1))
    assert first.shape == last.shape and (first != last).any()
    events = EventAccumulator(str(output)).Reload()
    assert [event.step for event in events.Images("reconstructions")] == [1, 3, 5]
    assert "reconstruction_psnr" in events.Tags()["scalars"]

    images = options[len(TINY_MODEL)].partition("=")[2].strip("'").rpartition(":")[2]
    one = sorted(os.listdir(images))[0]
    process = call(
        *(repo, "visualize_reconstruction.py", "--config-file", output / "config.yaml"),
        *("--input", f"{images}/{one}", images, "--num-images", "2"),
        *("--output", tmp_path / "look.png", "--opts", checkpoint),
    )
    assert process.returncode == 0, process.stderr
    rows = [line.split() for line in process.stdout.splitlines() if line.startswith(images)]
    assert [os.path.basename(name) for name, _ in rows] == [
        one,
        one,
        sorted(os.listdir(images))[-1],
    ]
    assert all(0 < float(psnr) < 60 for _, psnr in rows)
    assert cv2.imread(str(tmp_path / "look.png")).std() > 10

    # The encoder goes into a detector of another image size and without a class token.
    encoder = read_checkpoint(output / "model_final.pth")["model"]
    for override in ("train.init_checkpoint=", checkpoint):
        cfg = get_config(
            "coco/mask_rcnn_crossmae_vit_b_100ep.py",
            [
                *tiny_overrides,
                "dataloader.image_size=96",
                "train.max_iter=1",
                "train.eval_period=0",
                "train.visualizer=null",
                "optimizer.lr=1e-9",
                f"train.output_dir={tmp_path}/detector",
                override,
            ],
        )
        run(cfg, Namespace(eval_only=False, resume=False, overwrite=True))
        detector = read_checkpoint(tmp_path / "detector" / "model_final.pth")["model"]
        name = "blocks.3.mlp.fc2.weight"
        same = torch.allclose(
            detector[f"backbone.net.{name}"], encoder[f"encoder.{name}"], atol=1e-6
        )
        assert same == (override == checkpoint)
    log = (tmp_path / "detector" / "log.txt").read_text()
    assert all(f"\n{word} " in log for word in ("loaded", "resampled", "initialized", "dropped"))


def test_killed_pretraining_resumes_to_the_same_bits(repo, options, tmp_path):
    arguments = ["--config-file", "pretraining/mae_vit_b_800ep.py", "--resume", *options]
    run(get_config(arguments[1], options), TRAIN)
    killed = [*arguments, f"train.output_dir={tmp_path}/killed", "dataloader.train.num_workers=1"]
    process = subprocess.Popen(
        command(repo, "lazyconfig_train_net.py", *killed),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    tag = tmp_path / "killed" / "last_checkpoint"
    while process.poll() is None and not tag.exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = call(repo, "lazyconfig_train_net.py", *killed)
    assert resumed.returncode == 0, resumed.stderr
    assert "Resumed from" in resumed.stdout
    first, second = (
        read_checkpoint(tmp_path / name / "model_final.pth")["model"]
        for name in ("output", "killed")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_full_disk_leaves_the_last_good_checkpoint(repo, options, tmp_path):
    run(get_config("pretraining/crossmae_vit_b_800ep.py", options), TRAIN)
    good = (tmp_path / "output" / "model_final.pth").read_bytes()
    # Every write to /dev/full fails as on a full disk.
    program = (
        "import sys, os, torch\n"
        "save = torch.save\n"
        "def full(data, path): save(data, '/dev/full')\n"
        "torch.save = full\n"
        "from crossmae_det.__main__ import run_command\n"
        "run_command('train')\n"
    )
    arguments = ["--resume", "--config-file", "pretraining/crossmae_vit_b_800ep.py"]
    longer = [*options, "train.max_iter=10"]
    process = subprocess.run(
        [sys.executable, "-c", program, *arguments, *longer],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    line = error_line(process)
    assert "cannot write the checkpoint" in line and "model_0000007.pth" in line
    assert (tmp_path / "output" / "model_final.pth").read_bytes() == good
    assert (tmp_path / "output" / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataloader.train.dataset.name={}/empty"], "empty: "),
        (["dataloader.train.dataset.name={}/broken"], "jpg: none of 10 images"),
        (["model.mask_ratio=1.0"], "mask_ratio"),
        (["model.mask_ratio=0.98"], "mask_ratio 0.98"),
        (["model.prediction_ratio=0.8"], "got 0.8"),
        (["model.prediction_ratio=0"], "prediction_ratio"),
        (["model.decoder_dim=18"], "decoder_dim 18"),
        (["train.output_dir={}/file/output"], "file"),
    ],
)
def test_bad_input_is_a_one_line_error(
    options, tmp_path, monkeypatch, capsys, repo, overrides, message
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for index in range(3):
        (tmp_path / "broken" / f"{index}.jpg").write_bytes(b"no image")
    (tmp_path / "file").write_text("in the way")
    heads = "model.decoder_num_heads=4"
    arguments = [*options, heads, "train.visualizer=null", *(o.format(tmp_path) for o in overrides)]
    config = ["--config-file", "pretraining/crossmae_vit_b_800ep.py"]
    monkeypatch.setattr(sys, "argv", ["lazyconfig_train_net.py", *config, *arguments])
    with pytest.raises(SystemExit) as stop:
        run_command("train")
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert "Traceback" not in captured.out + captured.err
    assert message in captured.err.strip().splitlines()[-1]


def test_reconstruction_needs_a_decoder(repo, options, tmp_path):
    cfg = get_config("pretraining/crossmae_vit_b_800ep.py", options)
    encoder = instantiate(cfg.model).encoder
    save_checkpoint({"model": encoder.state_dict()}, tmp_path / "encoder.pth")
    process = call(
        *(repo, "visualize_reconstruction.py", "--output", tmp_path / "look.png"),
        *("--config-file", "pretraining/crossmae_vit_b_800ep.py", "--input", "nowhere"),
        *("--opts", *options, f"train.init_checkpoint={tmp_path}/encoder.pth"),
    )
    assert "'decoder.mask_token' (1, 1, 16)" in error_line(process)
    assert not (tmp_path / "look.png").exists()


def test_a_sharded_model_trains_as_a_whole_one_and_either_resumes_the_other(
    repo, options, tiny_sets, tmp_path
):
    arguments = [
        *("--num-gpus", "2", "--dist-url", "auto"),
        *("--config-file", "pretraining/crossmae_vit_b_800ep.py", "--resume", *options),
        # The large epsilon keeps Adam from making steps of rounding errors.
        *(
            "optimizer.eps=0.001",
            "train.gradient_accumulation_steps=2",
            "train.clip_grad.enabled=True",
        ),
        # Three batches that are held out, for two processes.
        *(f"dataloader.validation.dataset.name='{tiny_sets[1]}'", "train.log_period=1"),
        "dataloader.validation.batch_size=1",
    ]
    process = call(repo, "lazyconfig_train_net.py", *arguments)
    assert process.returncode == 0, process.stderr
    # The second run continues the first one's from the middle.
    shutil.copytree(tmp_path / "output", tmp_path / "parts")
    (tmp_path / "parts" / "model_final.pth").unlink()
    (tmp_path / "parts" / "last_checkpoint").write_text("model_0000003.pth")
    parts = ["train.fsdp.enabled=True", f"train.output_dir={tmp_path}/parts"]
    process = call(repo, "lazyconfig_train_net.py", *arguments, *parts)
    assert process.returncode == 0, process.stderr
    assert "Starting training from iteration 4" in process.stdout
    here, whole = map(int, re.search(r"(\d+) of (\d+) parameters", process.stdout).groups())
    assert 0.45 * whole < here < 0.55 * whole

    expected, got = (
        read_checkpoint(tmp_path / name / "model_final.pth") for name in ("output", "parts")
    )
    torch.testing.assert_close(got["model"], expected["model"], rtol=1e-5, atol=1e-5)
    states = [checkpoint["trainer"]["optimizer"]["state"] for checkpoint in (got, expected)]
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "parts" / "reconstructions" / "0000006.png").exists()
    lines = [(tmp_path / n / "metrics.json").read_text().splitlines() for n in ("output", "parts")]
    losses = [
        {
            m["iteration"]: m["val/total_loss"]
            for m in map(json.loads, part)
            if "val/total_loss" in m
        }
        for part in lines
    ]
    assert losses[0].keys() == losses[1].keys() == {1, 3, 5}
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (tmp_path / "parts" / "model_best.pth").exists()
    # The two iterations moved the weights by far more than that.
    earlier = read_checkpoint(tmp_path / "output" / "model_0000003.pth")["model"]
    name = "encoder.blocks.0.mlp.fc1.weight"
    assert (earlier[name] - got["model"][name]).abs().max() > 1e-3


def test_an_error_of_all_processes_is_printed_once(repo, options):
    process = call(
        *(repo, "lazyconfig_train_net.py", "--num-gpus", "2", "--dist-url", "auto"),
        *("--config-file", "pretraining/crossmae_vit_b_800ep.py", *options),
        "dataloader.train.total_batch_size=3",
    )
    assert "total_batch_size=3" in error_line(process)
    assert len(process.stderr.strip().splitlines()) == 1


def test_what_a_sharded_model_cannot_do_is_rejected(options, tiny_overrides):
    for config, overrides, message in [
        ("pretraining/crossmae_vit_b_800ep.py", [*options, "train.ema.enabled=True"], "train.ema"),
        ("coco/mask_rcnn_crossmae_vit_b_100ep.py", tiny_overrides, "jobs without evaluation"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(get_config(config, [*overrides, "train.fsdp.enabled=True"]), TRAIN)
