"""Loggers beside ``metrics.json`` and TensorBoard: Weights & Biases and MLflow, where installed.

Each takes the config of a run, its metrics and images as they are written, and at the end its
results and the paths of its checkpoints. The id of the logged run is kept in ``loggers.json`` in
the folder of the run, so that a resumed run continues the same one. A logger that fails during a
run, for example without its server, is reported and left out: training goes on.
"""

import importlib.util
import json
import logging
import math
import os
import posixpath
import re
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.engine import HookBase
from detectron2.utils.events import EventWriter, get_event_storage
from torch import Tensor

from crossmae_det.utils.files import write_json

logger = logging.getLogger(__name__)

FILE = "loggers.json"  # the ids of the logged runs

# Uploaded at the end of a run.
RESULTS = ("config.yaml", "inference/results.json", "inference_ema/results.json")

# MLflow's limits.
PARAMETERS_PER_CALL, METRICS_PER_CALL = 100, 1000
LONGEST_NAME, LONGEST_VALUE = 250, 500  # characters; those of its oldest versions
NOT_IN_NAMES = re.compile(r"[^\w./ -]")


class ExperimentLogger(EventWriter):
    """Sends what a run stores to an experiment tracker; see the module.

    Args:
        output_dir: the folder of the run.
        settings: the config, as full keys and plain values.
        options: the ``train`` key of this logger, without ``enabled``.

    Raises:
        ValueError: the package is not installed.
    """

    NAME: str  # of the package, and of the key in ``train``

    def __init__(self, output_dir: str, settings: Mapping[str, Any], options: Mapping[str, Any]):
        found = importlib.util.find_spec(self.NAME)
        if found is None or found.origin is None:  # no origin: a folder of that name
            raise ValueError(
                f"train.{self.NAME}.enabled=True: {self.NAME} is not installed:"
                f" pip install {self.NAME}"
            )
        self.output_dir = Path(output_dir)
        self.settings = settings
        self.options = dict(options)
        self.complete = False  # whether the run has reached its last iteration
        self.last_iter = self.last_image_iter = -1
        self.active = False  # whether it has begun and not failed

    @property
    def name(self) -> str:
        """The name of the run: that of the config, or of its folder."""
        return self.options.get("name") or self.output_dir.resolve().name

    def begin(self, resumed: bool) -> None:
        """Start the logged run, or continue it.

        Raises:
            ValueError: the logger cannot start: no login, no server, or a wrong option.
        """
        path = self.output_dir / FILE
        try:
            ids = dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged: delete it to start a new logged run") from error
        try:
            run_id = self.start(ids.get(self.NAME) if resumed else None)
        except Exception as error:  # the packages raise errors of many kinds
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"train.{self.NAME}: {self.NAME} cannot start: {reason}") from error
        self.active = True
        write_json(path, ids | {self.NAME: run_id})

    def write(self) -> None:
        """Send the metrics and images that are new. Call it before the TensorBoard writer, which
        removes the images."""
        storage = get_event_storage()
        lines: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in storage.latest_with_smoothing_hint(20).items():
            if iteration > self.last_iter:
                lines.setdefault(iteration, {})[name] = float(value)
        images = [
            (name, _pixels(image), step)
            for name, image, step in storage._vis_data
            if step > self.last_image_iter
        ]
        if self.active and (lines or images):
            self._try(lambda: self.send(dict(sorted(lines.items())), images))
        self.last_iter = max([self.last_iter, *lines])
        self.last_image_iter = max([self.last_image_iter, *(step for *_, step in images)])

    def close(self) -> None:
        """Send the results and the paths of the checkpoints, and end the logged run."""
        files = [self.output_dir / name for name in RESULTS]
        checkpoints = sorted(str(path.resolve()) for path in self.output_dir.glob("model_*.pth"))
        if self.active:
            self._try(lambda: self.finish([f for f in files if f.is_file()], checkpoints))

    def _try(self, send: Any) -> None:
        try:
            send()
        except Exception as error:  # a tracker must not end a run
            self.active = False
            logger.warning(
                "%s failed and is disabled for the rest of this run: %s", self.NAME, error
            )

    @abstractmethod
    def start(self, run_id: str | None) -> str:
        """Start a run, or continue the one with this id; returns the id."""

    @abstractmethod
    def send(
        self,
        lines: Mapping[int, Mapping[str, float]],
        images: Sequence[tuple[str, np.ndarray, int]],
    ) -> None:
        """Log metrics by iteration, ascending, and images: name, (height, width, 3) uint8 in RGB,
        iteration."""

    @abstractmethod
    def finish(self, files: Sequence[Path], checkpoints: Sequence[str]) -> None:
        """Log files of results and paths of checkpoints, and end the run."""


class WandbLogger(ExperimentLogger):
    """Weights & Biases. ``WANDB_MODE=offline`` writes into the folder of the run only."""

    NAME = "wandb"

    def start(self, run_id: str | None) -> str:
        import wandb

        self.run = wandb.init(
            project=self.options["project"],
            entity=self.options["entity"],
            tags=list(self.options["tags"]),
            name=self.name,
            dir=str(self.output_dir),
            config=dict(self.settings),
            id=run_id,
            resume="allow" if run_id else None,
            settings=wandb.Settings(console="off"),  # the log of the run has its messages
        )
        # Metrics of an evaluation may come after those of a later iteration.
        self.run.define_metric("*", step_metric="iteration")
        return self.run.id

    def send(
        self,
        lines: Mapping[int, Mapping[str, float]],
        images: Sequence[tuple[str, np.ndarray, int]],
    ) -> None:
        import wandb

        for iteration, line in lines.items():
            self.run.log({"iteration": iteration, **line})
        for name, image, iteration in images:
            self.run.log({"iteration": iteration, name: wandb.Image(image)})

    def finish(self, files: Sequence[Path], checkpoints: Sequence[str]) -> None:
        for path in files:
            self.run.save(str(path), base_path=str(self.output_dir), policy="now")
        self.run.summary["checkpoints"] = list(checkpoints)
        self.run.finish(exit_code=0 if self.complete else 1)


class MLflowLogger(ExperimentLogger):
    """MLflow, on the server or in the database of ``tracking_uri``; None: its default."""

    NAME = "mlflow"

    def start(self, run_id: str | None) -> str:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient(tracking_uri=self.options["tracking_uri"])
        if run_id:
            self.client.update_run(run_id, status="RUNNING")
            self.run_id = run_id
            return run_id
        experiment = self.client.get_experiment_by_name(self.options["experiment"])
        self.run_id = self.client.create_run(
            experiment.experiment_id
            if experiment
            else self.client.create_experiment(self.options["experiment"]),
            run_name=self.name,
        ).info.run_id
        parameters = [
            Param(_mlflow_name(key), str(value)[:LONGEST_VALUE])
            for key, value in self.settings.items()
        ]
        for first in range(0, len(parameters), PARAMETERS_PER_CALL):
            chunk = parameters[first : first + PARAMETERS_PER_CALL]
            self.client.log_batch(self.run_id, params=chunk)
        return self.run_id

    def send(
        self,
        lines: Mapping[int, Mapping[str, float]],
        images: Sequence[tuple[str, np.ndarray, int]],
    ) -> None:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        metrics = [
            Metric(_mlflow_name(name), value, now, iteration)
            for iteration, line in lines.items()
            for name, value in line.items()
            if math.isfinite(value)
        ]
        for first in range(0, len(metrics), METRICS_PER_CALL):
            chunk = metrics[first : first + METRICS_PER_CALL]
            self.client.log_batch(self.run_id, metrics=chunk)
        for name, image, iteration in images:
            self.client.log_image(self.run_id, image, f"images/{name}/{iteration}.png")

    def finish(self, files: Sequence[Path], checkpoints: Sequence[str]) -> None:
        for path in files:
            folder = os.path.relpath(path.parent, self.output_dir)
            self.client.log_artifact(self.run_id, str(path), None if folder == "." else folder)
        for path in map(Path, checkpoints):
            self.client.set_tag(self.run_id, f"checkpoint.{path.stem}", str(path))
        self.client.set_terminated(self.run_id, "FINISHED" if self.complete else "FAILED")


LOGGERS: tuple[type[ExperimentLogger], ...] = (WandbLogger, MLflowLogger)


class LoggedRun(HookBase):
    """Starts loggers before the first iteration, and tells them how the run ended.

    Register it before the hook that writes, in the first process.
    """

    def __init__(self, loggers: Sequence[ExperimentLogger]):
        self.loggers = loggers

    def before_train(self) -> None:
        for each in self.loggers:
            each.begin(resumed=self.trainer.start_iter > 0)

    def after_train(self) -> None:
        for each in self.loggers:
            each.complete = self.trainer.iter >= self.trainer.max_iter


def build_loggers(
    options: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[ExperimentLogger]:
    """The loggers that a config enables.

    Args:
        options: the ``train`` key of the config.
        settings: the whole config, as full keys and plain values.

    Raises:
        ValueError: a package is not installed.
    """
    chosen = []
    for kind in LOGGERS:
        given = dict(options.get(kind.NAME) or {})  # absent in configs of earlier versions
        if given.pop("enabled", False):
            chosen.append(kind(options["output_dir"], settings, given))
    return chosen


def _mlflow_name(name: str) -> str:
    """The name of a metric or setting without what MLflow rejects, as in the names of classes."""
    return posixpath.normpath(NOT_IN_NAMES.sub("_", name))[:LONGEST_NAME]


def _pixels(image: Any) -> np.ndarray:
    """An image of the storage, (3, height, width) in 0 to 255 or floats up to 1, as uint8 RGB."""
    array = image.cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.dtype != np.uint8:
        array = (255 * array.clip(0, 1)).round().astype(np.uint8)
    return array.transpose(1, 2, 0)
