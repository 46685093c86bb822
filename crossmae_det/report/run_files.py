"""What the files of a run's folder say: metrics, results, config, and how far the run is.

One file with numbers is required, the others are optional. Files that cannot be read are listed in
the report.
Reading runs no code of the folder: a config is read as plain values.
"""

import json
import logging
import math
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from crossmae_det.engine.config import FILE as CONFIG
from crossmae_det.engine.hooks import METRICS
from crossmae_det.engine.launch import EMA_FOLDER, RECIPE
from crossmae_det.engine.run_record import read_record
from crossmae_det.engine.validation import EarlyStopping
from crossmae_det.utils.plots import Series, read_metrics

logger = logging.getLogger(__name__)

RESULTS = "results.json"  # in inference/ and inference_ema/
FINAL = "model_final.pth"

# A run is in one of these states.
FINISHED, RUNNING, EARLY, STOPPED, FAILED, EVALUATED = (
    "finished",
    "running",
    "stopped early",
    "stopped",
    "failed",
    "evaluated",
)


@dataclass(frozen=True)
class Status:
    """How far a run is: one of the states above, a sentence, and the error that ended it or ""."""

    state: str
    text: str
    error: str = ""


@dataclass
class Run:
    """The content of a run's folder.

    Attributes:
        folder: the folder.
        name: what the report calls it.
        metrics: name -> iteration -> value; empty without ``metrics.json``.
        record: ``run.json``; empty without one.
        config: ``config.yaml`` as plain values, references as text; empty without one.
        recipe: likewise, the config that the run was started with, without overrides.
        results: the content of ``results.json``, for "" and, with averaged weights, "ema".
        problems: one line for each file that cannot be read.
    """

    folder: Path
    name: str
    metrics: Series = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @cached_property
    def start(self) -> Mapping[str, Any]:
        """The record of the last start; empty without one."""
        starts = [start for start in self.record.get("starts", ()) if isinstance(start, dict)]
        return starts[-1] if starts else {}

    @cached_property
    def iterations(self) -> int:
        """Iterations that are logged."""
        # The evaluation after the last iteration has the number of the one that would follow.
        losses = self.metrics.get("total_loss")
        series = [losses] if losses else self.metrics.values()
        return max((max(values) for values in series if values), default=-1) + 1

    @cached_property
    def max_iter(self) -> int | None:
        """Iterations that the run is to have; None if no file says it."""
        for value in (self.start.get("max_iter"), self.option("train.max_iter")):
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return None

    @cached_property
    def batch_size(self) -> int | None:
        """Images per iteration; None if no file says it."""
        options = ("dataloader.train.total_batch_size", "dataloader.train.batch_size")
        for value in (self.start.get("batch_size"), *map(self.option, options)):
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return None

    def option(self, key: str) -> Any:
        """The value of a key of the config with dots; None without it."""
        node: Any = self.config
        for name in key.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        return node

    def last(self, name: str) -> float | None:
        """The last finite value of a metric; None without one."""
        return last_finite(self.metrics.get(name, {}))

    @cached_property
    def status(self) -> Status:
        """How far the run is."""
        of = f" of {self.max_iter:,}" if self.max_iter else ""
        reached = f"at iteration {self.iterations:,}{of}"
        end = self.record.get("end")
        end = end if isinstance(end, dict) else {}
        complete = self.max_iter is not None and self.iterations >= self.max_iter
        if not self.metrics:
            return Status(EVALUATED, "evaluated, without training")
        if end.get("state") == "failed":
            return Status(FAILED, f"failed {reached}", str(end.get("error", "")))
        if end.get("state") == "interrupted":
            return Status(STOPPED, f"interrupted {reached}")
        if not end and self.record and self._is_alive():
            return Status(RUNNING, f"still running, {reached}")
        if not complete and (self.folder / EarlyStopping.FILE).is_file() and self._has_ended(end):
            return Status(EARLY, f"stopped early {reached}")
        if complete or self._has_ended(end):
            return Status(FINISHED, f"finished, {self.iterations:,} iterations")
        return Status(STOPPED, f"stopped {reached}")

    def _has_ended(self, end: Mapping[str, Any]) -> bool:
        return bool(end) if self.record else (self.folder / FINAL).is_file()

    def _is_alive(self) -> bool:
        """Whether the process of the last start is known to run on this machine."""
        pid = self.start.get("pid")
        if self.start.get("host") != socket.gethostname() or not isinstance(pid, int) or pid < 1:
            return False
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):  # no process has such a number
            return False
        except OSError:  # another user's
            return True
        return True

    @cached_property
    def seconds(self) -> float | None:
        """Seconds from the start to the end, or to now, of a run that was started once.

        For other runs the time of the iterations that were logged, without evaluations; None if no
        file says either.
        """
        starts = self.record.get("starts", ())
        if len(starts) == 1 and (begin := _time(self.start.get("time"))):
            end = self.record.get("end")
            stop = _time(end.get("time")) if isinstance(end, dict) else None
            if stop is None and self.status.state == RUNNING:
                stop = datetime.now(timezone.utc)
            if stop is not None:
                return (stop - begin).total_seconds()
        total, before = 0.0, -1
        for iteration, value in self.metrics.get("time", {}).items():
            if math.isfinite(value):
                total += value * (iteration - before)
            before = iteration
        return total or None


def last_finite(points: Mapping[int, float]) -> float | None:
    """The last finite value of a series; None without one."""
    values = [value for value in points.values() if math.isfinite(value)]
    return values[-1] if values else None


def _time(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None


def read_run(folder: str | os.PathLike[str], name: str | None = None) -> Run:
    """Read the folder of a run, with the files that it has.

    Args:
        folder: of a run of any task, finished or not.
        name: what the report calls it; None for the name of the folder.

    Raises:
        ValueError: it is not a folder, or has neither metrics nor results.
    """
    path = Path(folder)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}: name the folder of a run (train.output_dir)")
    run = Run(path, name or path.resolve().name or str(path))
    problems = run.problems
    if (path / METRICS).is_file():
        try:
            run.metrics = read_metrics(path / METRICS)
        except ValueError as error:
            problems.append(str(error))
    try:
        run.record = read_record(path)
    except (ValueError, OSError) as error:
        problems.append(str(error))
    run.config = _read_config(path / CONFIG, problems)
    run.recipe = _read_config(path / RECIPE, problems)
    for key, subfolder in (("", "inference"), ("ema", EMA_FOLDER)):
        if content := _read_json(path / subfolder / RESULTS, problems):
            run.results[key] = content
    if not run.metrics and not run.results:
        reasons = f" ({'; '.join(problems)})" if problems else ""
        raise ValueError(
            f"{path} has neither {METRICS} nor inference/{RESULTS}{reasons}: name the folder of a"
            " run that has logged its first iterations, or of an evaluation"
        )
    return run


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        problems.append(f"{path} cannot be read: {error}")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path} cannot be read: it holds no results")
        return {}
    return content


class _PlainLoader(yaml.SafeLoader):
    """Reads a saved config without creating the Python objects that it may name."""


def _python_value(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode) and suffix == "tuple":
        return loader.construct_sequence(node, deep=True)
    return f"<{suffix}>"


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _python_value)


def _read_config(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, OSError) as error:
        problems.append(f"{path} cannot be read: {' '.join(str(error).split())}")
        return {}
    return content if isinstance(content, dict) else {}
