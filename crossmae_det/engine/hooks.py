"""Hooks of the training loop, the writer of metrics, and schedules of the learning rate."""

import json
import logging
import math
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook, LRScheduler
from detectron2.evaluation import inference_context
from detectron2.solver import WarmupParamScheduler
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from tabulate import tabulate
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from crossmae_det.engine.precision import inference_autocast
from crossmae_det.engine.trainer import unwrap

logger = logging.getLogger(__name__)

METRICS = "metrics.json"  # in the folder of a run
CURVES = "curves.png"

# Of a run, as a fraction: a short run still spends most of its iterations at the full rate.
LONGEST_WARMUP = 0.1

# Suffixes of the names of parameter groups that share the learning rate of their layer.
OWN_DECAY = re.compile(r"_(no_decay|decay_[\d.e+-]+)$")


def step_schedule(
    max_iter: int, milestones: Sequence[float], gamma: float = 0.1, warmup_iters: int = 250
) -> ParamScheduler:
    """A constant rate, times ``gamma`` at each milestone, after a linear warm-up.

    Args:
        max_iter: iterations of the run.
        milestones: fractions of the run in (0, 1), ascending.
        gamma: factor at each milestone.
        warmup_iters: iterations of warm-up; at most a tenth of the run.
    """
    # fvcore rejects a run with fewer steps than milestones: a short one gets a finer grid.
    steps = max(max_iter, 1000)
    schedule = MultiStepParamScheduler(
        values=[gamma**step for step in range(len(milestones) + 1)],
        milestones=[round(fraction * steps) for fraction in milestones],
        num_updates=steps,
    )
    return _with_warmup(schedule, max_iter, warmup_iters)


def cosine_schedule(max_iter: int, warmup_iters: int) -> ParamScheduler:
    """Half a cosine from 1 to 0 after a linear warm-up.

    Args:
        max_iter: iterations of the run.
        warmup_iters: iterations of warm-up; at most a tenth of the run.
    """
    return _with_warmup(CosineParamScheduler(1.0, 0.0), max_iter, warmup_iters)


def _with_warmup(schedule: ParamScheduler, max_iter: int, warmup_iters: int) -> ParamScheduler:
    if max_iter < 1:
        raise ValueError(f"a schedule needs at least one iteration, got {max_iter}")
    length = min(warmup_iters / max_iter, LONGEST_WARMUP)
    return WarmupParamScheduler(schedule, 0.001, length) if length else schedule


class MetricsWriter(EventWriter):
    """detectron2's ``JSONWriter``, with null for numbers that are not finite: JSON has no NaN.

    The file appears with the first metric: a run that fails before its first iteration leaves none.

    Args:
        json_file: file to append to.
        window_size: of the median that smooths scalars, in iterations.
    """

    def __init__(self, json_file: str, window_size: int = 20):
        self.json_file = json_file
        self.window_size = window_size
        self.last_iter = -1

    def write(self) -> None:
        lines: dict[int, dict[str, float | None]] = {}
        latest = get_event_storage().latest_with_smoothing_hint(self.window_size)
        for name, (value, iteration) in latest.items():
            if iteration > self.last_iter:
                line = lines.setdefault(iteration, {"iteration": iteration})
                line[name] = value if math.isfinite(value) else None
        if lines:
            self.last_iter = max(lines)
            with open(self.json_file, "a", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(line, sort_keys=True)}\n" for line in lines.values())
                file.flush()
                os.fsync(file.fileno())


class ModelEMA(HookBase):
    """Keeps an exponential moving average of the weights.

    Checkpoints have it under "ema"; a resumed run continues from there.

    Args:
        model: the model without its DistributedDataParallel wrapper.
        decay: weight of the average's past in every iteration, in [0, 1).

    Raises:
        ValueError: ``decay`` out of range.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"train.ema.decay={decay}: must lie in [0, 1)")
        self.source = model
        self.averaged = AveragedModel(model)
        self._average = get_ema_multi_avg_fn(decay)
        self.averaged.requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The model with the averaged weights."""
        return self.averaged.module

    def restart(self) -> None:
        """Restart the average from the model's current weights."""
        self.model.load_state_dict(self.source.state_dict())
        self.averaged.n_averaged.zero_()

    def after_step(self) -> None:
        self.trainer.when_confirmed(self._update)

    @torch.no_grad()
    def _update(self) -> None:
        """``AveragedModel.update_parameters`` without its copy of the count to the device."""
        averaged: list[Tensor] = [*self.model.parameters()]
        source: list[Tensor] = [*self.source.parameters()]
        if self.averaged.n_averaged:
            self._average(averaged, source, self.averaged.n_averaged)
        else:
            torch._foreach_copy_(averaged, source)
        for buffer, current in zip(self.model.buffers(), self.source.buffers(), strict=True):
            buffer.copy_(current)
        self.averaged.n_averaged += 1


class LayerLearningRates(HookBase):
    """Logs the learning rate of every parameter group: a table at the start, a curve for each.

    Groups are named by their ``name``. Those whose name ends in "_no_decay" or "_decay_VALUE" share
    the rate of their layer and have no curve. Neither have those without a name, as timm makes
    them: their rate is "lr".
    """

    def before_train(self) -> None:
        rows = [
            (
                group.get("name", index),
                sum(parameter.numel() for parameter in group["params"]),
                group.get("initial_lr", group["lr"]),
                group["weight_decay"],
            )
            for index, group in enumerate(self.trainer.optimizer.param_groups)
        ]
        headers = ["group", "parameters", "base learning rate", "weight decay"]
        logger.info("Parameter groups\n%s", tabulate(rows, headers=headers))

    def before_step(self) -> None:
        for group in self.trainer.optimizer.param_groups:
            name = group.get("name")
            if name and not OWN_DECAY.search(name):
                self.trainer.storage.put_scalar(f"lr/{name}", group["lr"], smoothing_hint=False)


class LearningRateSchedule(LRScheduler):
    """detectron2's hook for a schedule that depends on the config and the iteration alone.

    Its state is not saved: a resumed run has the rates that its own config gives at the iteration.
    """

    def before_train(self) -> None:
        super().before_train()
        self.scheduler.last_epoch = self.trainer.start_iter
        rates = self.scheduler.get_lr()
        for group, rate in zip(self.trainer.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        return {}


class Evaluation(EvalHook):
    """detectron2's evaluation hook, with metrics in every process.

    It does not evaluate after a run that failed in its last iteration, nor the same weights twice:
    early stopping ends a run directly after an evaluation.
    """

    def __init__(self, eval_period: int, eval_function: Callable[[], dict[str, Any]]):
        # In every process, since all of them act on a metric (early stopping, best checkpoint).
        super().__init__(eval_period, lambda: comm.all_gather(eval_function())[0])
        self.evaluated_iter = -1

    def _do_eval(self) -> None:
        self.trainer.settle()
        super()._do_eval()
        self.evaluated_iter = self.trainer.iter

    def after_train(self) -> None:
        evaluated = self.evaluated_iter + 1 == self.trainer.iter
        if self.trainer.iter >= self.trainer.max_iter and not evaluated:
            super().after_train()


class ResourceUse(HookBase):
    """Logs the throughput, "images_per_second", and the peak of memory, "max_memory_gib".

    The memory is that of this process: of its GPU, as torch allocates it, or else of the machine.

    Args:
        period: in iterations; the throughput is the mean since the last time, of training alone.
    """

    def __init__(self, period: int):
        self.period = period
        self.seconds = 0.0
        self.iterations = 0

    def before_step(self) -> None:
        self.start = time.perf_counter()

    def after_step(self) -> None:
        self.seconds += time.perf_counter() - self.start
        self.iterations += 1
        last = self.trainer.iter + 1 == self.trainer.max_iter
        if not last and (self.trainer.iter + 1) % self.period:
            return
        storage = self.trainer.storage
        if self.trainer.batch_size is not None and self.seconds > 0:
            rate = self.iterations * self.trainer.batch_size / self.seconds
            storage.put_scalar("images_per_second", rate, smoothing_hint=False)
        storage.put_scalar("max_memory_gib", self._memory() / 2**30, smoothing_hint=False)
        self.seconds, self.iterations = 0.0, 0

    def _memory(self) -> int:
        if self.trainer.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.trainer.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


class MetricCurves(HookBase):
    """Draws the metrics of a run as ``curves.png`` in its folder after the last iteration."""

    def __init__(self, output_dir: str):
        self.output_dir = output_dir

    def after_train(self) -> None:
        from crossmae_det.utils.plots import plot_metrics  # matplotlib takes a second to import

        if comm.is_main_process() and self.trainer.iter >= self.trainer.max_iter:
            path = os.path.join(self.output_dir, CURVES)
            plot_metrics(os.path.join(self.output_dir, METRICS), path)
            logger.info("Curves of the metrics are in %s", path)


class Visualizer(Protocol):
    """Interface of ``train.visualizer`` in a config: draws what the model of a task computes."""

    period: int  # in iterations; 0: after the last one only

    def compute(self, model: Any) -> Any:
        """Compute what to draw. Called in every process, with the model in inference mode."""

    def write(self, result: Any, iteration: int, storage: EventStorage) -> None:
        """Draw it. Called in the first process, with the storage of the run's metrics."""


class Visualization(HookBase):
    """Calls a visualizer every ``visualizer.period`` iterations and after the last one."""

    def __init__(self, visualizer: Visualizer):
        self.visualizer = visualizer
        self.visualized_iter = -1

    def after_step(self) -> None:
        iteration = self.trainer.iter + 1
        period = self.visualizer.period
        if iteration == self.trainer.max_iter or (period and iteration % period == 0):
            self._visualize(iteration)

    def after_train(self) -> None:
        # A complete run that is resumed has no step left.
        last = self.trainer.max_iter
        if self.trainer.iter >= last and self.visualized_iter != last:
            self._visualize(last)

    def _visualize(self, iteration: int) -> None:
        self.visualized_iter = iteration
        self.trainer.settle()
        model = unwrap(self.trainer.model)
        precision = inference_autocast(model, self.trainer.amp_dtype)
        with inference_context(model), torch.no_grad(), precision:
            result = self.visualizer.compute(model)
        if comm.is_main_process():
            self.visualizer.write(result, iteration, self.trainer.storage)
