"""The engine: runs the lazy config of any task, in one process or many."""

from crossmae_det.engine.launch import (
    add_loading_arguments,
    argument_parser,
    keep_freed_memory,
    resolve_device,
    run_distributed,
    run_tool,
)
from crossmae_det.engine.train import evaluate, run, train

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
