"""Training batches that depend on the seed and the iteration, and on nothing else.

Iteration i of a run sees the same images under the same augmentations whether the run got there in
one go or was killed and resumed, with any number of workers, and on any number of processes: each
takes its slice of one global batch. So every random choice is derived from (seed, position), where
position = iteration x total_batch_size + place in the batch counts the images of the whole run.
"""

import logging
import pickle
import random
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetFromList
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, Dataset

from crossmae_det.data.mapper import DetectionMapper, ImageError, UndecodableImageError

__all__ = [
    "DetectionMapper",
    "ImageError",
    "TrainLoader",
    "UndecodableImageError",
    "build_train_loader",
]

logger = logging.getLogger(__name__)

# How many images are tried for one place in a batch before the data set itself is to blame.
_MAX_ATTEMPTS = 10


class TrainLoader:
    """An endless iterable over training batches, each a list of what `mapper` returns.

    Epoch e goes through the data set in the order of ``np.random.default_rng([seed, e])``; batches
    may straddle two epochs. The state of the global random generators is left as it was, also
    with ``num_workers=0``.

    Args:
        dataset: records in detectron2's format, or a map-style data set of them.
        mapper: makes a model input of a record. It may return None to have another image tried,
            and draw from ``random``, ``numpy.random`` and ``torch`` (CPU), which are seeded for it.
        total_batch_size: images per iteration over all processes.
        num_workers: worker processes of each process; 0 loads in the process itself.
        seed: any number >= 0, the same in every process.
        shuffle: False goes through the data set in its own order.
        skip_undecodable: replace an `UndecodableImageError` by another image, rather than raise it.

    Attributes:
        skipped: how often each undecodable image was left out by this process, by file name.

    Raises:
        ValueError: the data set is empty, or the batch size or the seed cannot be used.
    """

    def __init__(
        self,
        dataset: Sequence[dict] | Dataset,
        mapper: Callable[[dict], dict | None],
        total_batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        skip_undecodable: bool = False,
    ):
        if len(dataset) == 0:  # type: ignore[arg-type]
            raise ValueError("the training data set is empty; check dataloader.train.dataset")
        if seed < 0:
            raise ValueError(f"seed={seed}: a reproducible loader needs a seed of 0 or more")
        if isinstance(dataset, list):  # one buffer that worker processes share
            dataset = DatasetFromList(dataset, copy=False, serialize=True)
        self.total_batch_size = total_batch_size
        self.num_workers = num_workers
        self.skipped: Counter[str] = Counter()
        self._order = _Order(len(dataset), seed, shuffle)  # type: ignore[arg-type]
        self._samples = _Samples(dataset, mapper, seed, skip_undecodable)
        self._start = 0
        self._slice()  # so that a batch size that cannot be split fails here and not in training

    def start_at(self, iteration: int) -> None:
        """Let every following ``iter()`` begin at this iteration, without loading those before."""
        if iteration < 0:
            raise ValueError(f"iteration={iteration}: must not be negative")
        self._start = iteration

    def __iter__(self) -> Iterator[list[dict]]:
        loader = DataLoader(
            self._samples,
            batch_sampler=_Batches(self._order, self.total_batch_size, self._start, *self._slice()),
            num_workers=self.num_workers,
            collate_fn=_as_list,
            # Without a generator of its own a DataLoader draws from the global one.
            generator=torch.Generator(),
        )
        return self._receive(iter(loader))

    def _slice(self) -> tuple[int, int]:
        """Return the places (from, to) of the global batch that belong to this process."""
        rank, world_size = comm.get_rank(), comm.get_world_size()
        if self.total_batch_size < 1 or self.total_batch_size % world_size:
            raise ValueError(
                f"total_batch_size={self.total_batch_size}: must be a positive multiple of the "
                f"number of processes ({world_size})"
            )
        size = self.total_batch_size // world_size
        return rank * size, (rank + 1) * size

    def _receive(self, batches: Iterator[list]) -> Iterator[list[dict]]:
        try:
            for batch in batches:
                for sample in batch:
                    if isinstance(sample, _Failure):
                        raise sample.error from _WorkerTracebackError(sample.traceback)
                    self._count(sample.pop("skipped", ()))
                yield batch
        finally:
            # An error keeps this frame; workers that are not let go of here end only 5 s later.
            del batches

    def _count(self, skipped: Sequence[str]) -> None:
        for file_name in skipped:
            self.skipped[file_name] += 1
            if self.skipped[file_name] == 1:
                logger.warning(
                    "Left out %s, which cannot be decoded (%d images so far)",
                    file_name,
                    len(self.skipped),
                )


def build_train_loader(
    dataset: Sequence[dict] | Dataset,
    *,
    mapper: Callable[[dict], dict | None],
    total_batch_size: int,
    num_workers: int = 2,
    seed: int = 0,
    shuffle: bool = True,
    skip_undecodable: bool = False,
) -> TrainLoader:
    """Build the training loader, for ``dataloader.train`` of a lazy config. See `TrainLoader`."""
    return TrainLoader(
        dataset,
        mapper,
        total_batch_size,
        num_workers=num_workers,
        seed=seed,
        shuffle=shuffle,
        skip_undecodable=skip_undecodable,
    )


class _Order:
    """position -> index into the data set."""

    def __init__(self, length: int, seed: int, shuffle: bool):
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self._epoch, self._permutation = -1, np.arange(length)

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.length)
        if not self.shuffle:
            return place
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.length)
            self._epoch = epoch
        return int(self._permutation[place])


class _Batches:
    """The batch sampler: endless lists of (position, index) for one process."""

    def __init__(self, order: _Order, total_batch_size: int, start: int, begin: int, end: int):
        self.order, self.total_batch_size, self.start = order, total_batch_size, start
        self.begin, self.end = begin, end

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.start * self.total_batch_size
        while True:
            positions = range(first + self.begin, first + self.end)
            yield [(position, self.order[position]) for position in positions]
            first += self.total_batch_size


class _Samples(Dataset):
    """(position, index) -> mapped sample. An error the user can act on is returned as `_Failure`.

    torch re-raises the exceptions of a worker with the worker's traceback inside the message.
    """

    def __init__(self, dataset: Any, mapper: Callable, seed: int, skip_undecodable: bool):
        self.dataset = dataset
        self.mapper = PicklableWrapper(mapper)  # a lambda may be sent to a worker as well
        self.seed = seed
        self.skip_undecodable = skip_undecodable

    def __getitem__(self, key: tuple[int, int]) -> "dict | _Failure":
        position, index = key
        skipped: list[str] = []
        for attempt in range(_MAX_ATTEMPTS):
            # numpy's seeds ignore trailing zeros: attempt 0 is [seed, position].
            entropy = [self.seed, position, attempt]
            if attempt:
                index = int(np.random.default_rng(entropy).integers(len(self.dataset)))
            record = self.dataset[index]
            try:
                with _seeded(entropy):
                    sample = self.mapper(record)
            except (ValueError, OSError) as error:
                if self.skip_undecodable and isinstance(error, UndecodableImageError):
                    skipped.append(error.file_name)
                    continue
                return _failure(error)
            if sample is not None:
                return {**sample, "skipped": skipped} if skipped else sample
        reason = "could be decoded" if skipped else "was accepted by the mapper"
        name = record.get("file_name", "an image without a file_name")
        return _failure(
            ValueError(f"{name}: none of {_MAX_ATTEMPTS} images drawn {reason}; check the data set")
        )


@dataclass
class _Failure:
    error: Exception
    traceback: str


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


@contextmanager
def _seeded(entropy: list[int]) -> Iterator[None]:
    """Seed ``random``, ``numpy.random`` and torch's CPU generator, and restore them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(entropy).generate_state(8, np.uint32)
    random.seed(words[:4].tobytes())
    np.random.seed(words[4:6])
    # torch.manual_seed would seed the GPUs too, whose state is not restored here.
    torch.default_generator.manual_seed(int(words[6:].view(np.uint64)[0] >> np.uint64(1)))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _as_list(batch: list) -> list:
    return batch
