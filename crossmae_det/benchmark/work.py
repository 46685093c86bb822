"""What is measured of a backbone: a forward pass or a step of training, in a process of its own.

Legend: N images, S side of an image in pixels.
"""

import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.utils.benchmark import timer

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

        def run(inputs: Any) -> None:
            with (
                EventStorage(),  # detectors note their losses in one
                torch.set_grad_enabled(self.train),
                torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
            ):
                outputs = model(inputs)
            if optimizer is not None:
                _loss(outputs).backward()
                optimizer.step()
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


def _loss(outputs: dict[str, Tensor]) -> Tensor:
    """A scalar that depends on every map, or on every loss of a detector."""
    return torch.stack([output.float().pow(2).mean() for output in outputs.values()]).sum()


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
