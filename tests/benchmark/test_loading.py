import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from crossmae_det.benchmark import UsualCrops, loading, loading_section, time_loading
from crossmae_det.benchmark.loading import LoadingRates
from crossmae_det.pretraining import find_images
from crossmae_det.pretraining.crops import RandomCrops


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(5):
        pixels = rng.integers(0, 256, (30, 40, 3) if index else (30, 40), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.jpg")
    return find_images(str(tmp_path))


def test_both_go_through_the_same_images_in_turns_on_one_thread(images, monkeypatch):
    monkeypatch.setattr(loading, "IMAGES", 3)
    calls = []

    def pipeline(name):
        def crop(image, seed_sequence):
            calls.append((name, str(image)[-5:], tuple(seed_sequence)))
            assert torch.get_num_threads() == cv2.getNumThreads() == 1

        return crop

    threads = torch.get_num_threads(), cv2.getNumThreads()
    rates = time_loading(images, pipeline("ours"), pipeline("usual"), repeats=1)
    assert (torch.get_num_threads(), cv2.getNumThreads()) == threads
    names = ["0.jpg", "2.jpg", "4.jpg"]
    assert [call[0] for call in calls] == (["ours"] * 3 + ["usual"] * 3) * 2
    assert [call[1] for call in calls] == names * 4
    # Other crops each time.
    assert [call[2] for call in calls if call[0] == "ours"] == [(i,) for i in range(6)]
    assert [call[2] for call in calls if call[0] == "usual"] == [(i,) for i in range(6)]
    assert rates.images == 3
    assert len(rates.ours) == len(rates.usual) == 1 and min(rates.ours + rates.usual) > 0


def test_the_pipelines_make_crops_of_one_size(images):
    for image in images[0], images[1]:
        usual = UsualCrops(16)(image, (0,))
        assert usual.shape == RandomCrops(16)(image, (0,)).shape == (3, 16, 16)
        assert usual.dtype == torch.float32 and usual.min() < 0 < usual.max()


def test_the_table_of_rates():
    rates = LoadingRates(256, ours=[90.0, 60.0, 80.0], usual=[30.0, 20.0, 20.0])
    section = loading_section(rates, "photos", 224)
    assert section.values["ratio"] == {"median": 3, "low": 3, "high": 4}
    assert section.rows == [
        ["usual", "20.0 (20.0 to 30.0)", "1"],
        ["crossmae_det", "80.0 (60.0 to 90.0)", "3.000 (3.000 to 4.000)"],
    ]
    assert "256 images of photos" in section.notes[0]
