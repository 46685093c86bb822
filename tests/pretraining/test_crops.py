"""Random crops of images, beside torchvision's and Pillow's."""

import math
import random

import numpy as np
import pytest
import torch
from image_files import encode, photo
from image_kinds import encode_kind
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from crossmae_det.pretraining import crops
from crossmae_det.pretraining.crops import RandomCrops, load_image, random_crop, resize
from crossmae_det.pretraining.image_datasets import StoredImage
from crossmae_det.utils.image_reading import EncodedImage


def test_crops_are_drawn_as_torchvision_draws_them():
    height, width, scale, count = 300, 480, (0.2, 1.0), 3000
    torch.manual_seed(0)
    expected = [
        RandomResizedCrop.get_params(torch.empty(3, height, width), list(scale), [3 / 4, 4 / 3])
        for _ in range(count)
    ]
    drawn = [random_crop(height, width, scale, random.Random(seed)) for seed in range(count)]
    for boxes in (np.array(drawn), np.array(expected)):
        top, left, crop_h, crop_w = boxes.T
        assert top.min() == left.min() == 0
        assert (top + crop_h).max() == height and (left + crop_w).max() <= width
    # The mean of 3000 crops: within 2 % of the image's side.
    np.testing.assert_allclose(np.mean(drawn, 0), np.mean(expected, 0), atol=0.02 * height)
    np.testing.assert_allclose(np.std(drawn, 0), np.std(expected, 0), atol=0.02 * height)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10)), (1, 50, (0, 24, 1, 1))],
)
def test_a_long_thin_image_gives_its_centre(height, width, box):
    assert random_crop(height, width, (0.9, 1.0), random.Random(0)) == box


@pytest.mark.parametrize("size", [(60, 80), (144, 150), (190, 130), (250, 200), (640, 800)])
def test_resizing_is_close_to_pillow(size):
    pixels = photo(*size)
    expected = np.asarray(Image.fromarray(pixels).resize((128, 128), Image.Resampling.BICUBIC))
    result = resize(pixels, 128, 128)
    assert result.shape == expected.shape
    error = np.mean((result.astype(float) - expected) ** 2)
    assert 10 * math.log10(255**2 / error) > 44


def box_of(seed_sequence, height, width, scale=(0.2, 1.0)):
    return random_crop(height, width, scale, random.Random(" ".join(map(str, seed_sequence))))


@pytest.mark.parametrize(
    ("image_size", "reduction"), [(96, 1), (64, 2), (32, 4), (16, 8), ((32, 64), 2)]
)
def test_a_crop_is_what_pillow_makes_of_the_same_box(tmp_path, monkeypatch, image_size, reduction):
    pixels = photo(210, 260, finest=4)  # the box is rounded to pixels that were decoded
    path = tmp_path / "photo.jpg"
    path.write_bytes(encode(pixels, "JPEG", quality=95, subsampling=0))
    asked = []
    decode = EncodedImage.decode
    monkeypatch.setattr(
        EncodedImage, "decode", lambda *args: asked.append(args[2]) or decode(*args)
    )
    crops = RandomCrops(image_size, scale=(0.5, 0.6), flip=False)
    top, left, crop_h, crop_w = box_of([3, 1], 210, 260, (0.5, 0.6))
    crop = crops(StoredImage(str(path)), [3, 1])
    assert (crop.dtype, tuple(crop.shape)) == (torch.uint8, (3, crops.height, crops.width))
    assert crop.is_contiguous()
    assert asked == [reduction]
    part = Image.open(path).crop((left, top, left + crop_w, top + crop_h))
    expected = np.asarray(part.resize((crops.width, crops.height), Image.Resampling.BICUBIC))
    error = np.mean((crop.permute(1, 2, 0).numpy().astype(float) - expected) ** 2)
    assert 10 * math.log10(255**2 / error) > 30
    other = np.roll(expected, 2, axis=1)
    assert error < 0.5 * np.mean((other.astype(float) - expected) ** 2)


def test_half_of_the_crops_are_flipped(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, 8:] = 255
    path = tmp_path / "half.png"
    path.write_bytes(encode(pixels))
    for flip, expected in ((True, range(30, 71)), (False, range(0, 1))):
        crops = RandomCrops(8, (1.0, 1.0), flip)
        made = [crops(StoredImage(str(path)), [number]) for number in range(100)]
        assert sum(crop[0, 0, 0].item() > 128 for crop in made) in expected


def test_an_image_smaller_than_the_crop_is_enlarged(tmp_path):
    path = tmp_path / "small.png"
    path.write_bytes(encode(photo(5, 3)))
    assert RandomCrops((48, 32))(StoredImage(str(path)), [0]).shape == (3, 48, 32)


@pytest.mark.parametrize("size", [(16, 33000), (33000, 16), (1, 2000)])
def test_a_long_thin_image_gives_a_crop(tmp_path, size):
    path = tmp_path / "thin.png"
    path.write_bytes(encode(np.full(size, 66, np.uint8)))
    for make in (lambda image: RandomCrops(32)(image, [0]), lambda image: load_image(image, 32)):
        crop = make(StoredImage(str(path)))
        assert crop.shape == (3, 32, 32) and (crop == 66).all()


@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_a_reduced_jpeg_is_cropped_upright(tmp_path, monkeypatch, orientation):
    """The box is drawn on the upright image, and means the same place at any reduction."""
    picture = photo(160, 240, seed=3, finest=4)
    path = tmp_path / "photo.jpg"
    path.write_bytes(encode_kind("RGB jpg", picture, orientation)[0])
    box = (48, 120, 64, 96)  # top, left, height, width
    asked = []
    monkeypatch.setattr(crops, "random_crop", lambda *args: asked.append(args[:2]) or box)
    crop = RandomCrops((16, 24), flip=False)(StoredImage(str(path)), [0])
    assert asked == [(160, 240)]
    part = Image.fromarray(picture[48:112, 120:216]).resize((24, 16), Image.Resampling.BOX)
    difference = np.abs(crop.permute(1, 2, 0).numpy().astype(int) - np.asarray(part))
    assert difference.mean() < 4
