"""The training loader for detection: see `crossmae_det.sampling` for what it guarantees."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.data import DatasetFromList
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import Dataset

from crossmae_det.sampling import ResumableLoader


class TrainLoader(ResumableLoader):
    """An endless iterable over training batches, each a list of what `mapper` returns.

    Args:
        dataset: records in detectron2's format, or a map-style data set of them.
        mapper: makes a model input of a record. It may return None to have another image tried,
            and draw from ``random``, ``numpy.random`` and ``torch`` (CPU), which are seeded for it.
        total_batch_size: images per iteration over all processes.
        num_workers: worker processes of each process; 0 loads in the process itself.
        seed: any number >= 0, the same in every process.
        skip_undecodable: replace an `UndecodableImageError` by another image, rather than raise it.

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
        skip_undecodable: bool = False,
    ):
        if isinstance(dataset, list) and dataset:  # one buffer that worker processes share
            dataset = DatasetFromList(dataset, copy=False, serialize=True)
        super().__init__(
            dataset,
            _SeededMapper(mapper),
            total_batch_size,
            num_workers=num_workers,
            seed=seed,
            skip_undecodable=skip_undecodable,
        )


class _SeededMapper:
    """A mapper that draws from the global generators, with these seeded for each record."""

    def __init__(self, mapper: Callable[[dict], dict | None]):
        self.mapper = PicklableWrapper(mapper)  # a lambda may be sent to a worker as well

    def __call__(self, record: dict, entropy: list[int]) -> dict | None:
        with _seeded(entropy):
            return self.mapper(record)


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
