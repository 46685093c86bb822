"""Which evaluation was the best, and when to stop for want of a better one."""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from crossmae_det.checkpoint import atomic_path
from crossmae_det.engine.checkpointing import Checkpointer

logger = logging.getLogger(__name__)

MODES = ("auto", "min", "max")


def sign_of(metric: str, mode: str) -> int:
    """1 where higher values of a metric are better, -1 where lower ones are.

    Args:
        metric: name such as "segm/AP" or "val/total_loss".
        mode: "max", "min", or "auto": lower is better for a name that ends in "loss" or has a part
            that begins with "loss_".

    Raises:
        ValueError: another mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode='{mode}': choose one of {', '.join(MODES)}")
    if mode == "auto":
        part = metric.rpartition("/")[2]
        mode = "min" if part.endswith("loss") or part.startswith("loss_") else "max"
    return 1 if mode == "max" else -1


def best_of(values: Mapping[int, float], sign: int) -> tuple[int, int]:
    """(The iteration with the best value, the number of evaluations after it).

    The first of equal values is the best one. NaN is never better.

    Args:
        values: iteration -> value, not empty.
        sign: see :func:`sign_of`.
    """
    iterations = sorted(values)
    scores = [
        -math.inf if math.isnan(values[iteration]) else sign * values[iteration]
        for iteration in iterations
    ]
    place = scores.index(max(scores))
    return iterations[place], len(scores) - 1 - place


class EarlyStopping(HookBase):
    """End the run after ``patience`` evaluations in a row that are no better than the best one.

    A stopped run ends as one that reached its last iteration: with ``model_final.pth``, curves and
    visualizations. The values it judges by are in ``early_stopping.json`` in the run's folder, from
    where a resumed run goes on counting; with a greater patience a stopped run goes on.

    Register it in every process, after the evaluations and after the hook that keeps the best
    checkpoint.

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
        if patience < 1:
            raise ValueError(f"train.early_stopping.patience must be at least 1, got {patience}")
        if not metrics:
            raise ValueError("train.early_stopping.metrics is empty: name one, such as segm/AP")
        if period < 1:
            raise ValueError(
                f"train.early_stopping needs evaluations during the run: train.eval_period is"
                f" {period}"
            )
        sign_of(metrics[0], mode)  # an unknown mode is rejected now, not at the first evaluation
        self.checkpointer = checkpointer
        self.metrics = list(metrics)
        self.patience = patience
        self.mode = mode
        self.period = period
        self.metric = ""
        self.values: dict[int, float] = {}

    @property
    def path(self) -> Path:
        """Where the values are kept."""
        return Path(self.checkpointer.save_dir) / self.FILE

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
        last = iteration + 1 >= self.trainer.max_iter  # it is evaluated when the run has ended
        if last or (iteration + 1) % self.period:
            return
        latest = self.trainer.storage.latest()
        measured = {name: value for name, (value, when) in latest.items() if when == iteration}
        self.metric = self.metric or next((m for m in self.metrics if m in measured), "")
        if self.metric not in measured:
            raise ValueError(
                f"train.early_stopping.metrics={self.metrics}: the evaluation measures none of"
                f" them; name one of those in {self.checkpointer.save_dir}/metrics.json"
            )
        self.values[iteration] = float(measured[self.metric])
        if comm.is_main_process():
            values = {key: None if math.isnan(v) else v for key, v in self.values.items()}
            with atomic_path(self.path) as temporary:
                temporary.write_text(json.dumps({"metric": self.metric, "values": values}))
        if self._is_over():
            logger.info("Early stopping after %d iterations: %s", iteration + 1, self._reason())
            # From here on everything is as in a run of this length.
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
                f"{self.path} is damaged ({error}): delete it to count evaluations anew"
            ) from error
        if metric not in self.metrics:
            logger.warning(
                "%s has values of %s, which train.early_stopping.metrics does not name:"
                " evaluations are counted anew",
                self.path,
                metric,
            )
            return "", {}
        return metric, {key: value for key, value in values.items() if key < start}

    def _is_over(self) -> bool:
        return bool(self.values) and self._best()[1] >= self.patience

    def _best(self) -> tuple[int, int]:
        return best_of(self.values, sign_of(self.metric, self.mode))

    def _reason(self) -> str:
        best, waited = self._best()
        path = os.path.join(self.checkpointer.save_dir, "model_best.pth")
        return (
            f"{self.metric} has not improved on {self.values[best]:.4g} of iteration {best} in"
            f" {waited} evaluations; the best checkpoint is {path}"
        )
