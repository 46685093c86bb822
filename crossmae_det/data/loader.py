"""Training batches that depend on the seed and the iteration, and on nothing else.

Iteration i of a run sees the same images under the same augmentations whether the run got there in
one go or was killed and resumed, with any number of workers, and on any number of processes: each
takes its slice of one global batch. So every random choice is derived from (seed, position), where
position = iteration x total_batch_size + place in the batch counts the images of the whole run. A
run that is resumed with another batch size goes on at the position that it has reached.
"""

import logging
import pickle
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import distributed
from torch.utils.data import DataLoader, Dataset

from crossmae_det.utils.image_reading import UndecodableImageError

logger = logging.getLogger(__name__)


# How many images are tried for one place in a batch before the dataset itself is to blame.
_MAX_ATTEMPTS = 10


_ADVICE = (
    ": replace the file, take it out of the dataset, or pass"
    " dataloader.train.skip_undecodable=True to skip such images"
)


class ResumableLoader:
    """An endless iterable over training batches, each what ``collate`` makes of a list of samples.

    Epoch e goes through the dataset in the order of ``np.random.default_rng([seed, e])``: its
    ``permutation`` of the length, or, where the dataset has a method ``permutation`` itself, what
    that makes of the generator. Batches may straddle two epochs. The state of the global random
    generators is left as it was, also with ``num_workers=0``.

    Args:
        dataset: items by index, with a length.
        load: makes a sample of an item and of the seed_sequence, a list of numbers >= 0 that every
            random choice for this sample is to be seeded with. It may return None to have another
            item tried.
        total_batch_size: samples per iteration over all processes.
        num_workers: worker processes of each process; 0 loads in the process itself.
        seed: any number >= 0, the same in every process.
        shuffle: False goes through the dataset in its own order.
        skip_undecodable: replace an `UndecodableImageError` by another item, rather than raise it.
        collate: makes a batch of a list of samples, in the worker.
        pin_memory: give tensors in page-locked memory, from where they get to a GPU faster.
        worker_init: called with its number in each worker process, before anything is loaded.

    Attributes:
        skipped: how often each undecodable image was left out by this process, by file name.

    Raises:
        ValueError: the dataset is empty, or the batch size or the seed cannot be used.
    """

    def __init__(
        self,
        dataset: Sequence | Dataset,
        load: Callable[[Any, list[int]], Any],
        total_batch_size: int,
        *,
        num_workers: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        skip_undecodable: bool = False,
        collate: Callable[[list], Any] = list,
        pin_memory: bool = False,
        worker_init: Callable[[int], None] | None = None,
    ):
        if len(dataset) == 0:  # type: ignore[arg-type]
            raise ValueError("the training dataset is empty; check dataloader.train.dataset")
        if seed < 0:
            raise ValueError(f"seed={seed}: a reproducible loader needs a seed of 0 or more")
        self.total_batch_size = total_batch_size
        self.num_workers = num_workers
        self.skipped: Counter[str] = Counter()
        self._order = _Order(dataset, seed, shuffle)
        self._samples = _Samples(dataset, load, seed, skip_undecodable)
        self._collate = _Collate(collate)
        self._pin_memory = pin_memory
        self._worker_init = worker_init
        self._start = 0  # in images
        self._slice()  # so that a batch size that cannot be split fails here and not in training

    def start_at(self, iteration: int, offset: int = 0) -> None:
        """Let every following ``iter()`` begin at this iteration, without loading those before.

        Args:
            iteration: counted in batches of ``total_batch_size``.
            offset: images to leave out as well, fewer than a batch: what a run that has been
                resumed with another batch size has seen beyond ``iteration`` batches.

        Raises:
            ValueError: one of them is negative.
        """
        if min(iteration, offset) < 0:
            raise ValueError(f"iteration={iteration}, offset={offset}: must not be negative")
        self._start = iteration * self.total_batch_size + offset

    def __iter__(self) -> Iterator[Any]:
        loader = DataLoader(
            self._samples,
            batch_sampler=_Batches(self._order, self.total_batch_size, self._start, *self._slice()),
            num_workers=self.num_workers,
            collate_fn=self._collate,
            pin_memory=self._pin_memory,
            worker_init_fn=self._worker_init,
            # Without a generator of its own a DataLoader draws from the global one.
            generator=torch.Generator(),
        )
        return self._receive(iter(loader))

    def _slice(self) -> tuple[int, int]:
        """Return the places (from, to) of the global batch that belong to this process."""
        rank, world_size = 0, 1
        if distributed.is_available() and distributed.is_initialized():
            rank, world_size = distributed.get_rank(), distributed.get_world_size()
        if self.total_batch_size < 1 or self.total_batch_size % world_size:
            raise ValueError(
                f"total_batch_size={self.total_batch_size}: must be a positive multiple of the "
                f"number of processes ({world_size})"
            )
        size = self.total_batch_size // world_size
        return rank * size, (rank + 1) * size

    def _receive(self, batches: Iterator["_Loaded | _Failure"]) -> Iterator[Any]:
        try:
            for batch in batches:
                if isinstance(batch, _Failure):
                    raise batch.error from _WorkerTracebackError(batch.traceback)
                self._count(batch.skipped)
                yield batch.content
        finally:
            # An error keeps this frame; workers that are not let go of here end only 5 s later.
            del batches

    def _count(self, skipped: Sequence[str]) -> None:
        for file_name in skipped:
            self.skipped[file_name] += 1
            if self.skipped[file_name] == 1:
                logger.warning(
                    "Skipped %s, which cannot be decoded (%d images so far)",
                    file_name,
                    len(self.skipped),
                )


class _Order:
    """position -> index into the dataset."""

    def __init__(self, dataset: Any, seed: int, shuffle: bool):
        self.length, self.seed, self.shuffle = len(dataset), seed, shuffle
        self._permute = getattr(dataset, "permutation", self._uniform)
        self._epoch, self._permutation = -1, np.arange(0)

    def _uniform(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(self.length)

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.length)
        if not self.shuffle:
            return place
        if epoch != self._epoch:
            self._permutation = self._permute(np.random.default_rng([self.seed, epoch]))
            self._epoch = epoch
        return int(self._permutation[place])


class _Batches:
    """The batch sampler: endless lists of (position, index) for one process."""

    def __init__(self, order: _Order, total_batch_size: int, start: int, begin: int, end: int):
        self.order, self.total_batch_size = order, total_batch_size
        self.start = start  # position of the first image
        self.begin, self.end = begin, end

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.start
        while True:
            positions = range(first + self.begin, first + self.end)
            yield [(position, self.order[position]) for position in positions]
            first += self.total_batch_size


class _Loaded(NamedTuple):
    """A sample or a batch, and the images that were left out on the way to it."""

    content: Any
    skipped: list[str]


@dataclass
class _Failure:
    error: Exception
    traceback: str


class _Samples(Dataset):
    """(position, index) -> sample. An error the user can act on is returned as `_Failure`.

    torch re-raises the exceptions of a worker with the worker's traceback inside the message.
    """

    def __init__(self, dataset: Any, load: Callable, seed: int, skip_undecodable: bool):
        self.dataset = dataset
        self.load = load
        self.seed = seed
        self.skip_undecodable = skip_undecodable

    def __getitem__(self, key: tuple[int, int]) -> _Loaded | _Failure:
        position, index = key
        skipped: list[str] = []
        for attempt in range(_MAX_ATTEMPTS):
            # numpy's seeds ignore trailing zeros: attempt 0 is [seed, position].
            seed_sequence = [self.seed, position, attempt]
            if attempt:
                index = int(np.random.default_rng(seed_sequence).integers(len(self.dataset)))
            item = self.dataset[index]
            try:
                content = self.load(item, seed_sequence)
            except (ValueError, OSError) as error:
                if isinstance(error, UndecodableImageError):
                    if self.skip_undecodable:
                        skipped.append(error.file_name)
                        continue
                    error.args = (f"{error}{_ADVICE}", *error.args[1:])
                return _failure(error)
            if content is not None:
                return _Loaded(content, skipped)
        reason = "could be decoded" if skipped else "was accepted by the mapper"
        name = item
        if isinstance(item, dict):  # a record in detectron2's format
            name = item.get("file_name", "an image without a file_name")
        return _failure(
            ValueError(f"{name}: none of {_MAX_ATTEMPTS} images drawn {reason}; check the dataset")
        )


class _Collate:
    """A list of samples -> a batch, or the first failure among them."""

    def __init__(self, collate: Callable[[list], Any]):
        self.collate = collate

    def __call__(self, samples: list[_Loaded | _Failure]) -> _Loaded | _Failure:
        contents, skipped = [], []
        for sample in samples:
            if isinstance(sample, _Failure):
                return sample
            contents.append(sample.content)
            skipped += sample.skipped
        return _Loaded(self.collate(contents), skipped)


class _WorkerTracebackError(Exception):
    """Where a worker raised; the cause of the error it is chained to."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _failure(error: Exception) -> _Failure:
    """Wrap an error to be raised in the main process, or raise it where it cannot travel."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception may hold anything; a worker that cannot send it would hang
        raise error from None
    return _Failure(error, "".join(traceback.format_exception(error)))
