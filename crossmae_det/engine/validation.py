"""The training loss on images that are not trained on."""

import logging
import random
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from timm.layers import DropPath
from torch import nn
from torch.distributed.fsdp import FSDPModule

from crossmae_det.engine.hooks import unwrap
from crossmae_det.engine.trainer import autocast

logger = logging.getLogger(__name__)

PREFIX = "val/"
TOTAL = f"{PREFIX}total_loss"

# Modules that draw random numbers in training, or update their state: they run as in evaluation.
NOISE = (DropPath, nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)


class Batches(Iterable, Sized, Protocol):
    """The batches of this process, in order; those of all processes follow each other by rank."""


class ValidationLoss(HookBase):
    """Compute the losses of the model on a validation set, every so often and at the end.

    They are logged as "val/total_loss" and "val/NAME", in every process. See :func:`losses_on`.

    Args:
        data_loader: batches as the model takes them in training, with their ground truth and
            without random augmentation.
        period: in iterations; 0 for the end of the run only.
        amp_dtype: the precision of the run: "bf16", "fp16" or None.
        seed: decides the random choices of the model.
    """

    def __init__(self, data_loader: Batches, period: int, amp_dtype: str | None, seed: int = 0):
        self.data_loader = data_loader
        self.period = period
        self.amp_dtype = amp_dtype
        self.seed = seed
        self.measured_iter = -1

    def after_step(self) -> None:
        if self.period and (self.trainer.iter + 1) % self.period == 0:
            self._measure(self.trainer.iter)

    def after_train(self) -> None:
        last = self.trainer.iter - 1
        if self.trainer.iter >= self.trainer.max_iter and self.measured_iter != last:
            self._measure(last)

    def _measure(self, iteration: int) -> None:
        losses = losses_on(
            unwrap(self.trainer.model), self.data_loader, self.amp_dtype, seed=self.seed
        )
        self.measured_iter = iteration
        named = {f"{PREFIX}{name}": value for name, value in losses.items()}
        self.trainer.storage.put_scalars(**named, smoothing_hint=False)
        values = "  ".join(f"{name}: {value:.4g}" for name, value in named.items())
        logger.info("Validation after %d iterations: %s", iteration + 1, values)


def losses_on(
    model: nn.Module, data_loader: Batches, amp_dtype: str | None = None, *, seed: int = 0
) -> dict[str, float]:
    """The losses of a model on a set of images, without any change to the model.

    The model is in training mode, in which alone detectron2's models give losses, but for drop
    path, dropout and norms with running statistics, which do as in evaluation. What is drawn at
    random (proposals, masks of patches) depends on the seed and the place of the batch in the set
    alone: two calls give the same values for the same weights. The random state of the process, the
    modes of the modules and the training's metrics are left as they were.

    Args:
        model: takes a batch, returns a dict of scalar losses.
        data_loader: the batches of this process. Processes may have different numbers of them.
        amp_dtype: "bf16", "fp16" or None.
        seed: any number >= 0.

    Returns:
        The mean over the images of all processes of each loss, and their sum as "total_loss"; the
        same in every process.

    Raises:
        ValueError: there is no image, or, for a model that is spread over processes, fewer batches
            than processes.
    """
    device = next(model.parameters()).device
    counts = comm.all_gather(len(data_loader))
    if not sum(counts):
        raise ValueError("the validation set has no image: check dataloader.validation")
    spread = isinstance(model, FSDPModule)
    if spread and not min(counts):
        raise ValueError(
            f"the validation set has {sum(counts)} batches for {len(counts)} processes: add images"
            " or make dataloader.validation.batch_size smaller"
        )
    # A model whose parts are spread over the processes needs all of them for every batch.
    rounds = max(counts) if spread else len(data_loader)
    first = sum(counts[: comm.get_rank()])
    sums: dict[str, float] = {}
    images = 0
    # What detectron2's heads log in training goes into a storage that is thrown away.
    with _as_in_training(model), _own_randomness(device), EventStorage(), torch.no_grad():
        batches = iter(data_loader)
        batch: Any = None
        for index in range(rounds):
            counted = index < len(data_loader)
            batch = next(batches) if counted else batch
            seed_all_rng(int(np.random.SeedSequence([seed, first + index]).generate_state(1)[0]))
            with autocast(device, amp_dtype):
                losses = model(batch)
            if counted:
                images += len(batch)
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + value.item() * len(batch)
    parts = comm.all_gather((images, sums))
    total = sum(count for count, _ in parts)
    names = dict.fromkeys(name for _, values in parts for name in values)
    means = {name: sum(values.get(name, 0.0) for _, values in parts) / total for name in names}
    return {"total_loss": sum(means.values()), **means}


@contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    """Training mode without noise and without updates of running statistics; then as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, _ in modes:
        if isinstance(module, NOISE):
            module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Restore the state of every global random generator afterwards."""
    states: tuple[Any, Any] = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
