"""Every task decodes an image to the same pixels, whatever the format and the orientation."""

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import transforms as T
from image_files import encode, photo
from image_kinds import KINDS, encode_kind
from omegaconf import OmegaConf
from torch import nn

from crossmae_det.classification import labeled_features
from crossmae_det.detection import DetectionMapper, predictor
from crossmae_det.detection.predictor import iter_inputs
from crossmae_det.pretraining import crops
from crossmae_det.pretraining.crops import RandomCrops, load_image
from crossmae_det.pretraining.image_datasets import StoredImage, find_images
from crossmae_det.utils.image_files import IMAGE_SUFFIXES
from crossmae_det.utils.image_reading import image_size, read_image

HEIGHT, WIDTH = 20, 29
CROP = slice(4, 24)  # the middle of the width


class Recorder(nn.Module):
    """A detector that keeps the image it is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        self.image = batch[0]["image"]
        return [{"instances": torch.zeros(0)}]


@pytest.fixture
def recorder(monkeypatch):
    """The predictor of demo.py for a config that only reads images."""
    monkeypatch.setattr(predictor, "load_pretrained", lambda cfg, weights: Recorder())

    def make(image_format="RGB", augmentations=()):
        mapper = L(DetectionMapper)(
            is_train=False, augmentations=list(augmentations), image_format=image_format
        )
        cfg = {
            "train": {"device": "cpu", "amp": {"enabled": False, "dtype": "float16"}},
            "dataloader": {"categories": {1: "a"}, "test": {"mapper": mapper}},
        }
        return predictor.Predictor(OmegaConf.create(cfg, flags={"allow_objects": True}))

    return make


@pytest.mark.parametrize("kind", [k for k in KINDS if f".{k.split()[1]}" in IMAGE_SUFFIXES])
def test_every_task_sees_the_same_pixels(tmp_path, monkeypatch, recorder, kind):
    # The part that pretraining takes is the whole image.
    monkeypatch.setattr(crops, "random_crop", lambda height, width, *_: (0, 0, height, width))
    original = photo(HEIGHT, WIDTH, seed=2, finest=4)
    demo = {image_format: recorder(image_format) for image_format in ("RGB", "BGR", "L")}
    mapper = DetectionMapper(True, augmentations=[], image_format="RGB")
    folder = tmp_path / "class"
    folder.mkdir()
    expected = {}
    for orientation in range(1, 9):
        encoded = encode_kind(kind, original, orientation)
        if encoded is None:
            continue
        path = folder / f"{orientation}.{kind.split()[1]}"
        path.write_bytes(encoded[0])
        pixels = read_image(path)
        assert np.abs(pixels.astype(int) - encoded[1]).max() <= encoded[2]
        planes = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        expected[path.name] = planes
        assert image_size(path) == (HEIGHT, WIDTH)

        record = {"file_name": str(path), "height": HEIGHT, "width": WIDTH}
        assert torch.equal(mapper(record)["image"], planes)

        stored = StoredImage(str(path))
        assert torch.equal(load_image(stored, (HEIGHT, WIDTH)), planes)
        crop = RandomCrops((HEIGHT, WIDTH), (1.0, 1.0), flip=False)
        assert torch.equal(crop(stored, [0]), planes)

        ((frame,),) = iter_inputs([str(path)])
        np.testing.assert_array_equal(frame[:, :, ::-1], pixels)
        for image_format, run in demo.items():
            run(frame)
            shown = run.model.image.numpy().transpose(1, 2, 0)
            np.testing.assert_array_equal(shown, read_image(path, image_format))

    seen = []
    labeled_features(
        str(tmp_path), lambda images: seen.append(images) or images[:, 0, :2, 0], HEIGHT
    )
    assert len(find_images(str(folder))) == len(expected) == len(seen[0])
    for planes, image in zip(expected.values(), seen[0], strict=True):
        assert torch.equal(image, planes[:, :, CROP])


def test_evaluation_and_prediction_keep_a_pixel_of_a_long_thin_image(tmp_path, recorder):
    path = tmp_path / "thin.png"
    path.write_bytes(encode(np.full((16, 3300, 3), 77, np.uint8)))
    resize = L(T.ResizeShortestEdge)(short_edge_length=64, max_size=64)
    run = recorder(augmentations=[resize])
    ((frame,),) = iter_inputs([str(path)])
    run(frame)
    mapper = DetectionMapper(False, augmentations=[instantiate(resize)], image_format="RGB")
    record = {"file_name": str(path), "height": 16, "width": 3300}
    assert torch.equal(run.model.image, mapper(record)["image"])
    assert run.model.image.shape == (3, 1, 64)
