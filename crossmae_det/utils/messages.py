"""Values in messages, and warnings of libraries that are hidden."""

import logging
import warnings
from collections.abc import Collection
from functools import partial
from typing import Any

# Warnings of libraries about their own code, which users of this package cannot act on:
# (regular expression of the start of the message, category, module that warns)
WARNINGS: tuple[tuple[str, type[Warning], str], ...] = (
    # fvcore and detectron2, at import.
    ("`torch.jit.script` is deprecated", FutureWarning, r"torch\.jit"),
    ("`torch.jit.script_method` is deprecated", FutureWarning, r"torch\.jit"),
    # detectron2.model_zoo.
    ("pkg_resources is deprecated as an API", UserWarning, r"detectron2|pkg_resources"),
    ("Deprecated call to `pkg_resources", DeprecationWarning, r"detectron2|pkg_resources"),
    # detectron2's anchor generator.
    ("torch.meshgrid: in an upcoming release", UserWarning, r"torch\.functional"),
    # detectron2's ViT.
    ("Importing from timm.models.layers is deprecated", FutureWarning, r"timm\.models\.layers"),
    # detectron2's use of DistributedDataParallel.
    ("`broadcast_buffers` is deprecated", FutureWarning, r"detectron2\.engine\.defaults"),
    # Only strides of dimensions of size 1 differ, such as those of class tokens.
    ("Grad strides do not match bucket view strides", UserWarning, r"torch\.autograd\.graph"),
    # fp16 skips the first step when its scale is too large, by design.
    (
        r"Detected call of `lr_scheduler.step\(\)` before",
        UserWarning,
        r"torch\.optim\.lr_scheduler",
    ),
)

# (logger, start of the message)
LOG_RECORDS = (
    # detectron2's report of the environment looks for a CUDA compiler.
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
    # detectron2's layers, in every forward.
    ("torch.fx._symbolic_trace", "is_fx_tracing will return true"),
    # The other processes are terminated after one has reported its error.
    ("torch.multiprocessing.spawn", "Terminating process"),
)


def shorten(value: Any, length: int = 80) -> str:
    """The ``repr`` of a value, cut to ``length`` characters."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def list_names(names: Collection[Any], longest: int = 5) -> str:
    """The number of names and the first of them: ``7 (cat, dog, bird, cow, horse, ...)``."""
    first = ", ".join(map(str, list(names)[:longest]))
    return f"{len(names)} ({first}{', ...' if len(names) > longest else ''})"


def ignore_library_warnings() -> None:
    """Hide :data:`WARNINGS` and :data:`LOG_RECORDS` in this process, and nothing else."""
    for message, category, module in WARNINGS:
        warnings.filterwarnings("ignore", message, category, module)
    for name, start in LOG_RECORDS:
        logging.getLogger(name).addFilter(partial(_is_shown, start))


def _is_shown(start: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(start)
