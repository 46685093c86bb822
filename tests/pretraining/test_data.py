"""The loader of pretraining, and images that it cannot decode."""

import logging
import random

import cv2
import numpy as np
import pytest
import torch
from image_files import COUNT, encode, photo
from PIL import Image
from shorthand import one_line, take
from webdataset import TarWriter

from crossmae_det.pretraining import build_pretraining_loader
from crossmae_det.pretraining.crops import RandomCrops, load_images
from crossmae_det.pretraining.image_datasets import StoredImage
from crossmae_det.utils.image_reading import UndecodableImageError


def loader(dataset, **options):
    options = {"image_size": 16, "total_batch_size": 4, "num_workers": 0} | options
    return build_pretraining_loader(str(dataset), **options)


def shown(batches):
    """Indices of the images that crops of one shade are from."""
    return [int(crop.float().mean()) // 30 for batch in batches for crop in batch]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale"),
        ({"crop_scale": (0.2, 1.5)}, "crop_scale"),
        ({"total_batch_size": 0}, "total_batch_size=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_arguments_out_of_range_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        loader(folder, **options)


# The loader


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
        with TarWriter(str(tmp_path / f"{number}.tar")) as shard:
            for index in range(number, 5, 2):
                shard.write({"__key__": str(index), "jpg": (photos / f"{index}.jpg").read_bytes()})
    dataset = f"{tmp_path}/{{0..1}}.tar"
    expected = torch.stack(take(loader(dataset), 5))
    for num_workers in (0, 1):
        run = loader(dataset, num_workers=num_workers)
        run.start_at(2)
        assert torch.equal(torch.stack(take(run, 3)), expected[2:])


def test_processes_share_the_batch_of_one(photos, monkeypatch):
    expected = torch.stack(take(loader(photos), 3))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parts.append(torch.stack(take(loader(photos), 3)))
    assert torch.equal(torch.cat(parts, dim=1), expected)
    with pytest.raises(ValueError, match="total_batch_size=3: .* processes \\(2\\)"):
        loader(photos, total_batch_size=3)


def test_global_generators_are_left_alone(photos):
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
    # What OpenCV 4 makes of a JPEG that was cut short; OpenCV 5 refuses it.
    monkeypatch.setattr(cv2, "imdecode", lambda *_: np.full((40, 50, 3), 128, np.uint8))
    with pytest.raises(UndecodableImageError) as error:
        RandomCrops(8)(StoredImage(str(tmp_path / "bad.jpg")), [0])
    assert one_line(error).startswith(f"{tmp_path}/bad.jpg: the image cannot be decoded (")


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
    assert "(2 images so far)" in messages[1]
    for before, after in zip(shown(plain), shown(batches), strict=True):
        # The others keep their places.
        assert after not in (2, 5) if before in (2, 5) else after == before


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_but_bad_images_ends_in_one_line(folder, num_workers):
    for path in folder.iterdir():
        damage(path, "text")
    with pytest.raises(ValueError) as error:
        take(loader(folder, num_workers=num_workers), 1)
    assert ".png: none of 10 images drawn could be decoded; check the data" in one_line(error)


def test_a_look_at_a_set_takes_images_from_all_over_it(tmp_path):
    for index in range(9):
        Image.fromarray(np.full((20, 40, 3), 20 * index, np.uint8)).save(tmp_path / f"{index}.png")
    images = load_images(str(tmp_path), 8, 3)
    assert images.shape == (3, 3, 8, 8)
    assert images[:, 0, 0, 0].tolist() == [0, 80, 160]
    assert len(load_images(str(tmp_path), 8, 20)) == 9
    (tmp_path / "4.png").write_bytes(b"no image")
    assert load_images(str(tmp_path), 8, 3)[:, 0, 0, 0].tolist() == [0, 160]
    with pytest.raises(ValueError, match=r"4\.png: none of the images looked at can be decoded"):
        load_images(str(tmp_path / "4.png"), 8, 3)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        load_images(str(tmp_path), 8, 0)


def test_an_image_is_looked_at_in_its_middle(tmp_path):
    pixels = np.zeros((30, 60, 3), np.uint8)
    pixels[:, 15:45] = 200  # the central square
    Image.fromarray(pixels).save(tmp_path / "one.png")
    (image,) = load_images(str(tmp_path / "one.png"), 30, 1)
    assert (image == 200).all()
    wide = load_images(str(tmp_path / "one.png"), (10, 20), 1)
    assert wide.shape == (1, 3, 10, 20) and (wide == 0).any()
