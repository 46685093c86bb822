"""The analysis of decoders as a user starts it."""

import json
import os
import subprocess
import sys

import cv2
import pytest
import torch
from detectron2.config import instantiate

from crossmae_det.model_zoo import get_config
from crossmae_det.utils import save_checkpoint

CONFIGS = {
    "mae": "demo/pretrain_cifar10_mae.py",
    "crossmae": "demo/pretrain_cifar10.py",
}
TINY = [
    "model.encoder.embed_dim=24",
    "model.encoder.depth=3",
    "model.decoder_dim=16",
    "model.decoder_depth=2",
    "model.decoder_num_heads=2",
    "train.device=cpu",
]


@pytest.fixture
def run(repo, tiny_sets, tmp_path):
    def call(method, *overrides, flags=()):
        train_set, _ = tiny_sets
        return subprocess.run(
            [
                sys.executable,
                str(repo / "tools" / "analyze_decoder.py"),
                *("--config-file", CONFIGS[method]),
                *("--output", str(tmp_path / "output"), *flags),
                *("--opts", *TINY, f"dataloader.train.dataset.name='{train_set}'", *overrides),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )

    return call


@pytest.fixture
def weights(tmp_path):
    """Writes a model with random weights, as a training run leaves it."""

    def write(method):
        torch.manual_seed(0)
        model = instantiate(get_config(CONFIGS[method], TINY).model)
        save_checkpoint({"model": model.state_dict()}, tmp_path / f"{method}.pth")
        return f"train.init_checkpoint={tmp_path}/{method}.pth"

    return write


def results(process, tmp_path, name):
    assert process.returncode == 0, process.stderr
    folder = tmp_path / "output"
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.json", f"{name}.png"]
    assert cv2.imread(str(folder / f"{name}.png")).shape[1] >= 700
    return json.loads((folder / f"{name}.json").read_text())


def test_mae(run, weights, tmp_path):
    checkpoint = weights("mae")
    process = run("mae", checkpoint)
    content = results(process, tmp_path, "decoder_attention")
    # All of the training set, of which there are fewer than asked for; 64 patches each.
    assert content["num_images"] == 8
    assert content["keys"] == {"visible": 16, "masked": 48, "class token": 1}
    mean = content["relative_to_uniform"]["visible"]["mean"]
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("mean")]
    assert f"{mean:.3f}" in line
    # The paper's unit, beside the paper's own figures.
    sums = content["per_key_summed_over_heads"]
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("sum")]
    here = [f"{sums[name]['sum']:.3f}" for name in ("visible", "masked")]
    assert line.split() == ["sum", *here, "1.419", "0.387"]
    assert content["checkpoint"] in checkpoint


def test_crossmae_on_images_of_its_own(run, weights, tiny_sets, tmp_path):
    folder = tiny_sets[1].rpartition(":")[2]
    flags = ["--input", folder, "--num-images", "2"]
    process = run("crossmae", weights("crossmae"), flags=flags)
    content = results(process, tmp_path, "feature_usage")
    assert (content["dataset"], content["num_images"]) == (folder, 2)
    assert content["features"] == ["input", "block 0", "block 1", "block 2"]
    assert [sum(row) for row in content["contribution"]] == pytest.approx([1, 1])
    assert all(f"\n{name}" in process.stdout for name in content["features"])


def test_bad_input_is_told_in_one_line(run, weights, tmp_path):
    nowhere = [weights("mae"), "dataloader.train.dataset.name=nowhere"]
    for overrides, message in [
        ([], "needs weights: add train.init_checkpoint=PATH"),
        (nowhere, "nowhere: no such folder"),
    ]:
        process = run("mae", *overrides)
        assert process.returncode == 2
        assert "Traceback" not in process.stderr
        assert message in process.stderr.splitlines()[-1]
    assert not (tmp_path / "output").exists()
