"""``crossmae-det knn`` as a user starts it."""

import sys

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import Image

from crossmae_det.__main__ import run_command
from crossmae_det.model_zoo import get_config
from crossmae_det.utils import save_checkpoint

CONFIG = "demo/pretrain_cifar10.py"
TINY = ["model.encoder.embed_dim=24", "model.encoder.depth=2", "train.device=cpu"]


@pytest.fixture
def knn(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, color in (("dark", 60), ("light", 190)):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(5):
                pixels = rng.normal(color, 20, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.jpg")

    def call(*overrides, train="train"):
        # Fewer images than the default number of neighbors.
        folders = ["--train", f"{tmp_path}/{train}", "--test", f"{tmp_path}/val"]
        arguments = ["--config-file", CONFIG, *folders, "--neighbors", "3", *TINY, *overrides]
        monkeypatch.setattr(sys, "argv", ["knn.py", *arguments])
        run_command("knn")

    return call


def test_knn_of_a_checkpoint(knn, tmp_path, capsys):
    torch.manual_seed(1)
    model = instantiate(get_config(CONFIG, [*TINY, "dataloader.train.dataset.name=x"]).model)
    save_checkpoint({"model": model.state_dict()}, tmp_path / "model.pth")
    knn(f"train.init_checkpoint={tmp_path}/model.pth")
    output = capsys.readouterr().out
    last = output.strip().splitlines()[-1]
    assert all(text in last for text in ("100.00 %", "10 images", "2 classes", "model.pth"))
    assert "dropped" in output  # the decoder


def test_a_folder_without_classes_is_an_error(knn, capsys):
    with pytest.raises(SystemExit) as stop:
        knn(train="nowhere")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "nowhere" in error.strip().splitlines()[-1] and "Traceback" not in error
