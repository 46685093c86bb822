"""The one engine: lazy configs of every task, on one process or many."""

from crossmae_det.engine.job import evaluate, run, train
from crossmae_det.engine.launching import run_distributed
from crossmae_det.engine.memory import keep_freed_memory
from crossmae_det.engine.setup import (
    add_loading_arguments,
    argument_parser,
    resolve_device,
    run_tool,
)

__all__ = [
    "add_loading_arguments",
    "argument_parser",
    "evaluate",
    "keep_freed_memory",
    "resolve_device",
    "run",
    "run_distributed",
    "run_tool",
    "train",
]
