"""Work in processes of its own: memory of one case is not another's, and time is taken in turns."""

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from crossmae_det.benchmark.timing import Spread, check_repeats, ratios
from crossmae_det.benchmark.work import Meter, Task

OUT_OF_MEMORY = "out of memory"
# What torch says on a CPU where there is no memory left.
CPU_ALLOCATOR = "can't allocate memory"
START_METHODS = {"cpu": "forkserver", "cuda": "spawn"}

T = TypeVar("T", bound=Task)


@dataclass
class Outcome(Generic[T]):
    """What became of a piece of work.

    Attributes:
        work: what was measured.
        seconds: of each round; empty where it failed.
        references: of each round, the mean of the reference before and after it; empty where it
            failed.
        bytes: peak memory; 0 where it failed.
        failure: why it failed, in one line; "" where it did not.
    """

    work: T
    seconds: list[float] = field(default_factory=list)
    references: list[float] = field(default_factory=list)
    bytes: int = 0
    failure: str = ""

    def against(self, first: "Outcome[T]") -> tuple[Spread | None, float | None]:
        """Time over that of ``first``, round by round, and peak memory over its; None where one of
        them failed."""
        if self.failure or first.failure:
            return None, None
        memory = self.bytes / first.bytes if first.bytes else None
        return ratios(self.seconds, first.seconds), memory

    def values(self, batch_size: int) -> dict[str, Any]:
        """What was measured with all its digits, for JSON and CSV; where it failed, only that."""
        if self.failure:
            return {"failure": self.failure}
        median = float(np.median(self.seconds))
        return {
            "failure": "",
            "median_seconds": median,
            "p90_seconds": float(np.percentile(self.seconds, 90)),
            "images_per_second": batch_size / median,
            "peak_bytes": self.bytes,
            "seconds": self.seconds,
        }


def measure(
    works: Sequence[T],
    repeats: int,
    description: str,
    reference: Callable[[], float] | None = None,
) -> list[Outcome[T]]:
    """Measure cases in turns, A B A B, each in a fresh process.

    The processes of all cases live at the same time, and one works while the others wait. A first
    round is not counted. What fails, for lack of memory or otherwise, does not stop the others.

    Args:
        works: the cases.
        repeats: rounds that count.
        description: for the progress bar.
        reference: measured here before and after each piece of work: what the machine can do then.

    Raises:
        ValueError: ``repeats`` is not positive.
    """
    check_repeats(repeats)
    outcomes = [Outcome(work) for work in works]
    workers = [_Worker(work) for work in works]
    try:
        with tqdm(total=(repeats + 1) * len(works), desc=description) as bar:
            for turn in range(repeats + 1):
                for worker, outcome in zip(workers, outcomes, strict=True):
                    if not outcome.failure:
                        before = reference() if reference else 0.0
                        seconds = worker.ask("seconds", outcome)
                        if turn and not outcome.failure:
                            outcome.seconds.append(seconds)
                            if reference:
                                outcome.references.append((before + reference()) / 2)
                    bar.update()
        for worker, outcome in zip(workers, outcomes, strict=True):
            if not outcome.failure:
                peak = worker.ask("bytes", outcome)
                outcome.bytes = 0 if outcome.failure else peak
    finally:
        for worker in workers:
            worker.stop()
    return outcomes


class _Worker:
    """A process that does one piece of work whenever it is asked."""

    def __init__(self, work: Task):
        # Not forked from this process, which may hold threads and memory of its own. Whoever uses
        # CUDA must not be forked at all from one that has only looked for a GPU, as imports do.
        method = START_METHODS[work.device]
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":  # imports once for all
            build = work.build.func if isinstance(work.build, partial) else work.build
            context.set_forkserver_preload([__name__, build.__module__])
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, what: str, outcome: Outcome) -> Any:
        """What it has measured. Where it failed, the outcome says so and the process ends: the
        memory that it holds is that of the others."""
        try:
            self._connection.send(what)
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            # Linux ends whoever asks for more memory than there is.
            killed = self._process.exitcode == -signal.SIGKILL
            answer = OUT_OF_MEMORY if killed else f"ended with {self._process.exitcode}"
        if isinstance(answer, str):
            outcome.failure = answer
            outcome.seconds.clear()
            outcome.references.clear()
            self.stop()
        return answer

    def stop(self) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()


def _serve(connection: Connection, work: Task) -> None:
    meter: Meter | None = None
    while True:
        try:
            what = connection.recv()
        except EOFError:
            return
        try:
            meter = meter or Meter(work)
            answer = getattr(meter, what)()
        except (torch.OutOfMemoryError, MemoryError):
            answer = OUT_OF_MEMORY
        except Exception as error:  # told where the results are shown, beside those of others
            text = str(error).strip() or type(error).__name__
            answer = OUT_OF_MEMORY if CPU_ALLOCATOR in text else text.splitlines()[0]
        connection.send(answer)
