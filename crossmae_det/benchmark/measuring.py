"""Measurements in turns, and what is said about them.

What is measured of a backbone: a forward pass or a step of training, in a process of its own.

Legend: N images, S side of an image in pixels.

Work in processes of its own: memory of one case is not another's, and time is taken in turns.
"""

import multiprocessing
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.utils.benchmark import timer
from tqdm import tqdm

from crossmae_det.engine.trainer import training_step

T = TypeVar("T")


def check_repeats(repeats: int) -> None:
    """Refuse a number of rounds that measures nothing.

    Raises:
        ValueError: it is not positive.
    """
    if repeats < 1:
        raise ValueError(f"the number of repeats must be at least 1, got {repeats}")


def interleaved(
    measures: Sequence[Callable[[], T]], repeats: int, description: str
) -> list[list[T]]:
    """Measure in turns, A B A B, so that a machine that drifts does so for all of them alike.

    One round more than asked for comes first and is dropped: it fills caches and makes the
    optimizers' state.

    Args:
        measures: each does the work once and returns what it measured.
        repeats: rounds that count.
        description: for the progress bar.

    Returns:
        For each of ``measures``, its ``repeats`` results. Those at one index were taken in one
        round, one after the other.

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


@dataclass(frozen=True)
class Spread:
    """Several measurements of one quantity: the median, and from the lowest to the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(float(np.median(values)), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratios(values: Sequence[float], others: Sequence[float]) -> Spread:
    """``values`` over ``others``, round by round."""
    return Spread.of([value / other for value, other in zip(values, others, strict=True)])


# Of autocast. fp16 without a gradient scaler: what is timed is the same.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What is measured of a backbone: by itself, with its pyramid, or inside a detector.
PARTS = ("alone", "pyramid", "detector")

# Side of images that take next to no memory.
SMALL = 64

# What "MiB" is, by device.
MEMORY_NOTES = {
    "cpu": "MiB: peak, the high-water mark of a process of its own, over what it had before.",
    "cuda": "MiB: peak, of CUDA's allocator.",
}

# Objects in a training image of noise; COCO's images have seven.
OBJECTS = 7


class Task(Protocol):
    """What can be measured in a process of its own, and so is picklable.

    Attributes:
        build: makes what is measured; its module is imported once for all processes.
        device: "cpu" or "cuda".
        count_model: whether peak memory counts what the model itself takes.
    """

    @property
    def build(self) -> Callable[[], Any]: ...

    @property
    def device(self) -> str: ...

    @property
    def count_model(self) -> bool: ...

    def prepare(self) -> Callable[[], None]:
        """Build it; what does the work once is returned."""


@dataclass(frozen=True)
class Work:
    """One case of a comparison of backbones.

    Attributes:
        name: of the backbone.
        build: makes the model.
        part: one of :data:`PARTS`. A "detector" is one of detectron2, the others map images
            (N, 3, S, S) to maps.
        image_size: S.
        batch_size: N.
        train: forward, backward and optimizer (AdamW); else forward without gradients.
        precision: a key of :data:`PRECISIONS`, by autocast.
        device: "cpu" or "cuda".
        compiled: compile the model, of a detector the backbone.
        count_model: whether peak memory counts what the model itself takes.
    """

    name: str
    build: Callable[[], nn.Module]
    part: str
    image_size: int
    batch_size: int
    train: bool
    precision: str
    device: str
    compiled: bool = False
    count_model: bool = True

    def inputs(self) -> Any:
        """A batch of noise: (N, 3, S, S) floats, or what a detector of detectron2 takes."""
        n, side = self.batch_size, self.image_size
        if self.part == "detector":
            return [_detector_input(side, self.train) for _ in range(n)]
        return torch.randn(n, 3, side, side, device=self.device)

    def prepare(self) -> Callable[[], None]:
        """Build the model; what does the work once is returned."""
        device = torch.device(self.device)
        torch.manual_seed(0)
        model = self.build().to(device).train(self.train)
        if self.compiled:
            compiled: Any = model.backbone if self.part == "detector" else model
            compiled.compile()
        dtype = PRECISIONS[self.precision]
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True) if self.train else None

        def forward(inputs: Any) -> dict[str, Tensor]:
            with (
                EventStorage(),  # detectors note their losses in one
                torch.set_grad_enabled(self.train),
                torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
            ):
                outputs = model(inputs)
            # A scalar for every map, as a detector has losses.
            return {k: v.float().pow(2).mean() for k, v in outputs.items()} if self.train else {}

        def run(inputs: Any) -> None:
            if optimizer is None:
                forward(inputs)
            else:
                training_step(inputs, forward, optimizer)
                optimizer.zero_grad()

        if not self.count_model:
            # At the first call threads and libraries take memory, too.
            run(replace(self, image_size=SMALL).inputs())
        return partial(run, self.inputs())


def check_sizes(image_sizes: Sequence[int], batch_sizes: Sequence[int]) -> None:
    """Refuse sizes that not every backbone can take.

    Raises:
        ValueError: a side that is no positive multiple of 32, the coarsest stride, or no image.
    """
    for size in image_sizes:
        if size < 32 or size % 32:
            raise ValueError(
                f"images of {size} pixels do not divide into the coarsest stride of most backbones:"
                f" take a multiple of 32, {max(32, round(size / 32) * 32)} say"
            )
    for batch in batch_sizes:
        if batch < 1:
            raise ValueError(f"the batch size must be at least 1, got {batch}")


def _detector_input(side: int, train: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, side, side), dtype=torch.uint8, generator=generator)
    result: dict[str, Any] = {"image": image, "height": side, "width": side}
    if train:
        corners = torch.rand(OBJECTS, 2, generator=generator) * side / 2
        boxes = torch.cat([corners, corners + side / 4], dim=1)
        masks = torch.zeros(OBJECTS, side, side, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = True
        result["instances"] = Instances(
            (side, side),
            gt_boxes=Boxes(boxes),
            gt_classes=torch.zeros(OBJECTS, dtype=torch.int64),
            gt_masks=BitMasks(masks),
        )
    return result


class Meter:
    """Time and memory of a piece of work, in the process that it is made in.

    On a CPU the memory is the process's own high-water mark, over what it had before the model was
    built or, where the model is not to count, after; on CUDA the allocator's.

    Args:
        work: what is measured.
    """

    def __init__(self, work: Task):
        self.cuda = work.device == "cuda"
        self._clock = timer if self.cuda else time.perf_counter
        before = self._now()
        self._run = work.prepare()
        self._before = before if work.count_model else self._now()

    def _now(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else _resident("VmRSS")

    def seconds(self) -> float:
        """Do the work once. On CUDA torch's timer waits for the GPU; where there is none to wait
        for, it may not even look for one: this process can be forked.

        On CUDA it is done once before, and the memory is given back after: other processes wait for
        their turn with the same memory, and asking the driver for it takes time.
        """
        if self.cuda:
            self._run()
        start = self._clock()
        self._run()
        seconds = self._clock() - start
        if self.cuda:
            torch.cuda.empty_cache()
        return seconds

    def bytes(self) -> int:
        """Peak memory since the beginning."""
        peak = torch.cuda.max_memory_allocated() if self.cuda else _resident("VmHWM")
        return max(0, peak - self._before)


def _resident(field: str) -> int:
    """Bytes of this process's memory: now ("VmRSS") or at most ("VmHWM")."""
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux: the most there has been so far
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    match = re.search(rf"{field}:\s+(\d+) kB", status.read_text())
    assert match is not None
    return 1024 * int(match[1])


OUT_OF_MEMORY = "out of memory"

# What torch says on a CPU where there is no memory left.
CPU_ALLOCATOR = "can't allocate memory"

START_METHODS = {"cpu": "forkserver", "cuda": "spawn"}


W = TypeVar("W", bound=Task)


@dataclass
class Outcome(Generic[W]):
    """What became of a piece of work.

    Attributes:
        work: what was measured.
        seconds: of each round; empty where it failed.
        references: of each round, the mean of the reference before and after it; empty where it
            failed.
        bytes: peak memory; 0 where it failed.
        failure: why it failed, in one line; "" where it did not.
    """

    work: W
    seconds: list[float] = field(default_factory=list)
    references: list[float] = field(default_factory=list)
    bytes: int = 0
    failure: str = ""

    def against(self, first: "Outcome[W]") -> tuple[Spread | None, float | None]:
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
    works: Sequence[W],
    repeats: int,
    description: str,
    reference: Callable[[], float] | None = None,
) -> list[Outcome[W]]:
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
