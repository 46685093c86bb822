"""The record of a run in its folder, ``run.json``: who started it with what, and how it ended.

A page about the run, ``train.report`` of its config, is made from this file and the other files of
the folder. Neither can end a run that trains well: what fails is logged.
"""

import json
import logging
import os
import platform
import re
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

import crossmae_det
from crossmae_det.engine.hooks import METRICS
from crossmae_det.utils.files import write_json

logger = logging.getLogger(__name__)

FILE = "run.json"

PACKAGES = ("torchvision", "detectron2", "timm", "numpy", "pycocotools")


class Report(Protocol):
    """Interface of ``train.report`` in a config: a page about the run in its folder.

    Its methods are called in the first process.
    """

    def begin(self, config_file: str) -> None:
        """Called before the first iteration.

        Args:
            config_file: path or name of the config that the run was started with, without
                overrides; "" if it was made by a program.
        """

    def write(self, *, final: bool) -> None:
        """Write the page: after each evaluation, and with ``final`` when the run has ended."""


def command_line() -> str:
    """The command line of this process, as a shell takes it."""
    return " ".join([sys.argv[0], *map(shlex.quote, sys.argv[1:])])


def environment(device: torch.device) -> dict[str, str | int]:
    """What a run depends on beside its config: versions, processor, threads and device."""
    found: dict[str, str | int] = {
        "crossmae_det": crossmae_det.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a copy on the path, without metadata
            continue
    found |= {
        "system": f"{platform.system()} {platform.release()}",
        "CPU": f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["CUDA"] = str(torch.version.cuda)
    return found


def cpu_name() -> str:
    """The model of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def read_record(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The record of the run in a folder; empty without one.

    Returns:
        "starts": one dict for each start of the run, and "end", if the last start has ended.

    Raises:
        ValueError: the file is not such a record.
    """
    path = Path(folder, FILE)
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not the record of a run ({error}): remove the file") from error
    if not isinstance(record, dict) or not isinstance(record.get("starts"), list):
        raise ValueError(f"{path}: not the record of a run: remove the file")
    return record


@contextmanager
def recorded(
    folder: str, report: Report | None, device: torch.device, start: Mapping[str, Any]
) -> Iterator[None]:
    """Record the start and the end of the training in this block, and write the report after it.

    Args:
        folder: the run's.
        report: ``train.report``, instantiated; None writes none.
        device: of the model.
        start: what to record of the start, with "iteration", "max_iter" and "config_file". At
            iteration 0, the starts of an earlier run in the folder are dropped.
    """
    if not comm.is_main_process():
        yield
        return
    record: dict[str, Any] = {"starts": []}
    if start["iteration"] > 0:
        with _logged(folder, "read its record"):
            record = read_record(folder) or record
    record.pop("end", None)
    record["starts"].append(
        {
            "time": _now(),
            "command": command_line(),
            "processes": comm.get_world_size(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "environment": environment(device),
            **start,
        }
    )
    with _logged(folder, "write its record"):
        write_json(Path(folder, FILE), record, indent=1)
    if report is not None and start["iteration"] < start["max_iter"]:
        # A complete run keeps what it has.
        with _logged(folder, "begin its report"):
            report.begin(start["config_file"])
    end = {"state": "ended"}
    try:
        yield
    except Exception as error:
        end = {"state": "failed", "error": " ".join(f"{error}".split()) or type(error).__name__}
        raise
    except BaseException as error:  # Ctrl+C
        end = {"state": "interrupted", "error": type(error).__name__}
        raise
    finally:
        with _logged(folder, "write its record"):
            write_json(Path(folder, FILE), record | {"end": end | {"time": _now()}}, indent=1)
        write_report(report, folder, final=True)


def write_report(report: Report | None, folder: str, *, final: bool) -> None:
    """Write the report of a run that has metrics; a failure is logged with its traceback."""
    if report is not None and Path(folder, METRICS).is_file():
        with _logged(folder, "write its report"):
            report.write(final=final)


class ReportUpdates(HookBase):
    """Writes the report of a run after each evaluation; :func:`recorded` writes the last one.

    Register it last, so that the metrics of the iteration are in the folder.
    """

    def __init__(self, report: Report, folder: str, period: int):
        self.report = report
        self.folder = folder
        self.period = period

    def after_step(self) -> None:
        iteration = self.trainer.iter + 1
        due = self.period and iteration % self.period == 0 and iteration < self.trainer.max_iter
        if due and comm.is_main_process():
            write_report(self.report, self.folder, final=False)


@contextmanager
def _logged(folder: str, what: str) -> Iterator[None]:
    """Log an error of the block instead of raising it: the run itself is fine."""
    try:
        yield
    except Exception:
        logger.warning(
            "%s: could not %s; 'crossmae-det report %s' makes the report when the run has ended",
            folder,
            what,
            shlex.quote(folder),
            exc_info=True,
        )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
