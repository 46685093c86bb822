"""What a training step measured: computed on the device, read without waiting for it.

A step's losses, the norm of its gradient and whether one of them is not finite are one small tensor
on the device. Its copy to the host is queued behind the step, and is read when the host has queued
the next one: by then the device has finished the first.

Legend: P parts of a batch, each with its losses.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.utils import comm
from torch import Tensor


class Part(NamedTuple):
    """A part of a batch: its losses, and its images for a message."""

    losses: Mapping[str, Tensor]  # detached scalars
    images: str


class StepRecord:
    """The losses and the gradient norm of a step, on the way from the device to the host.

    Every process of a job creates the record of the same step, since they exchange whether a loss
    is not finite.

    Args:
        iteration: of the step.
        data_time: seconds that the batch was waited for.
        parts: the P parts of the batch.
        losses: the losses of the whole batch by name, scalars.
        norm: of the gradient, a scalar; the same in every process.
        images: of the whole batch, for a message.
        loss_scale: what the losses were multiplied by for fp16, a scalar; None for none. Such
            gradients overflow now and then by design; with a scale below 1 it is not the cause.

    Attributes:
        skip: scalar in float32, on the device: 1 if the step must change nothing, else 0. That is
            so if a loss or the norm is not finite, for fp16 also while the scale is at fault.
    """

    def __init__(
        self,
        *,
        iteration: int,
        data_time: float,
        parts: Sequence[Part],
        losses: Mapping[str, Tensor],
        norm: Tensor,
        images: str,
        loss_scale: Tensor | None = None,
    ):
        self.iteration = iteration
        self.data_time = data_time
        self.images = images
        self._part_names = [(tuple(part.losses), part.images) for part in parts]
        self._loss_names = tuple(losses)
        part_losses = torch.stack([loss for part in parts for loss in part.losses.values()])
        bad_loss = (~part_losses.isfinite()).any().float()
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(bad_loss, torch.distributed.ReduceOp.MAX)
        overflow = (~norm.isfinite()).float()
        bad_norm = overflow if loss_scale is None else overflow * (loss_scale < 1)
        self.skip = torch.maximum(bad_loss, overflow)
        flags = torch.stack([norm.detach().float(), bad_loss, bad_norm])
        values = torch.cat([torch.stack([*losses.values()]), part_losses, flags])
        # A copy that does not block is in page-locked memory.
        self._values = values.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._read: list[float] | None = None

    def _floats(self) -> list[float]:
        if self._read is None:
            if self._copied is not None:
                self._copied.synchronize()
            self._read = self._values.numpy().tolist()
        return self._read

    @property
    def losses(self) -> dict[str, float]:
        """The losses of the whole batch. Waits for the step."""
        return dict(zip(self._loss_names, self._floats(), strict=False))

    @property
    def norm(self) -> float:
        """The norm of the gradient. Waits for the step."""
        return self._floats()[-3]

    def failure(self) -> str:
        """What was not finite, in any process, and in which images; "" if nothing was.

        The same in every process, each of which calls it. Waits for the step.
        """
        bad_loss, bad_norm = self._floats()[-2:]
        if not (bad_loss or bad_norm):
            return ""
        # A loss that is not finite in one process is the cause of the norm in all of them.
        here = self._bad_losses() if bad_loss else f"the gradient's norm is {self.norm}"
        if here and not bad_loss:
            here = f"{here} (images: {self.images})"
        return "; ".join(filter(None, comm.all_gather(here)))

    def _bad_losses(self) -> str:
        values = iter(self._floats()[len(self._loss_names) : -3])
        messages = []
        for names, images in self._part_names:
            part = [(name, next(values)) for name in names]
            bad = [f"{name} is {value}" for name, value in part if not math.isfinite(value)]
            if bad:
                messages.append(f"{', '.join(bad)} (images: {images})")
        return "; ".join(messages)


def image_names(samples: Any) -> str:
    """The images of a batch for a message: file names if the samples have them."""
    if isinstance(samples, list) and all(isinstance(sample, dict) for sample in samples):
        return ", ".join(str(sample.get("file_name", "unnamed")) for sample in samples)
    return f"a batch of {len(samples)}"
