"""Random crops compared to torchvision's and Pillow's, and the loaders of pretraining."""

import logging
import math
import random

import cv2
import numpy as np
import pytest
import torch
from image_files import COUNT, encode, photo, write_tar
from image_kinds import encode_kind
from PIL import Image
from shorthand import one_line, take
from torch import distributed
from torchvision.transforms import RandomResizedCrop

from crossmae_det.pretraining import build_pretraining_loader, build_validation_loader, crops
from crossmae_det.pretraining.crops import (
    RandomCrops,
    load_image,
    load_images,
    random_crop,
)
from crossmae_det.pretraining.image_datasets import StoredImage, find_images
from crossmae_det.utils.image_reading import EncodedImage, UndecodableImageError


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
def test_a_long_thin_image_gives_its_center(height, width, box):
    assert random_crop(height, width, (0.9, 1.0), random.Random(0)) == box


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
    """The box is drawn on the upright image, and means the same region at any reduction."""
    pixels = photo(160, 240, seed=3, finest=4)
    path = tmp_path / "photo.jpg"
    path.write_bytes(encode_kind("RGB jpg", pixels, orientation)[0])
    box = (48, 120, 64, 96)  # top, left, height, width
    asked = []
    monkeypatch.setattr(crops, "random_crop", lambda *args: asked.append(args[:2]) or box)
    crop = RandomCrops((16, 24), flip=False)(StoredImage(str(path)), [0])
    assert asked == [(160, 240)]
    part = Image.fromarray(pixels[48:112, 120:216]).resize((24, 16), Image.Resampling.BOX)
    difference = np.abs(crop.permute(1, 2, 0).numpy().astype(int) - np.asarray(part))
    assert difference.mean() < 4


def loader(dataset, **options):
    options = {"image_size": 16, "total_batch_size": 4, "num_workers": 0} | options
    return build_pretraining_loader(str(dataset), **options)


def shown(batches):
    """Indices of the images that crops of one shade are from."""
    return [int(crop.float().mean()) // 30 for batch in batches for crop in batch]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale"),
        ({"crop_scale": (0.2, 1.5)}, "crop_scale"),
        ({"total_batch_size": 0}, "total_batch_size=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_arguments_out_of_range_are_rejected(folder, options, message):
    with pytest.raises(ValueError, match=message):
        loader(folder, **options)


# The training loader


@pytest.mark.parametrize("kind", ["files", "shards"])
def test_every_epoch_shows_every_image_once(folder, shards, kind):
    dataset = folder if kind == "files" else f"{shards}/*.tar"
    run = loader(dataset, total_batch_size=3, seed=4)
    batches = take(run, 7)
    assert all(batch.dtype == torch.uint8 and batch.shape == (3, 3, 16, 16) for batch in batches)
    order = shown(batches)
    epochs = [order[start : start + COUNT] for start in range(0, 3 * COUNT, COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert shown(take(loader(dataset, total_batch_size=3, seed=5), 7)) != order


@pytest.fixture
def photos(tmp_path):
    """Five images, so large that every crop is another."""
    path = tmp_path / "photos"
    path.mkdir()
    for index in range(5):
        (path / f"{index}.jpg").write_bytes(encode(photo(80, 100, index), "JPEG"))
    return path


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_run_sees_the_same_batches(photos, num_workers):
    expected = torch.stack(take(loader(photos, seed=1), 5))
    assert len(expected.flatten(0, 1).flatten(1).unique(dim=0)) == 20  # no two crops are the same
    run = loader(photos, seed=1, num_workers=num_workers)
    assert torch.equal(torch.stack(take(run, 2)), expected[:2])
    run.start_at(3)
    assert torch.equal(torch.stack(take(run, 2)), expected[3:])
    assert not torch.equal(torch.stack(take(loader(photos, seed=2), 5)), expected)


def test_a_resumed_run_on_shards_sees_the_same_batches(tmp_path, photos):
    for number in range(2):
        names = [f"{index}.jpg" for index in range(number, 5, 2)]
        write_tar(
            tmp_path / f"{number}.tar", {name: (photos / name).read_bytes() for name in names}
        )
    dataset = f"{tmp_path}/{{0..1}}.tar"
    expected = torch.stack(take(loader(dataset), 5))
    for num_workers in (0, 1):
        run = loader(dataset, num_workers=num_workers)
        run.start_at(2)
        assert torch.equal(torch.stack(take(run, 3)), expected[2:])


@pytest.mark.parametrize(
    ("device", "pinned"), [("auto", True), ("cuda", True), ("cuda:1", True), ("cpu", False)]
)
def test_memory_is_pinned_for_cuda_only(folder, monkeypatch, device, pinned):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        "crossmae_det.data.loader.DataLoader", lambda *_, **options: asked.append(options) or []
    )
    iter(loader(folder, device=device))
    assert [options["pin_memory"] for options in asked] == [pinned]


def test_processes_share_the_batch_of_one(photos, monkeypatch):
    expected = torch.stack(take(loader(photos), 3))
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        parts.append(torch.stack(take(loader(photos), 3)))
    assert torch.equal(torch.cat(parts, dim=1), expected)
    with pytest.raises(ValueError, match=r"total_batch_size=3: .* processes \(2\)"):
        loader(photos, total_batch_size=3)


def test_global_generators_are_unchanged(photos):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    take(loader(photos), 2)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


# Bad images


def damage(path, kind):
    if kind == "cut JPEG":
        whole = encode(photo(40, 50), "JPEG")
        path.write_bytes(whole[: len(whole) * 2 // 3])
    elif kind == "cut PNG":
        whole = encode(photo(40, 50))
        path.write_bytes(whole[: len(whole) * 2 // 3])
    elif kind == "text":
        path.write_text("no image")
    elif kind == "empty":
        path.write_bytes(b"")


@pytest.mark.parametrize("kind", ["cut JPEG", "cut PNG", "text", "empty", "absent"])
def test_a_bad_image_is_named_in_one_line(tmp_path, monkeypatch, kind):
    damage(tmp_path / "bad.jpg", kind)
    # What OpenCV 4 makes of a JPEG that was cut short; OpenCV 5 rejects it.
    monkeypatch.setattr(cv2, "imdecode", lambda *_: np.full((40, 50, 3), 128, np.uint8))
    with pytest.raises(UndecodableImageError) as error:
        RandomCrops(8)(StoredImage(str(tmp_path / "bad.jpg")), [0])
    assert one_line(error).startswith(f"{tmp_path}/bad.jpg: ")


def test_what_follows_the_end_of_a_jpeg_does_no_harm(tmp_path):
    pixels = np.full((20, 30, 3), 77, np.uint8)
    (tmp_path / "a.jpg").write_bytes(encode(pixels, "JPEG") + b"\0\0 something else")
    assert RandomCrops(8)(StoredImage(str(tmp_path / "a.jpg")), [0]).float().mean() == 77


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_images_are_skipped_counted_and_named_once(folder, caplog, num_workers):
    plain = take(loader(folder, total_batch_size=COUNT), 3)
    damage(folder / "2.png", "cut PNG")
    damage(folder / "5.png", "text")
    run = loader(folder, total_batch_size=COUNT, num_workers=num_workers)
    with caplog.at_level(logging.WARNING, "crossmae_det"):
        batches = take(run, 3)
    bad = {f"{folder}/2.png", f"{folder}/5.png"}
    assert run.skipped.keys() == bad
    assert all(run.skipped[name] >= 3 for name in bad)
    messages = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(messages) == 2 and all(any(name in m for m in messages) for name in bad)
    for before, after in zip(shown(plain), shown(batches), strict=True):
        # The others keep their positions.
        assert after not in (2, 5) if before in (2, 5) else after == before


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_but_bad_images_ends_in_one_line(folder, num_workers):
    for path in folder.iterdir():
        damage(path, "text")
    with pytest.raises(ValueError) as error:
        take(loader(folder, num_workers=num_workers), 1)
    assert ".png: none of 10 images" in one_line(error)


def test_a_few_images_are_spread_over_the_dataset(tmp_path):
    for index in range(9):
        Image.fromarray(np.full((20, 40, 3), 20 * index, np.uint8)).save(tmp_path / f"{index}.png")
    images = load_images(str(tmp_path), 8, 3)
    assert images.shape == (3, 3, 8, 8)
    assert images[:, 0, 0, 0].tolist() == [0, 80, 160]
    assert len(load_images(str(tmp_path), 8, 20)) == 9
    (tmp_path / "4.png").write_bytes(b"no image")
    assert load_images(str(tmp_path), 8, 3)[:, 0, 0, 0].tolist() == [0, 160]
    with pytest.raises(ValueError, match=r"4\.png: "):
        load_images(str(tmp_path / "4.png"), 8, 3)
    with pytest.raises(ValueError, match="1.*0"):
        load_images(str(tmp_path), 8, 0)


def test_the_central_part_of_an_image_is_loaded(tmp_path):
    pixels = np.zeros((30, 60, 3), np.uint8)
    pixels[:, 15:45] = 200  # the central square
    Image.fromarray(pixels).save(tmp_path / "one.png")
    (image,) = load_images(str(tmp_path / "one.png"), 30, 1)
    assert (image == 200).all()
    wide = load_images(str(tmp_path / "one.png"), (10, 20), 1)
    assert wide.shape == (1, 3, 10, 20) and (wide == 0).any()


# The validation loader


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    path = tmp_path_factory.mktemp("held_out")
    for index in range(COUNT):
        Image.fromarray(photo(20, 30, seed=index)).save(path / f"{index}.png")
    return str(path)


def central_parts(held_out, indices):
    images = find_images(held_out)
    return torch.stack([load_image(images[index], 16) for index in indices])


def load_held_out(held_out, **options):
    return list(build_validation_loader(held_out, image_size=16, num_workers=0, **options))


def test_held_out_images_come_in_order_the_same_every_time(held_out):
    batches = load_held_out(held_out, batch_size=3)
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat(batches), central_parts(held_out, range(COUNT)))
    assert all(map(torch.equal, batches, load_held_out(held_out, batch_size=3)))


@pytest.mark.parametrize(("count", "indices"), [(3, [0, 2, 4]), (1, [0]), (99, range(COUNT))])
def test_some_held_out_images_are_evenly_spread(held_out, count, indices):
    assert torch.equal(
        torch.cat(load_held_out(held_out, max_images=count)), central_parts(held_out, indices)
    )


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_processes_share_the_held_out_batches_of_one(held_out, monkeypatch, world_size):
    alone = load_held_out(held_out, batch_size=2)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: world_size)
    together = []
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        together += load_held_out(held_out, batch_size=2)
    assert len(together) == len(alone) and all(map(torch.equal, together, alone))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_held_out_image_that_cannot_be_decoded_is_named(tmp_path, num_workers):
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    loader = build_validation_loader(str(tmp_path), image_size=16, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"bad\.png"):
        list(loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": ""}, r"dataloader\.validation\.dataset\.name"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_images": 0}, "max_images"),
    ],
)
def test_bad_validation_options_are_rejected(held_out, options, message):
    with pytest.raises(ValueError, match=message):
        build_validation_loader(**{"dataset": held_out, "image_size": 16, **options})


def test_a_folder_that_is_absent_is_named():
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build_validation_loader("nowhere", image_size=16)
