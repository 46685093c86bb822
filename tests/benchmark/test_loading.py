"""Timing of the loading pipelines."""

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from image_files import encode, photo
from PIL import Image

from crossmae_det.benchmark import Spread, loading
from crossmae_det.benchmark.loading import (
    TorchvisionCrops,
    crop_loading,
    psnr,
    similarities,
    time_crops,
    time_mappers,
    usual_mapper,
)
from crossmae_det.detection import DetectionMapper
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
    assert [row[:3] for row in section.rows] == [
        ["torchvision", "20.0 (20.0 to 30.0)", "-"],
        ["crossmae_det", "80.0 (60.0 to 90.0)", "3.000 (3.000 to 4.000)"],
    ]
    assert section.values["psnr"].low > 40  # the same boxes and flips as Pillow's


@pytest.fixture
def records(tmp_path):
    """Records of two photographs, with polygons and with run lengths."""
    made = []
    run_lengths = mask_util.encode(np.ones((60, 80), np.uint8, order="F"))
    for index, segmentation in enumerate([[[5.0, 5.0, 60.0, 9.0, 30.0, 50.0]], run_lengths]):
        (tmp_path / f"{index}.png").write_bytes(encode(photo(60, 80, seed=index)))
        target = {"bbox": [5.0, 5.0, 60.0, 50.0], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        target |= {"segmentation": segmentation, "iscrowd": 0}
        record = {"file_name": str(tmp_path / f"{index}.png"), "height": 60, "width": 80}
        made.append(record | {"image_id": index, "annotations": [target]})
    return made


@pytest.mark.parametrize("recompute_boxes", [False, True])
def test_mappers_are_compared_with_the_same_draws(records, recompute_boxes):
    steps = [T.RandomFlip(), T.ResizeScale(0.5, 2.0, 64, 64), T.FixedSizeCrop((64, 64), pad=False)]
    ours = DetectionMapper(
        True,
        augmentations=steps,
        image_format="RGB",
        use_instance_mask=True,
        recompute_boxes=recompute_boxes,
    )
    for chosen, masks in ((records[:1], PolygonMasks), (records[1:], BitMasks)):
        usual = usual_mapper(ours, chosen)
        assert min(similarities(chosen, ours, usual)) > 40
        assert isinstance(usual(chosen[0])["instances"].gt_masks, masks)
    seen = []
    mappers = [lambda record: seen.append((record["image_id"], np.random.rand()))] * 2
    rates = time_mappers(records, mappers, 2)
    assert [len(rate) for rate in rates] == [2, 2]
    assert [name for name, _ in seen] == [0, 1] * 6
    draws = [draw for _, draw in seen]
    assert draws[0:2] == draws[2:4] and draws[4:6] == draws[6:8] != draws[0:2]


def test_psnr():
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert psnr(black, white) == 0 and psnr(white, white) == 99
    assert psnr(white, white - 1) == pytest.approx(48.13, abs=0.01)
