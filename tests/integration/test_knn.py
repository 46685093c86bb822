"""k-NN of a backbone as a user starts it."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import Image

from crossmae_det.model_zoo import get_config
from crossmae_det.utils import save_checkpoint

CONFIG = "demo/pretrain_cifar10.py"
TINY = ["model.encoder.embed_dim=24", "model.encoder.depth=2", "train.device=cpu"]


@pytest.fixture
def knn(repo, tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, color in (("dark", 60), ("light", 190)):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(5):
                pixels = rng.normal(color, 20, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.jpg")

    def call(*overrides, train="train"):
        # Fewer images, so that the default number of neighbors is too many.
        folders = ["--train", tmp_path / train, "--test", tmp_path / "val", "--neighbors", "3"]
        command = [sys.executable, repo / "tools" / "knn.py", "--config-file", CONFIG, *folders]
        return subprocess.run(
            [*map(str, command), "--opts", *TINY, *overrides],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )

    return call


def test_knn_of_a_checkpoint(knn, tmp_path):
    torch.manual_seed(1)
    model = instantiate(get_config(CONFIG, [*TINY, "dataloader.train.dataset.name=x"]).model)
    save_checkpoint({"model": model.state_dict()}, tmp_path / "model.pth")
    process = knn(f"train.init_checkpoint={tmp_path}/model.pth")
    assert process.returncode == 0, process.stderr
    last = process.stdout.strip().splitlines()[-1]
    assert last.startswith("k-NN accuracy 100.00 % on 10 images of 2 classes (k = 3, 10 training")
    assert last.endswith(f"{tmp_path}/model.pth)")
    assert "dropped" in process.stdout  # the decoder


def test_knn_refuses_what_has_no_classes(knn):
    process = knn(train="nowhere")
    assert process.returncode == 2
    assert "nowhere" in process.stderr.strip().splitlines()[-1]
    assert "Traceback" not in process.stderr
