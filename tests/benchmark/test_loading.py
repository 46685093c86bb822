"""Timing of the loading pipelines."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from crossmae_det.benchmark import Spread, loading
from crossmae_det.benchmark.loading import TorchvisionCrops, crop_loading, time_crops
from crossmae_det.pretraining import find_images
from crossmae_det.pretraining.crops import RandomCrops


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(5):
        pixels = rng.integers(0, 256, (30, 40, 3) if index else (30, 40), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.jpg")
    return find_images(str(tmp_path))


def test_pipelines_crop_the_same_images_alternately_on_one_thread(images, monkeypatch):
    monkeypatch.setattr(loading, "CROP_IMAGES", 3)
    calls = []

    def pipeline(name):
        def crop(image, seed_sequence):
            calls.append((name, str(image)[-5:], tuple(seed_sequence)))
            assert torch.get_num_threads() == cv2.getNumThreads() == 1

        return crop

    threads = torch.get_num_threads(), cv2.getNumThreads()
    rates = time_crops(images, [pipeline("ours"), pipeline("usual")], repeats=1)
    assert (torch.get_num_threads(), cv2.getNumThreads()) == threads
    assert [call[0] for call in calls] == (["ours"] * 3 + ["usual"] * 3) * 2
    assert [call[1] for call in calls] == ["0.jpg", "2.jpg", "4.jpg"] * 4
    # Each pass makes different crops.
    assert [call[2] for call in calls if call[0] == "ours"] == [(i,) for i in range(6)]
    assert [call[2] for call in calls if call[0] == "usual"] == [(i,) for i in range(6)]
    assert [len(rate) for rate in rates] == [1, 1] and min(rates) > [0]


def test_pipelines_return_crops_of_the_same_size(images):
    for image in images[0], images[1]:
        usual = TorchvisionCrops(16)(image, (0,))
        assert usual.shape == RandomCrops(16)(image, (0,)).shape == (3, 16, 16)
        assert usual.dtype == torch.float32 and usual.min() < 0 < usual.max()


def test_the_table_of_rates(images, monkeypatch):
    rates = [90.0, 60.0, 80.0], [30.0, 20.0, 20.0]
    monkeypatch.setattr(loading, "time_crops", lambda *_: rates)
    section = crop_loading("photos", images, 224, 3)
    assert section.values["ratio"] == Spread(3, 3, 4)
    assert section.rows == [
        ["torchvision", "20.0 (20.0 to 30.0)", "-"],
        ["crossmae_det", "80.0 (60.0 to 90.0)", "3.000 (3.000 to 4.000)"],
    ]
