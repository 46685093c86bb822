"""Validation losses, and what follows from evaluations: the best checkpoint and early stopping."""

import json
import logging
import math
import os
import random
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
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

from crossmae_det.checkpoint import read_checkpoint
from crossmae_det.engine.checkpointing import Checkpointer
from crossmae_det.engine.precision import autocast
from crossmae_det.engine.trainer import unwrap
from crossmae_det.utils.files import write_json

logger = logging.getLogger(__name__)

PREFIX = "val/"

# Modules that draw random numbers in training, or update their state: they run in evaluation mode.
NOISE = (DropPath, nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)

MODES = ("auto", "min", "max")


class Batches(Iterable, Sized, Protocol):
    """The batches of this process, in order; the processes have consecutive parts, by rank."""


class ValidationLoss(HookBase):
    """Computes the losses of the model on a validation set, periodically and at the end.

    They are logged as "val/total_loss" and "val/NAME", in every process. See :func:`losses_on`.

    Args:
        data_loader: batches as the model takes them in training, with their ground truth and
            without random augmentation.
        period: in iterations; 0 for the end of the run only.
        amp_dtype: the precision of the run: "bf16", "fp16" or None.
        seed: of the random choices of the model.
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
        self.trainer.settle()
        model = unwrap(self.trainer.model)
        losses = losses_on(model, self.data_loader, self.amp_dtype, seed=self.seed)
        self.measured_iter = iteration
        named = {f"{PREFIX}{name}": value for name, value in losses.items()}
        self.trainer.storage.put_scalars(**named, smoothing_hint=False)
        values = "  ".join(f"{name}: {value:.4g}" for name, value in named.items())
        logger.info("Validation after %d iterations: %s", iteration + 1, values)


def losses_on(
    model: nn.Module, data_loader: Batches, amp_dtype: str | None = None, *, seed: int = 0
) -> dict[str, float]:
    """The losses of a model on a set of images; the model does not change.

    The model is in training mode, the only one in which detectron2's models return losses, except
    for drop path, dropout and norms with running statistics. What the model draws at random depends
    on the seed and the index of the batch alone: two calls give the same values for the same
    weights. The random state of the process, the modes of the modules and the metrics of the run
    are restored.

    Args:
        model: takes a batch, returns a dict of scalar losses.
        data_loader: the batches of this process. Processes may have different numbers of them.
        amp_dtype: "bf16", "fp16" or None.
        seed: at least 0.

    Returns:
        The mean of each loss over the images of all processes, and their sum as "total_loss"; the
        same in every process.

    Raises:
        ValueError: there are no images, or an FSDP model has fewer batches than processes.
    """
    device = next(model.parameters()).device
    counts = comm.all_gather(len(data_loader))
    if not sum(counts):
        raise ValueError("the validation set has no images: check dataloader.validation")
    sharded = isinstance(model, FSDPModule)
    if sharded and not min(counts):
        raise ValueError(
            f"the validation set has {sum(counts)} batches for {len(counts)} processes: add images"
            " or lower dataloader.validation.batch_size"
        )
    # A sharded model needs all processes for every batch: those that are done repeat their last.
    rounds = max(counts) if sharded else len(data_loader)
    first = sum(counts[: comm.get_rank()])
    sums: dict[str, float] = {}
    images = 0
    # detectron2's heads log to a storage in training; this one is discarded.
    with _training_mode_without_noise(model), _own_randomness(device), EventStorage():
        batches = iter(data_loader)
        batch: Any = None
        for index in range(rounds):
            counted = index < len(data_loader)
            batch = next(batches) if counted else batch
            seed_all_rng(int(np.random.SeedSequence([seed, first + index]).generate_state(1)[0]))
            with torch.no_grad(), autocast(device, amp_dtype):
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
def _training_mode_without_noise(model: nn.Module) -> Iterator[None]:
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
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def sign_of(metric: str, mode: str) -> int:
    """1 if higher values of a metric are better, -1 if lower ones are.

    Args:
        metric: name such as "segm/AP" or "val/total_loss".
        mode: "max", "min", or "auto": lower is better for a name that ends in "loss" or has a part
            that begins with "loss_".

    Raises:
        ValueError: another mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode='{mode}': must be one of {', '.join(MODES)}")
    if mode == "auto":
        part = metric.rpartition("/")[2]
        mode = "min" if part.endswith("loss") or part.startswith("loss_") else "max"
    return 1 if mode == "max" else -1


class BestCheckpointer(HookBase):
    """Keeps the checkpoint with the best metric as ``model_best``.

    Register it after the evaluation, in every process. Unlike detectron2's, it uses the first of
    several metrics that is measured, ``--resume`` does not continue from its checkpoint, and a
    resumed run knows the best value of the run.

    Args:
        checkpointer: saves the model.
        metrics: names such as "segm/AP" or "val/total_loss"; the first one that is measured is
            used.
        mode: "auto", "min" or "max": see :func:`sign_of`.
        period: of the evaluations, in iterations; 0 for the end of the run only; None without
            evaluations. The first evaluation that measures none of the metrics logs a warning.

    Raises:
        ValueError: an unknown mode.
    """

    NAME = "model_best"

    def __init__(
        self,
        checkpointer: Checkpointer,
        metrics: Sequence[str],
        mode: str = "auto",
        period: int | None = None,
    ):
        sign_of("", mode)  # rejects an unknown mode now, not at the first evaluation
        self.checkpointer = checkpointer
        self.metrics = list(metrics)
        self.mode = mode
        self.period = period
        self.best_score = -math.inf
        self.judged_iter = -1
        self.warned = False

    def before_train(self) -> None:
        path = os.path.join(self.checkpointer.save_dir, f"{self.NAME}.pth")
        if self.trainer.start_iter > 0:
            # The folder of the first process counts: on other machines there may be none.
            known = comm.is_main_process() and os.path.exists(path)
            self.best_score = comm.all_gather(self._score_of(path) if known else -math.inf)[0]

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        last = done >= self.trainer.max_iter  # evaluated after the run
        self._judge(evaluated=bool(self.period) and done % self.period == 0 and not last)

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self._judge(evaluated=self.period is not None)

    def _judge(self, evaluated: bool) -> None:
        latest = self.trainer.storage.latest()
        name = next((metric for metric in self.metrics if metric in latest), None)
        if name is None:
            if evaluated and not self.warned:
                self.warned = True
                logger.warning(
                    "train.best_checkpoint.metrics=%s: none of them is measured, so %s.pth is not"
                    " written: use names of metrics in %s",
                    self.metrics,
                    self.NAME,
                    os.path.join(self.checkpointer.save_dir, "metrics.json"),
                )
            return
        value, iteration = latest[name]
        score = sign_of(name, self.mode) * value
        if iteration <= self.judged_iter or not score > self.best_score:
            return
        self.judged_iter = iteration
        self.best_score = float(score)
        value = float(value)  # plain, so that the file can be read safely
        logger.info("%s = %.3f is the best so far", name, value)
        self.checkpointer.save(
            self.NAME, tag=False, iteration=iteration, best_metric=value, metric_name=name
        )

    def _score_of(self, path: str) -> float:
        """The score of the checkpoint in a file; -inf if this run does not have its metric."""
        content = read_checkpoint(path)
        name = str(content.get("metric_name"))
        if name not in self.metrics:
            return -math.inf
        return sign_of(name, self.mode) * float(content["best_metric"])


class EarlyStopping(HookBase):
    """Ends the run after ``patience`` evaluations in a row that are no better than the best one.

    A stopped run ends like one that reached its last iteration: with ``model_final.pth``, curves
    and visualizations. The values are kept in ``early_stopping.json`` in the run's folder, so that
    a resumed run continues to count; with a greater patience, a stopped run can be resumed.

    Register it in every process, after the evaluations and after :class:`BestCheckpointer`.

    Args:
        checkpointer: saves the last checkpoint; its folder is the run's.
        metrics: names such as "segm/AP"; the first one that is measured is used.
        patience: number of evaluations, at least 1.
        mode: "auto", "min" or "max", see :func:`sign_of`.
        period: of the evaluations, in iterations.

    Raises:
        ValueError: an argument out of range; during the run: none of the metrics is measured.
    """

    FILE = "early_stopping.json"

    def __init__(
        self,
        checkpointer: Checkpointer,
        metrics: Sequence[str],
        patience: int,
        mode: str,
        period: int,
    ):
        key = "train.early_stopping"
        if patience < 1:
            raise ValueError(f"{key}.patience={patience}: must be at least 1")
        if not metrics:
            raise ValueError(f"{key}.metrics is empty: name one, such as {PREFIX}total_loss")
        if period < 1:
            raise ValueError(
                f"{key} needs evaluations during the run: train.eval_period={period} must be at"
                " least 1"
            )
        sign_of(metrics[0], mode)  # rejects an unknown mode now, not at the first evaluation
        self.checkpointer = checkpointer
        self.metrics = list(metrics)
        self.patience = patience
        self.mode = mode
        self.period = period
        self.metric = ""
        self.values: dict[int, float] = {}
        self.path = Path(checkpointer.save_dir) / self.FILE

    def before_train(self) -> None:
        start = self.trainer.start_iter
        # The folder of the first process counts: on other machines there may be none.
        self.metric, self.values = comm.all_gather(self._read(start))[0]
        if self._is_over():
            logger.info(
                "The run was stopped early: %s; raise train.early_stopping.patience to continue",
                self._reason(),
            )
            self.trainer.max_iter = start

    def after_step(self) -> None:
        iteration = self.trainer.iter
        last = iteration + 1 >= self.trainer.max_iter  # evaluated after the run
        if last or (iteration + 1) % self.period:
            return
        latest = self.trainer.storage.latest()
        measured = {name: value for name, (value, when) in latest.items() if when == iteration}
        self.metric = self.metric or next((m for m in self.metrics if m in measured), "")
        if self.metric not in measured:
            raise ValueError(
                f"train.early_stopping.metrics={self.metrics}: the evaluation measures none of"
                f" them: use names of metrics in {self.checkpointer.save_dir}/metrics.json"
            )
        self.values[iteration] = float(measured[self.metric])
        if comm.is_main_process():
            values = {key: None if math.isnan(v) else v for key, v in self.values.items()}
            write_json(self.path, {"metric": self.metric, "values": values})
        if self._is_over():
            logger.info("Early stopping after %d iterations: %s", iteration + 1, self._reason())
            # From here on, this is a run of that length.
            self.trainer.max_iter = iteration + 1
            self.checkpointer.save("model_final", iteration=iteration)

    def _read(self, start: int) -> tuple[str, dict[int, float]]:
        """The metric and its values before iteration ``start`` of the run that is resumed."""
        if not comm.is_main_process():
            return "", {}
        if start == 0:
            self.path.unlink(missing_ok=True)  # of another run in this folder
        if not self.path.is_file():
            return "", {}
        try:
            content: dict[str, Any] = json.loads(self.path.read_text())
            metric = str(content["metric"])
            values = {
                int(key): math.nan if value is None else float(value)
                for key, value in content["values"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path} is damaged ({error}): delete it to restart the count of evaluations"
            ) from error
        if metric not in self.metrics:
            logger.warning(
                "%s has values of %s, which is not in train.early_stopping.metrics: the count of"
                " evaluations restarts",
                self.path,
                metric,
            )
            return "", {}
        return metric, {key: value for key, value in values.items() if key < start}

    def _best(self) -> tuple[int, int]:
        """The iteration with the best value, and the number of evaluations after it.

        The first of equal values is the best one. NaN is never better.
        """
        sign = sign_of(self.metric, self.mode)
        scores = {i: -math.inf if math.isnan(v) else sign * v for i, v in self.values.items()}
        best = max(sorted(scores), key=lambda iteration: scores[iteration])
        return best, sum(iteration > best for iteration in scores)

    def _is_over(self) -> bool:
        return bool(self.values) and self._best()[1] >= self.patience

    def _reason(self) -> str:
        best, waited = self._best()
        path = os.path.join(self.checkpointer.save_dir, f"{BestCheckpointer.NAME}.pth")
        return (
            f"{self.metric} has not improved on {self.values[best]:.4g} of iteration {best} in"
            f" {waited} evaluations; the best checkpoint is {path}"
        )
