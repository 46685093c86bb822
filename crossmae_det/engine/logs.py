"""The log of a run: everything in its folder, what a person watches on the terminal."""

import logging
import sys

import detectron2
import torch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

import crossmae_det

LOGGERS = ("fvcore", "detectron2", "crossmae_det")
# Loggers whose notes are in the file only.
FILE_ONLY = ("detectron2.data.common", "detectron2.data.dataset_mapper")


def start_log(output_dir: str | None = None) -> None:
    """Log to ``log.txt`` in a folder, and in the first process to the terminal as well.

    The file has all records; the terminal has none below INFO. Other processes write
    ``log.txt.rankN`` and leave the terminal alone: their warnings go into that file.

    Args:
        output_dir: the folder of the run; None logs to the terminal alone.
    """
    rank = comm.get_rank()
    for name in LOGGERS:
        log = setup_logger(output_dir, distributed_rank=rank, name=name)
        for handler in log.handlers:
            if type(handler) is logging.StreamHandler and handler.stream is sys.stdout:
                handler.setLevel(logging.INFO)  # tracebacks of user errors go to the file only
                handler.addFilter(_for_terminal)
    if rank > 0:
        logging.captureWarnings(True)
        warnings_log = logging.getLogger("py.warnings")
        warnings_log.handlers = logging.getLogger("crossmae_det").handlers[-1:]
        warnings_log.propagate = False
        logging.getLogger("torch").setLevel(logging.ERROR)


def _for_terminal(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or not record.name.startswith(FILE_ONLY)


def versions() -> str:
    """The versions that a report of a problem needs, in one line."""
    return (
        f"crossmae_det {crossmae_det.__version__}, torch {torch.__version__},"
        f" detectron2 {detectron2.__version__}"
    )


def environment() -> str:
    """All of the environment, in about 30 lines."""
    # It looks for a compiler of CUDA code when it is imported.
    from detectron2.utils.collect_env import collect_env_info

    return collect_env_info()
