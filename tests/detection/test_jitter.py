"""Large-scale jitter: the draws of detectron2, and nearly its pixels."""

import math

import numpy as np
import pytest
from detectron2.data import transforms as T
from image_files import encode, photo
from image_kinds import encode_kind

from crossmae_det.detection import DetectionMapper, get_dataset_dicts
from crossmae_det.detection.jitter import AugInput, are_by_size, decode, draw_by_size
from crossmae_det.utils.image_reading import EncodedImage


def jitter(low=0.1, high=2.0, size=(64, 96), **crop):
    flip, crop = T.RandomFlip(), T.FixedSizeCrop(size, **({"pad": False} | crop))
    return [flip, T.ResizeScale(low, high, *size), crop]


def psnr(pixels, expected):
    assert pixels.shape == expected.shape and pixels.dtype == np.uint8
    error = np.mean((pixels.astype(float) - expected) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


def values(transform):
    kept = {k: v for k, v in vars(transform).items() if not callable(v) and k != "self"}
    return type(transform), kept


SEQUENCES = {
    "large-scale jitter": jitter(),
    "padded": [*jitter(pad=True), T.RandomFlip(horizontal=False, vertical=True)],
    "flips only": [T.RandomFlip(), T.RandomFlip(horizontal=False, vertical=True)],
    "crop first": [T.FixedSizeCrop((50, 40)), T.ResizeScale(0.3, 3, 64, 96), T.RandomFlip()],
    "resized twice": [T.ResizeScale(0.5, 1, 90, 90), *jitter()],
}


@pytest.mark.parametrize("augmentations", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("shape", [(120, 160), (161, 97), (2, 3), (3, 700)])
def test_the_draws_are_those_of_detectron2(augmentations, shape):
    assert are_by_size(augmentations)
    sequence = T.AugmentationList(augmentations)
    pixels = photo(*shape)
    encoded = EncodedImage(encode(pixels), "a photo")
    similar = []
    for seed in range(20):
        np.random.seed(seed)
        drawn = draw_by_size(sequence, *shape)
        after = np.random.get_state()
        np.random.seed(seed)
        augmented = AugInput(pixels)
        expected = sequence(augmented)
        assert str(np.random.get_state()) == str(after)
        assert list(map(values, drawn.transforms)) == list(map(values, expected.transforms))
        made = decode(encoded, "RGB", drawn)
        similar.append(psnr(made, augmented.image))
    assert min(similar) > 38 and np.mean(similar) > 50


def test_flips_alone_change_no_pixel():
    pixels = photo(30, 40)
    transforms = T.TransformList([T.HFlipTransform(40), T.VFlipTransform(30)])
    for name, expected in (("RGB", pixels[::-1, ::-1]), ("BGR", pixels[::-1, ::-1, ::-1])):
        made = decode(EncodedImage(encode(pixels), "a photo"), name, transforms)
        np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize("image_format", ["RGB", "BGR", "L"])
@pytest.mark.parametrize("size", [(7, 9), (1, 9), (7, 1), (1, 1)])
def test_results_of_one_row_column_or_channel_are_mirrored(size, image_format):
    encoded = EncodedImage(encode(photo(60, 80)), "a photo")
    flips = [T.HFlipTransform(80), T.VFlipTransform(60)]
    resize = T.ResizeTransform(60, 80, *size)
    made = decode(encoded, image_format, T.TransformList([*flips, resize]))
    expected = decode(encoded, image_format, T.TransformList([resize]))[::-1, ::-1]
    assert np.abs(made.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("image_format", ["RGB", "L"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("kind", ["RGB jpg", "L jpg", "CMYK jpg"])
def test_a_jpeg_that_shrinks_is_decoded_smaller(monkeypatch, kind, orientation, image_format):
    asked = []
    plain = EncodedImage.decode
    monkeypatch.setattr(EncodedImage, "decode", lambda *args: asked.append(args[2]) or plain(*args))
    # A turned image must be whole pixels at a reduced size, too.
    height, width = (333, 421) if orientation == 1 else (336, 424)
    pixels = photo(height, width, finest=64)
    encoded = EncodedImage(encode_kind(kind, pixels, orientation)[0], "a photo")
    whole = plain(encoded, image_format)
    for shrink, reduction in ((1.2, 1), (3.3, 2), (6.5, 4), (20, 8)):
        size = round(height / shrink), round(width / shrink)
        resize = T.ResizeTransform(height, width, *size)
        crop = T.CropTransform(1, 2, size[1] - 3, size[0] - 4)
        steps = T.TransformList([T.HFlipTransform(width), resize, crop])
        made = decode(encoded, image_format, steps)
        assert asked.pop() == reduction
        expected = np.ascontiguousarray(whole)
        for step in steps.transforms:
            expected = step.apply_image(expected)
        assert psnr(made, expected) > 36


def test_other_augmentations_see_the_pixels(tmp_path):
    class Subclass(T.RandomFlip):
        pass

    class Darker(T.Augmentation):
        def get_transform(self, image):
            return T.BlendTransform(np.zeros(1), 1 - image.mean() / 255, image.mean() / 255)

    assert not are_by_size([Subclass()])
    assert not are_by_size([T.RandomFlip(), T.ResizeShortestEdge(20)])
    path = tmp_path / "a.png"
    path.write_bytes(encode(photo(40, 60)))
    record = {"file_name": str(path), "height": 40, "width": 60}
    augmentations = [*jitter(), Darker(), T.RandomBrightness(0.5, 1.5)]
    made = DetectionMapper(True, augmentations=augmentations, image_format="RGB")
    np.random.seed(3)
    image = made(record)["image"].numpy()
    np.random.seed(3)
    augmented = AugInput(photo(40, 60))
    T.AugmentationList(augmentations)(augmented)
    np.testing.assert_array_equal(image, augmented.image.transpose(2, 0, 1))


def test_photographs_are_similar_to_those_of_detectron2(shared_data):
    coco = shared_data / "coco"
    dataset = f"{coco}/annotations/instances_val2017.json:{coco}/val2017"
    sequence = T.AugmentationList(jitter(size=(512, 512)))
    similar = []
    for index, record in enumerate(get_dataset_dicts(dataset)[:40]):
        with open(record["file_name"], "rb") as file:
            encoded = EncodedImage(file.read(), record["file_name"])
        np.random.seed(index)
        made = decode(encoded, "BGR", draw_by_size(sequence, encoded.height, encoded.width))
        np.random.seed(index)
        augmented = AugInput(np.ascontiguousarray(encoded.decode("BGR")))
        sequence(augmented)
        similar.append(psnr(made, augmented.image))
    assert min(similar) > 38 and np.mean([min(value, 80) for value in similar]) > 55
