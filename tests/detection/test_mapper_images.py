"""What the mapper of detection makes of unusual images, in training and evaluation."""

import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from image_files import encode, photo
from shorthand import one_line

from crossmae_det.detection import DetectionMapper
from crossmae_det.model_zoo import get_config


def record(path, height, width):
    box = [width / 4, height / 4, width * 3 / 4, height * 3 / 4]
    x0, y0, x1, y1 = box
    annotation = {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    annotation["segmentation"] = [[x0, y0, x1, y0, x1, y1, x0, y1]]
    return {
        **{"file_name": str(path), "height": height, "width": width, "image_id": 1},
        "annotations": [annotation],
    }


@pytest.mark.parametrize("size", [(16, 3300), (3300, 16)])
def test_a_long_thin_image_keeps_a_pixel(tmp_path, size):
    """At a tenth of its size and less, its short side would round to nothing."""
    path = tmp_path / "thin.png"
    path.write_bytes(encode(np.full((*size, 3), 77, np.uint8)))
    lsj = [
        T.RandomFlip(horizontal=True),
        T.ResizeScale(min_scale=0.1, max_scale=0.2, target_height=64, target_width=64),
        T.FixedSizeCrop(crop_size=(64, 64), pad=False),
    ]
    train = DetectionMapper(True, augmentations=lsj, image_format="RGB", use_instance_mask=True)
    for seed in range(5):
        np.random.seed(seed)
        sample = train(record(path, *size))
        image = sample["image"]
        assert image.shape[0] == 3 and min(image.shape[1:]) == 1 and 6 <= max(image.shape[1:]) <= 13
        assert (image == 77).all()
        boxes = sample["instances"].gt_boxes.tensor
        assert torch.isfinite(boxes).all()
        assert sample["instances"].image_size == tuple(image.shape[1:])
    test = DetectionMapper(
        False, augmentations=[T.ResizeShortestEdge(64, max_size=64)], image_format="L"
    )
    assert sorted(test(record(path, *size))["image"].shape) == [1, 1, 64]


def test_augmentations_are_those_of_detectron2_otherwise(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(photo(40, 60)))
    augmentations = [
        T.RandomFlip(prob=1.0, horizontal=True),
        T.Resize((20, 31)),
        T.AugmentationList([T.RandomBrightness(0.5, 0.5)]),
    ]
    made = DetectionMapper(False, augmentations=augmentations, image_format="BGR")
    expected = T.AugInput(photo(40, 60)[:, :, ::-1])
    T.AugmentationList(augmentations)(expected)
    image = made(record(path, 40, 60))["image"].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(image, expected.image)


@pytest.mark.parametrize("image_format", ["RGBA", "YUV-BT.601", "l"])
def test_an_unknown_image_format_is_an_error_of_one_line(image_format):
    with pytest.raises(ValueError, match="image_format") as error:
        DetectionMapper(True, augmentations=[], image_format=image_format)
    assert "RGB, BGR, L" in one_line(error)


def test_both_tasks_have_the_key_that_skips_bad_images():
    detection = get_config("coco/mask_rcnn_crossmae_vit_b_100ep.py")
    pretraining = get_config("pretraining/crossmae_vit_b_800ep.py")
    assert detection.dataloader.train.skip_undecodable is False
    assert pretraining.dataloader.train.skip_undecodable is True
