"""Held-out images: which ones, in which batches, on which process."""

import numpy as np
import pytest
import torch
from image_files import photo
from PIL import Image
from torch import distributed

from crossmae_det.pretraining import build_validation_loader
from crossmae_det.pretraining.crops import load_image
from crossmae_det.pretraining.image_datasets import find_images

COUNT = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("held_out")
    for index in range(COUNT):
        Image.fromarray(photo(20, 30, seed=index)).save(path / f"{index}.png")
    return str(path)


def expected(folder, indices):
    images = find_images(folder)
    return torch.stack([load_image(images[index], 16) for index in indices])


def load(folder, **options):
    return list(build_validation_loader(folder, image_size=16, num_workers=0, **options))


def test_central_parts_in_order_the_same_every_time(folder):
    batches = load(folder, batch_size=3)
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat(batches), expected(folder, range(COUNT)))
    assert all(map(torch.equal, batches, load(folder, batch_size=3)))


@pytest.mark.parametrize(("count", "indices"), [(3, [0, 2, 4]), (1, [0]), (99, range(COUNT))])
def test_some_images_evenly_spread(folder, count, indices):
    assert torch.equal(torch.cat(load(folder, max_images=count)), expected(folder, indices))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_processes_have_the_batches_of_one_in_turn(folder, monkeypatch, world_size):
    alone = load(folder, batch_size=2)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: world_size)
    together = []
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        together += load(folder, batch_size=2)
    assert len(together) == len(alone) and all(map(torch.equal, together, alone))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path, num_workers):
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
def test_bad_options_are_rejected(folder, options, message):
    with pytest.raises(ValueError, match=message):
        build_validation_loader(**{"dataset": folder, "image_size": 16, **options})


def test_a_folder_that_is_absent_is_named():
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build_validation_loader("nowhere", image_size=16)
