"""``crossmae-det analyze`` as a user starts it."""

import json
import sys

import cv2
import pytest
import torch
from detectron2.config import instantiate

from crossmae_det.__main__ import run_command
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
def run(tiny_sets, tmp_path, monkeypatch):
    def call(method, *overrides, flags=()):
        options = ["--config-file", CONFIGS[method], "--output", f"{tmp_path}/output", *flags]
        dataset = f"dataloader.train.dataset.name='{tiny_sets[0]}'"
        monkeypatch.setattr(sys, "argv", ["analyze", *options, *TINY, dataset, *overrides])
        run_command("analyze")

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


def results(tmp_path, name):
    folder = tmp_path / "output"
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.json", f"{name}.png"]
    assert cv2.imread(str(folder / f"{name}.png")).std() > 10
    return json.loads((folder / f"{name}.json").read_text())


def test_mae(run, weights, tmp_path, capsys):
    checkpoint = weights("mae")
    run("mae", checkpoint)
    content = results(tmp_path, "decoder_attention")
    # The whole training set, which has fewer images than asked for; 64 patches each.
    assert content["num_images"] == 8
    assert content["keys"] == {"visible": 16, "masked": 48, "class token": 1}
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("mean")]
    assert f"{content['relative_to_uniform']['visible']['mean']:.3f}" in line
    # The paper's unit, beside the paper's own figures.
    sums = content["per_key_summed_over_heads"]
    (line,) = [line for line in lines if line.startswith("sum")]
    here = [f"{sums[name]['sum']:.3f}" for name in ("visible", "masked")]
    assert line.split() == ["sum", *here, "1.419", "0.387"]
    assert content["checkpoint"] in checkpoint


def test_crossmae_on_other_images(run, weights, tiny_sets, tmp_path, capsys):
    folder = tiny_sets[1].rpartition(":")[2]
    run("crossmae", weights("crossmae"), flags=["--input", folder, "--num-images", "2"])
    content = results(tmp_path, "feature_usage")
    assert (content["dataset"], content["num_images"]) == (folder, 2)
    assert content["features"] == ["input", "block 0", "block 1", "block 2"]
    assert [sum(row) for row in content["contribution"]] == pytest.approx([1, 1])
    output = capsys.readouterr().out
    assert all(f"\n{name}" in output for name in content["features"])


def test_bad_input_is_a_one_line_error(run, weights, tmp_path, capsys):
    nowhere = [weights("mae"), "dataloader.train.dataset.name=nowhere"]
    for overrides, named in [([], "train.init_checkpoint"), (nowhere, "nowhere")]:
        with pytest.raises(SystemExit) as stop:
            run("mae", *overrides)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error and named in error.splitlines()[-1]
    assert not (tmp_path / "output").exists()
