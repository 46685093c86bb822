"""Interleaved measurements of time and peak memory, each case in a process of its own."""

import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.benchmark import timer
from tqdm import tqdm

from crossmae_det.benchmark.workers import Worker, WorkerError

T = TypeVar("T")

# Of autocast. fp16 without a gradient scaler: the time is the same.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What "MiB" means, by device.
MEMORY_NOTES = {
    "cpu": "MiB: peak of the process (high-water mark), over what it had before the model.",
    "cuda": "MiB: peak of CUDA's allocator.",
}


@dataclass(frozen=True)
class Spread:
    """Several measurements of one quantity: their median and their range.

    ``format(spread, spec)`` applies the specification to the three numbers (default: ".3f").
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(float(np.median(values)), min(values), max(values))

    def __format__(self, spec: str) -> str:
        median, low, high = (format(x, spec or ".3f") for x in (self.median, self.low, self.high))
        return f"{median} ({low} to {high})"


def ratios(values: Sequence[float], others: Sequence[float]) -> Spread:
    """``values`` over ``others``, round by round."""
    return Spread.of([value / other for value, other in zip(values, others, strict=True)])


def check_repeats(repeats: int) -> None:
    """Check the number of rounds.

    Raises:
        ValueError: it is not positive.
    """
    if repeats < 1:
        raise ValueError(f"the number of repeats must be at least 1, got {repeats}")


def interleaved(
    measures: Sequence[Callable[[], T]], repeats: int, description: str
) -> list[list[T]]:
    """Measure alternately, A B A B, so that the drift of a machine affects all of them equally.

    A warm-up round comes first and is dropped.

    Args:
        measures: each measures once and returns the result.
        repeats: rounds that count.
        description: for the progress bar.

    Returns:
        The ``repeats`` results of each of ``measures``. Results of the same index were measured
        in the same round, one after the other.

    Raises:
        ValueError: ``repeats`` is not positive.
    """
    check_repeats(repeats)
    results: list[list[T]] = [[] for _ in measures]
    with tqdm(total=(repeats + 1) * len(measures), desc=description) as bar:
        for _ in range(repeats + 1):
            for measure, taken in zip(measures, results, strict=True):
                taken.append(measure())
                bar.update()
    return [taken[1:] for taken in results]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something to measure in a process of its own; picklable.

    Attributes:
        name: for tables.
        build: returns the model. Its module is imported once for all processes.
        batch_size: images of a batch.
        precision: a key of :data:`PRECISIONS`, for autocast.
        device: "cpu" or "cuda".
        count_model: whether peak memory includes the model itself.
    """

    name: str
    build: Callable[[], Any]
    batch_size: int
    precision: str
    device: str
    count_model: bool = True

    def prepare(self) -> Callable[[], None]:
        """Build everything, and return the function to measure."""
        raise NotImplementedError

    def count_flops(self) -> int:
        """FLOPs of a call of that function, for its efficiency; 0 where it is not of interest."""
        return 0

    def autocast(self) -> torch.autocast:
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.device, dtype, enabled=dtype != torch.float32)


C = TypeVar("C", bound=Case)


@dataclass
class Measurement(Generic[C]):
    """The measurements of a case.

    Attributes:
        case: the case.
        seconds: of each round; empty after a failure.
        references: of each round, the mean of the reference before and after it; empty after a
            failure.
        peak_bytes: peak memory; 0 after a failure.
        failure: the reason in one line; empty without a failure.
    """

    case: C
    seconds: list[float] = field(default_factory=list)
    references: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    failure: str = ""

    def record(self, first: "Measurement[C] | None" = None) -> dict[str, Any]:
        """The measurement in full precision, as a flat record.

        Args:
            first: baseline for time (round by round) and memory.
        """
        if self.failure:
            return {"failure": self.failure}
        median = float(np.median(self.seconds))
        record: dict[str, Any] = {
            "failure": "",
            "median_seconds": median,
            "p90_seconds": float(np.percentile(self.seconds, 90)),
            "images_per_second": self.case.batch_size / median,
            "peak_bytes": self.peak_bytes,
            "seconds": self.seconds,
        }
        if first and not first.failure:
            record["time_ratio"] = ratios(self.seconds, first.seconds)
            record["memory_ratio"] = (
                self.peak_bytes / first.peak_bytes if first.peak_bytes else None
            )
        return record


def measure(
    cases: Sequence[C],
    repeats: int,
    description: str,
    reference: Callable[[], float] | None = None,
) -> list[Measurement[C]]:
    """Measure cases alternately, A B A B, each in a fresh process.

    The processes of all cases live at the same time; one works while the others wait. A warm-up
    round is not counted. A case that fails, for lack of memory or otherwise, does not stop the
    others.

    Args:
        cases: what to measure.
        repeats: rounds that count.
        description: for the progress bar.
        reference: called in this process before and after each round of each case, to measure
            the speed of the machine at that time.

    Raises:
        ValueError: ``repeats`` is not positive.
    """
    check_repeats(repeats)
    measurements = [Measurement(case) for case in cases]
    workers = [_CaseWorker(measurement) for measurement in measurements]

    def one_round(worker: _CaseWorker) -> tuple[float, float]:
        if worker.measurement.failure or reference is None:
            return worker.ask("seconds"), 0.0
        before = reference()
        return worker.ask("seconds"), (before + reference()) / 2

    try:
        rounds = interleaved([partial(one_round, each) for each in workers], repeats, description)
        for worker, measurement, taken in zip(workers, measurements, rounds, strict=True):
            measurement.peak_bytes = worker.ask("peak_bytes")
            if not measurement.failure:
                measurement.seconds = [seconds for seconds, _ in taken]
                measurement.references = [rate for _, rate in taken] if reference else []
    finally:
        for worker in workers:
            worker.stop()
    return measurements


class _CaseWorker:
    """A process that runs one case on request.

    Args:
        measurement: of the case; a failure is recorded in it.
    """

    def __init__(self, measurement: Measurement):
        self.measurement = measurement
        case = measurement.case
        build = case.build.func if isinstance(case.build, partial) else case.build
        self._worker = Worker(partial(Meter, case), case.device, [__name__, build.__module__])

    def ask(self, request: str) -> Any:
        """Call a method of the :class:`Meter` in the process and return its result.

        After a failure, which is recorded in the measurement, the result is 0 and the process ends:
        the others need its memory.
        """
        if self.measurement.failure:
            return 0
        try:
            return self._worker.ask(request)
        except WorkerError as error:
            self.measurement.failure = str(error)
            self.stop()
            return 0

    def stop(self) -> None:
        self._worker.stop()


class Meter:
    """Time and memory of a case, in the process that runs it.

    On a CPU, memory is the high-water mark of the process over what it had before the model was
    built or, where the model does not count, after; on CUDA, that of the allocator.

    Args:
        case: what to measure.
    """

    def __init__(self, case: Case):
        self.cuda = case.device == "cuda"
        # torch's timer waits for the GPU. On a CPU it must not even look for one: this process may
        # be forked.
        self._clock = timer if self.cuda else time.perf_counter
        before = self._memory()
        self._run = case.prepare()
        self._before = before if case.count_model else self._memory()

    def _memory(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else _process_memory("VmRSS")

    def seconds(self) -> float:
        """Run the case once.

        On CUDA it first runs once untimed, to fill torch's memory cache, and releases that cache
        afterwards, for the processes that wait.
        """
        if self.cuda:
            self._run()
        start = self._clock()
        self._run()
        seconds = self._clock() - start
        if self.cuda:
            torch.cuda.empty_cache()
        return seconds

    def peak_bytes(self) -> int:
        """Peak memory since the beginning."""
        peak = torch.cuda.max_memory_allocated() if self.cuda else _process_memory("VmHWM")
        return max(0, peak - self._before)


def _process_memory(field: str) -> int:
    """Bytes of memory of this process: current ("VmRSS") or peak ("VmHWM")."""
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux: the peak so far, for both
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    match = re.search(rf"{field}:\s+(\d+) kB", status.read_text())
    assert match is not None
    return 1024 * int(match[1])
