"""The mapper of detection, its augmentations, and the training loader."""

import copy
import logging
import pickle
import random
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.data import build_detection_test_loader
from detectron2.data import transforms as T
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_loss
from detectron2.structures import BitMasks, Boxes, BoxMode, PolygonMasks
from detectron2.utils.events import EventStorage
from image_files import encode, photo
from PIL import Image
from shorthand import one_line, take

from crossmae_det.data.loader import _Samples
from crossmae_det.detection import DetectionMapper, ResizeToFit, TrainLoader
from crossmae_det.model_zoo import get_config
from crossmae_det.utils import ImageError, UndecodableImageError

HEIGHT, WIDTH = 24, 32
SQUARE = [[4.0, 4.0, 20.0, 4.0, 20.0, 16.0, 4.0, 16.0]]


def rle(mask):
    return mask_util.encode(np.asfortranarray(mask))


def square_mask():
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[4:16, 4:20] = 1
    return mask


def target(segmentation=SQUARE, **changes):
    value = {"bbox": [4, 4, 16, 12], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
    value |= {"segmentation": copy.deepcopy(segmentation)} if segmentation is not None else {}
    return {**value, **changes}


@pytest.fixture
def records(tmp_path):
    """Seven small images of noise, each with one square as its target."""
    rng = np.random.default_rng(0)
    out = []
    for i in range(7):
        file = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(file)
        record = {"file_name": str(file), "height": HEIGHT, "width": WIDTH, "image_id": i}
        out.append({**record, "annotations": [target()]})
    return out


def mapper(is_train=True, augmentations=None, **options):
    if augmentations is None:
        augmentations = [
            T.ResizeScale(0.5, 1.5, 24, 24),
            T.FixedSizeCrop((24, 24)),
            T.RandomFlip(),
        ]
    options = {"image_format": "RGB", "use_instance_mask": is_train} | options
    return DetectionMapper(is_train, augmentations=augmentations, **options)


def ids(batches):
    return [[sample["image_id"] for sample in batch] for batch in batches]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(sum(a, []), sum(b, []), strict=True):
        assert x["image_id"] == y["image_id"]
        torch.testing.assert_close(x["image"], y["image"], rtol=0, atol=0)
        boxes = x["instances"].gt_boxes.tensor, y["instances"].gt_boxes.tensor
        torch.testing.assert_close(*boxes, rtol=0, atol=0)


def identity(record):
    return record


def draw(record):
    """A mapper that draws from all three generators."""
    return {**record, "drawn": (random.random(), np.random.rand(), torch.rand(()).item())}


# Order


def test_every_epoch_shows_every_image_once(records):
    batches = ids(take(TrainLoader(records, identity, 3, seed=4), 7))
    flat = sum(batches, [])
    epochs = [flat[start : start + 7] for start in (0, 7, 14)]
    for epoch, shown in enumerate(epochs):
        assert shown == np.random.default_rng([4, epoch]).permutation(7).tolist()
    assert epochs[0] != epochs[1]
    assert ids(take(TrainLoader(records, identity, 3, seed=5), 7)) != batches


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_run_sees_the_same_batches(records, num_workers):
    expected = take(TrainLoader(records, mapper(), 3, seed=1), 5)
    crops = [sample["image"].float().mean().item() for batch in expected for sample in batch]
    assert len(set(crops)) > 10  # the augmentation does vary
    run = TrainLoader(records, mapper(), 3, num_workers, seed=1)
    assert_same(take(run, 2), expected[:2])
    run.start_at(2)
    assert_same(take(run, 3), expected[2:])
    assert_same(take(run, 1), expected[2:3])  # until the next start_at
    resumed = TrainLoader(records, mapper(), 3, num_workers, seed=1)
    resumed.start_at(4)
    assert_same(take(resumed, 1), expected[4:])


def test_start_at_maps_nothing_before(records):
    mapped = []
    run = TrainLoader(records, lambda record: mapped.append(record["image_id"]) or record, 2)
    run.start_at(10**12)
    assert ids(take(run, 1)) == [mapped]
    with pytest.raises(ValueError, match="iteration=-1"):
        run.start_at(-1)


def test_processes_share_the_batch_of_one(records, monkeypatch):
    expected = take(TrainLoader(records, mapper(), 4), 3)
    parts = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parts.append(take(TrainLoader(records, mapper(), 4), 3))
    assert all(len(batch) == 2 for batch in parts[0])
    assert_same([a + b for a, b in zip(*parts, strict=True)], expected)
    with pytest.raises(ValueError, match="total_batch_size=3: .* processes \\(2\\)"):
        TrainLoader(records, mapper(), 3)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_generators_are_seeded_for_each_image_and_restored(records, num_workers):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draw({})["drawn"]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    first = take(TrainLoader(records, draw, 2, num_workers), 2)
    assert draw({})["drawn"] == expected
    second = take(TrainLoader(records, draw, 2), 2)
    drawn = [sample["drawn"] for sample in sum(first, [])]
    assert drawn == [sample["drawn"] for sample in sum(second, [])]
    assert all(len(set(numbers)) == 4 for numbers in zip(*drawn, strict=True))
    other = take(TrainLoader(records, draw, 2, seed=1), 2)
    assert not set(drawn) & {sample["drawn"] for sample in sum(other, [])}


def test_arguments_that_cannot_be_used(records):
    with pytest.raises(ValueError, match="is empty"):
        TrainLoader([], identity, 1)
    with pytest.raises(ValueError, match="seed=-1"):
        TrainLoader(records, identity, 1, seed=-1)
    with pytest.raises(ValueError, match="total_batch_size=0"):
        TrainLoader(records, identity, 0)


# Bad images


def damage(record, kind):
    file = Path(record["file_name"])
    if kind == "truncated":
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])
    elif kind == "text":
        file.write_text("no image")
    elif kind == "absent":
        record["file_name"] += ".gone"
    else:
        record["width"] += 1


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", ["truncated", "text", "absent", "other size"])
def test_undecodable_image_is_named_in_one_line(records, kind, num_workers):
    damage(records[0], kind)
    with pytest.raises(UndecodableImageError) as error:
        take(TrainLoader(records, mapper(), 7, num_workers), 1)
    assert one_line(error).startswith(records[0]["file_name"] + ": ")
    assert "pass dataloader.train.skip_undecodable=True" in one_line(error)
    assert "mapper.py" in str(error.value.__cause__)  # where it happened is not lost


def test_undecodable_error_survives_pickling():
    error = pickle.loads(pickle.dumps(UndecodableImageError("a message", "a.png")))
    assert (str(error), error.file_name) == ("a message", "a.png")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipping_replaces_counts_and_warns_once(records, caplog, num_workers):
    plain = take(TrainLoader(records, mapper(), 7), 3)
    names = [records[i]["file_name"] for i in (2, 5)]
    damage(records[2], "text")
    damage(records[5], "truncated")
    runs = []
    for workers in (0, num_workers):
        run = TrainLoader(records, mapper(), 7, workers, skip_undecodable=True)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "crossmae_det"):
            runs.append(take(run, 3))
        assert set(run.skipped) == set(names) and min(run.skipped.values()) >= 3
        assert [record.message.count(".png") for record in caplog.records] == [1, 1]
        assert "(2 images so far)" in caplog.records[1].message
    assert_same(*runs)
    for before, after in zip(sum(plain, []), sum(runs[0], []), strict=True):
        assert "skipped" not in after
        if before["image_id"] in (2, 5):
            assert after["image_id"] not in (2, 5)
        else:  # the good images and their augmentations stay
            assert_same([[before]], [[after]])


def test_only_undecodable_images_is_an_error(records):
    for record in records:
        damage(record, "text")
    with pytest.raises(ValueError) as error:
        take(TrainLoader(records, mapper(), 1, skip_undecodable=True), 1)
    assert ".png: none of 10 images drawn could be decoded" in one_line(error)


def test_a_mapper_may_return_none(records):
    def odd(record):
        return record if record["image_id"] % 2 else None

    batches = ids(take(TrainLoader(records, odd, 7), 2))
    assert all(image_id % 2 for batch in batches for image_id in batch)
    assert {1, 3, 5} <= set(batches[0])
    with pytest.raises(ValueError, match="none of 10 images drawn was accepted"):
        take(TrainLoader(records, lambda record: None, 1), 1)


class TwoPartError(ValueError):
    def __init__(self, first, second):
        super().__init__(first)


def test_file_errors_of_any_mapper_arrive_in_one_line(records):
    def fail(record):
        raise OSError("disk full")

    with pytest.raises(OSError, match="^disk full$"):
        take(TrainLoader(records, fail, 1, num_workers=1), 1)


@pytest.mark.parametrize("error", [KeyError("a bug"), TwoPartError("does not", "pickle")])
def test_errors_that_torch_must_report_are_raised_in_the_worker(records, error):
    def fail(record, seed_sequence):
        raise error

    with pytest.raises(type(error)):
        _Samples(records, fail, seed=0, skip_undecodable=True)[0, 0]


def test_image_smaller_than_a_patch(records):
    assert mapper(min_size=HEIGHT)(records[0])["image"].shape == (3, 24, 24)
    with pytest.raises(ImageError) as error:
        take(TrainLoader(records, mapper(min_size=25), 1, skip_undecodable=True), 1)
    assert ".png: the image is 32x24 pixels" in one_line(error) and " 25 " in one_line(error)


# Mapper


def test_mapper_from_lazy_config(records):
    config = LazyCall(DetectionMapper)(
        is_train=True,
        augmentations=[LazyCall(T.RandomFlip)(prob=1.0)],
        image_format="RGB",
        use_instance_mask=True,
        min_size=16,
    )
    flipping = instantiate(config)
    assert flipping.min_size == 16
    sample = flipping(records[0])
    image = np.asarray(Image.open(records[0]["file_name"]))
    np.testing.assert_array_equal(sample["image"].permute(1, 2, 0).numpy(), image[:, ::-1])
    assert sample["instances"].gt_boxes.tensor.tolist() == [[12, 4, 28, 16]]
    assert sample["instances"].gt_classes.tolist() == [1]
    assert records[0]["annotations"] == [target()]  # the record itself is unchanged


def test_mapper_arguments_that_cannot_be_used():
    with pytest.raises(ValueError, match="recompute_boxes"):
        mapper(use_instance_mask=False, recompute_boxes=True)


@pytest.mark.parametrize(
    "targets, expected",
    [
        ([target(), target()], PolygonMasks),
        ([target(), target(rle(square_mask()))], BitMasks),
        ([target(), target(rle(square_mask()), iscrowd=1)], PolygonMasks),
        ([], PolygonMasks),
    ],
)
def test_mask_format_follows_the_image(records, targets, expected):
    record = {**records[0], "annotations": targets}
    made = mapper(augmentations=[], recompute_boxes=True)
    instances = made(record)["instances"]
    assert isinstance(instances.gt_masks, expected)
    count = sum(not value.get("iscrowd", 0) for value in targets)
    assert len(instances) == len(instances.gt_masks) == count
    assert instances.gt_boxes.tensor.tolist() == [[4, 4, 20, 16]] * count


def test_boxes_without_masks(records):
    record = {**records[0], "annotations": [target(None)]}
    for options in ({"use_instance_mask": False}, {}):
        instances = mapper(augmentations=[], **options)(record)["instances"]
        assert not instances.has("gt_masks") and len(instances) == 1
    assert not mapper(use_instance_mask=False)(records[0])["instances"].has("gt_masks")


def test_padding_is_outside_of_run_length_masks(records):
    record = {**records[0], "annotations": [target(rle(square_mask()))]}
    made = mapper(augmentations=[T.FixedSizeCrop((40, 48))], recompute_boxes=True)
    instances = made(record)["instances"]
    expected = np.zeros((40, 48), bool)
    expected[:HEIGHT, :WIDTH] = square_mask()
    np.testing.assert_array_equal(instances.gt_masks.tensor[0].numpy(), expected)
    assert instances.gt_boxes.tensor.tolist() == [[4, 4, 20, 16]]


def test_boxes_are_recomputed_after_cropping(records):
    corner = [[0.0, 0.0, 30.0, 0.0, 0.0, 20.0]]  # in the crop it is far smaller than its box
    record = {**records[0], "annotations": [target(corner, bbox=[0, 0, 30, 20])]}
    crop = T.CropTransform(15, 2, 17, 22, WIDTH, HEIGHT)
    kept = mapper(augmentations=[crop])(record)["instances"]
    tight = mapper(augmentations=[crop], recompute_boxes=True)(record)["instances"]
    assert kept.gt_boxes.tensor.tolist() == [[0, 0, 15, 18]]
    torch.testing.assert_close(tight.gt_boxes.tensor, torch.tensor([[0.0, 0.0, 12.0, 8.0]]))


def test_mask_head_takes_both_formats_in_one_batch(records):
    made = mapper(augmentations=[])
    batch = [
        made({**records[0], "annotations": [target(segmentation)]})["instances"]
        for segmentation in (SQUARE, rle(square_mask()))
    ]
    logits = torch.linspace(-3, 3, 2 * 3 * 14 * 14).reshape(2, 3, 14, 14)
    for instances in batch:
        instances.proposal_boxes = Boxes(torch.tensor([[2.0, 2.0, 26.0, 20.0]]))
    with EventStorage():
        loss = mask_rcnn_loss(logits, batch)
        halves = [mask_rcnn_loss(logits[i : i + 1], batch[i : i + 1]) for i in (0, 1)]
    torch.testing.assert_close(loss, sum(halves) / 2)


def test_mapper_in_detectron2_test_loader(records):
    made = mapper(is_train=False, augmentations=[T.ResizeShortestEdge(48)])
    samples = [sample for [sample] in build_detection_test_loader(records, mapper=made)]
    assert [sample["image_id"] for sample in samples] == list(range(7))
    assert samples[0]["image"].shape == (3, 48, 64) and samples[0]["height"] == HEIGHT
    assert "annotations" not in samples[0] and "instances" not in samples[0]
    damage(records[0], "text")
    with pytest.raises(UndecodableImageError) as error:
        made(records[0])
    assert "dataloader.train" not in one_line(error) and "remove it" in one_line(error)


# Image sizes and formats


@pytest.mark.parametrize("side", [64, 1024])
@pytest.mark.parametrize(
    "shape", [(480, 640), (640, 480), (427, 640), (100, 100), (33, 1000), (3, 1)]
)
def test_a_square_is_fitted_as_by_detectron2(side, shape):
    image = torch.zeros(*shape, 3, dtype=torch.uint8).numpy()
    made = ResizeToFit(side).get_transform(image)
    expected = T.ResizeShortestEdge(side, side).get_transform(image)
    assert isinstance(made, T.ResizeTransform)
    names = ("h", "w", "new_h", "new_w", "interp")
    assert [getattr(made, n) for n in names] == [getattr(expected, n) for n in names]


@pytest.mark.parametrize(
    ("shape", "box", "expected"),
    [
        ((480, 640), (512, 1024), (512, 683)),
        ((480, 640), (1024, 512), (384, 512)),
        ((640, 480), (512, 1024), (512, 384)),
        ((640, 480), (1024, 512), (683, 512)),
        ((100, 400), (512, 1024), (256, 1024)),
        ((16, 33000), (512, 1024), (1, 1024)),
    ],
)
def test_an_image_is_as_large_as_fits(shape, box, expected):
    transform = ResizeToFit(box).get_transform(torch.zeros(*shape, 3).numpy())
    assert (transform.new_h, transform.new_w) == expected


@pytest.mark.parametrize("size", [(16, 3300), (3300, 16)])
def test_a_long_thin_image_keeps_a_pixel(tmp_path, size):
    """Its short side would round to 0 at a tenth of its size."""
    path = tmp_path / "thin.png"
    path.write_bytes(encode(np.full((*size, 3), 77, np.uint8)))
    height, width = size
    box = [width / 4, height / 4, width / 2, height / 2]
    polygon = [width / 4, height / 4, width, height / 4, width, height]
    thin = {"file_name": str(path), "height": height, "width": width, "image_id": 1}
    thin["annotations"] = [target([polygon], bbox=box)]
    lsj = [
        T.RandomFlip(horizontal=True),
        T.ResizeScale(min_scale=0.1, max_scale=0.2, target_height=64, target_width=64),
        T.FixedSizeCrop(crop_size=(64, 64), pad=False),
    ]
    train = DetectionMapper(True, augmentations=lsj, image_format="RGB", use_instance_mask=True)
    for seed in range(5):
        np.random.seed(seed)
        sample = train(thin)
        image = sample["image"]
        assert image.shape[0] == 3 and min(image.shape[1:]) == 1 and 6 <= max(image.shape[1:]) <= 13
        assert (image == 77).all()
        boxes = sample["instances"].gt_boxes.tensor
        assert torch.isfinite(boxes).all()
        assert sample["instances"].image_size == tuple(image.shape[1:])
    test = DetectionMapper(
        False, augmentations=[T.ResizeShortestEdge(64, max_size=64)], image_format="L"
    )
    assert sorted(test(thin)["image"].shape) == [1, 1, 64]


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
    image = (
        made({"file_name": str(path), "height": 40, "width": 60})["image"].permute(1, 2, 0).numpy()
    )
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
