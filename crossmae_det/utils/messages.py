"""What a user reads: values inside messages, and warnings of libraries that are hidden."""

import logging
import warnings
from collections.abc import Collection
from typing import Any

# Warnings of libraries about their own code, which a user of this package can do nothing about.
# (start of the message as a regular expression, category, module that gives it)
WARNINGS: tuple[tuple[str, type[Warning], str], ...] = (
    # fvcore and detectron2 script functions when they are imported.
    ("`torch.jit.script` is deprecated", FutureWarning, r"torch\.jit"),
    ("`torch.jit.script_method` is deprecated", FutureWarning, r"torch\.jit"),
    # detectron2.model_zoo finds its files with it.
    ("pkg_resources is deprecated as an API", UserWarning, r"detectron2|pkg_resources"),
    ("Deprecated call to `pkg_resources", DeprecationWarning, r"detectron2|pkg_resources"),
    # detectron2's anchors.
    ("torch.meshgrid: in an upcoming release", UserWarning, r"torch\.functional"),
    # detectron2's ViT imports from there.
    ("Importing from timm.models.layers is deprecated", FutureWarning, r"timm\.models\.layers"),
    # detectron2 makes DistributedDataParallel.
    ("`broadcast_buffers` is deprecated", FutureWarning, r"detectron2\.engine\.defaults"),
    # Strides of dimensions of size 1, as of class tokens, mean nothing.
    ("Grad strides do not match bucket view strides", UserWarning, r"torch\.autograd\.graph"),
    # fp16 skips the first step when its scale is too large, by design.
    (
        r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`",
        UserWarning,
        r"torch\.optim\.lr_scheduler",
    ),
)


# (logger, start of the message)
LOG_RECORDS = (
    # detectron2's report of the environment asks for a compiler of CUDA code.
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
    # detectron2's layers ask it in every forward.
    ("torch.fx._symbolic_trace", "is_fx_tracing will return true"),
    # When a process ends in an error, which it has said, the others are ended.
    ("torch.multiprocessing.spawn", "Terminating process"),
)


def shorten(value: Any, length: int = 80) -> str:
    """The ``repr`` of a value, cut to ``length`` characters."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def list_names(names: Collection[Any], longest: int = 5) -> str:
    """How many names there are, and the first of them: ``7 (cat, dog, bird, cow, horse, ...)``."""
    first = ", ".join(map(str, list(names)[:longest]))
    return f"{len(names)} ({first}{', ...' if len(names) > longest else ''})"


class _WithoutStart(logging.Filter):
    """Drops the records whose message starts in a given way."""

    def __init__(self, start: str):
        super().__init__()
        self.start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.start)


def ignore_library_warnings() -> None:
    """Hide :data:`WARNINGS` and :data:`LOG_RECORDS` in this process; a user's own are shown."""
    for message, category, module in WARNINGS:
        warnings.filterwarnings("ignore", message, category, module)
    for name, start in LOG_RECORDS:
        logging.getLogger(name).addFilter(_WithoutStart(start))
