"""The loader alone; tests of each task cover it with their kind of data."""

import itertools

import pytest
import torch
from shorthand import take

from crossmae_det.data import ResumableLoader
from crossmae_det.utils.image_reading import UndecodableImageError


class Reversed:
    """Ten numbers whose order in an epoch is descending."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index

    def permutation(self, rng):
        return torch.arange(9, -1, -1).numpy()


def load(item, seed_sequence):
    if item == 7:
        raise UndecodableImageError("seven", "7.jpg")
    return torch.tensor([item, *seed_sequence])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_dataset_may_define_the_order_of_an_epoch(num_workers):
    options = {"num_workers": num_workers, "skip_undecodable": True, "collate": torch.stack}
    loader = ResumableLoader(Reversed(), load, 4, seed=3, **options)
    first, second, third = take(loader, 3)
    assert first[:, 0].tolist()[:2] == [9, 8] and first[3, 0] == 6
    assert first[2, 0] != 7 and loader.skipped == {"7.jpg": 1}
    assert first[:, 1:].tolist() == [[3, 0, 0], [3, 1, 0], [3, 2, 1], [3, 3, 0]]
    assert second[:, 0].tolist() == [5, 4, 3, 2]
    assert third[:, 0].tolist()[:3] == [1, 0, 9]
    loader.start_at(1)
    assert torch.equal(take(loader, 1)[0], second)


def test_a_loader_starts_at_any_image():
    loader = ResumableLoader(range(7), lambda item, seed_sequence: item, 3)
    images = list(itertools.chain.from_iterable(take(loader, 6)))
    loader.start_at(1, offset=2)
    assert take(loader, 2) == [images[5:8], images[8:11]]
    with pytest.raises(ValueError):
        loader.start_at(1, offset=-1)


def test_without_shuffling_the_order_is_that_of_the_dataset():
    batches = take(ResumableLoader(Reversed(), load, 5, shuffle=False), 1)
    assert [sample[0].item() for sample in batches[0]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_failure_is_raised_for_its_batch(num_workers):
    loader = ResumableLoader(Reversed(), load, 4, num_workers=num_workers)
    with pytest.raises(UndecodableImageError, match="^seven: .*skip_undecodable=True") as error:
        take(loader, 1)
    assert error.value.file_name == "7.jpg"


def test_workers_are_initialized(tmp_path):
    def init(worker):
        (tmp_path / f"worker-{worker}").touch()

    take(ResumableLoader(Reversed(), load, 1, num_workers=1, worker_init=init), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["worker-0"]
