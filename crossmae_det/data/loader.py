"""Training batches that depend on the seed and the iteration only.

Iteration i of a run has the same images under the same augmentations whether the run got there
without a stop or was killed and resumed, with any number of workers, and on any number of
processes, of which each takes its slice of one global batch. To that end every random choice is
derived from (seed, position), where position = iteration x total_batch_size + index in the batch
counts the images of the whole run. A run that is resumed with another batch size continues at the
position that it has reached.
"""

import itertools
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

# Images that are tried for one position before the dataset is considered broken.
_MAX_ATTEMPTS = 10

_ADVICE = (
    ": replace the file, remove it from the dataset, or pass"
    " dataloader.train.skip_undecodable=True to skip such images"
)


def process_rank() -> tuple[int, int]:
    """(rank, world size) of this process; (0, 1) without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class ResumableLoader:
    """An endless iterable over training batches, each made by ``collate`` from a list of samples.

    Epoch e goes through the dataset in the order that ``np.random.default_rng([seed, e])`` gives:
    its ``permutation`` of the length, or ``dataset.permutation(rng)`` where the dataset has that
    method. Batches may straddle two epochs. The global random generators are left unchanged, also
    with ``num_workers=0``.

    Args:
        dataset: items by index, with a length.
        load: makes a sample from an item and the seed_sequence, a list of ints >= 0 that every
            random choice for this sample must be seeded with. It may return None to have another
            item tried.
        total_batch_size: samples per iteration over all processes.
        num_workers: worker processes of each process; 0 loads in the process itself.
        seed: an int >= 0, the same in every process.
        shuffle: False goes through the dataset in its own order.
        skip_undecodable: replace an `UndecodableImageError` by another item instead of raising it.
        collate: makes a batch from a list of samples, in the worker.
        pin_memory: return tensors in page-locked memory, which is copied to a GPU faster.
        worker_init: called with its number in each worker process, before anything is loaded.

    Attributes:
        skipped: how often this process skipped each undecodable image, by file name.

    Raises:
        ValueError: the dataset is empty, or the batch size or the seed is out of range.
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
        self._samples = _Samples(dataset, load, seed, skip_undecodable)
        self._collate = _Collate(collate)
        self._shuffle = shuffle
        self._pin_memory = pin_memory
        self._worker_init = worker_init
        self._start = 0  # position of the first image
        self._slice()  # so that a batch size that cannot be split fails here and not in training

    def start_at(self, iteration: int, offset: int = 0) -> None:
        """Start every following ``iter()`` at this iteration, without loading those before.

        Args:
            iteration: counted in batches of ``total_batch_size``.
            offset: further images to skip, fewer than a batch: those that a run resumed with
                another batch size has seen beyond ``iteration`` batches.

        Raises:
            ValueError: one of them is negative.
        """
        if min(iteration, offset) < 0:
            raise ValueError(f"iteration={iteration}, offset={offset}: must not be negative")
        self._start = iteration * self.total_batch_size + offset

    def __iter__(self) -> Iterator[Any]:
        loader = DataLoader(
            self._samples,
            batch_sampler=self._batches(self._start, *self._slice()),
            num_workers=self.num_workers,
            collate_fn=self._collate,
            pin_memory=self._pin_memory,
            worker_init_fn=self._worker_init,
            # Without a generator, a DataLoader draws from the global one.
            generator=torch.Generator(),
        )
        return self._receive(iter(loader))

    def _slice(self) -> tuple[int, int]:
        """The indices (from, to) in the global batch that belong to this process."""
        rank, world_size = process_rank()
        if self.total_batch_size < 1 or self.total_batch_size % world_size:
            raise ValueError(
                f"total_batch_size={self.total_batch_size}: must be a positive multiple of the "
                f"number of processes ({world_size})"
            )
        size = self.total_batch_size // world_size
        return rank * size, (rank + 1) * size

    def _batches(self, start: int, begin: int, end: int) -> Iterator[list[tuple[int, int]]]:
        """Endless lists of (position, index into the dataset) for this process."""
        length = len(self._samples.dataset)
        epoch, order = -1, range(length)
        for first in itertools.count(start, self.total_batch_size):
            batch = []
            for position in range(first + begin, first + end):
                if self._shuffle and epoch != position // length:
                    epoch = position // length
                    order = self._permutation(np.random.default_rng([self._samples.seed, epoch]))
                batch.append((position, int(order[position % length])))
            yield batch

    def _permutation(self, rng: np.random.Generator) -> Any:
        dataset = self._samples.dataset
        if hasattr(dataset, "permutation"):
            return dataset.permutation(rng)
        return rng.permutation(len(dataset))

    def _receive(self, batches: Iterator["_Loaded | _Failure"]) -> Iterator[Any]:
        try:
            for batch in batches:
                if isinstance(batch, _Failure):
                    raise batch.error from _WorkerTracebackError(batch.traceback)
                for name in batch.skipped:
                    self.skipped[name] += 1
                    if self.skipped[name] == 1:
                        count = len(self.skipped)
                        logger.warning("Skipped undecodable %s (%d images so far)", name, count)
                yield batch.content
        finally:
            # An error keeps this frame, and with it the workers, which then end 5 s later.
            del batches


class _Loaded(NamedTuple):
    """A sample or a batch, and the undecodable images that were skipped for it.

    A tuple because torch pins the memory of the tensors in one.
    """

    content: Any
    skipped: list[str]


@dataclass
class _Failure:
    """An error to be raised in the main process."""

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
        loaded = []
        for sample in samples:
            if isinstance(sample, _Failure):
                return sample
            loaded.append(sample)
        skipped = [name for sample in loaded for name in sample.skipped]
        return _Loaded(self.collate([sample.content for sample in loaded]), skipped)


class _WorkerTracebackError(Exception):
    """Where a worker raised; the cause of the error it is chained to."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _failure(error: Exception) -> _Failure:
    """Wrap an error, or raise it where it cannot be sent between processes."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception may hold anything; a worker that cannot send it would hang
        raise error from None
    return _Failure(error, "".join(traceback.format_exception(error)))
