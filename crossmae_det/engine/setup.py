"""From a command line to a running job: one process, many, or many machines."""

import logging
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.multiprocessing import ProcessExitedException

from crossmae_det.engine.trainer import NonFiniteError

logger = logging.getLogger(__name__)

# What a user can mend is told in one line; anything else is a defect of ours, with its traceback.
USER_ERRORS = (ValueError, OSError, OmegaConfBaseException, NonFiniteError)
BAD_INPUT = 2


def argument_parser(description: str) -> ArgumentParser:
    """detectron2's arguments for training and evaluation tools."""
    parser = default_argument_parser()
    parser.description = description
    return parser


def run_tool(main: Callable[[], Any]) -> None:
    """Run a tool's main function; what the user can mend ends in one line and exit code 2."""
    try:
        main()
    except USER_ERRORS as error:
        message = _one_line(error)
        logger.debug("Traceback of the error below", exc_info=True)
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except ProcessExitedException as error:
        # A worker has said it already.
        sys.exit(error.exit_code)


def _one_line(error: Exception) -> str:
    """The message of an error in one line; of one from a loader's worker, what it said there."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "DataLoader worker" in lines[0]:
        # torch puts the worker's traceback into the message: "package.Error: message" ends it.
        return lines[-1].partition(": ")[2]
    return " ".join(line.strip() for line in lines)


def run_distributed(main: Callable[..., Any], args: Namespace, *main_args: Any) -> None:
    """Run ``main(*main_args)`` in every process of the job.

    Under torchrun this process is one of them; otherwise detectron2's launcher starts
    ``args.num_gpus`` processes on this machine (over gloo where there is no GPU).
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _join_torchrun()
        main(*main_args)
        torch.distributed.destroy_process_group()
    else:
        launch(
            _worker,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main, *main_args),
        )


def _worker(main: Callable[..., Any], *main_args: Any) -> None:
    if comm.get_world_size() == 1:
        main(*main_args)
    else:
        run_tool(lambda: main(*main_args))
        torch.distributed.destroy_process_group()


def _join_torchrun() -> None:
    local_rank = int(os.environ["LOCAL_RANK"])
    use_cuda = torch.cuda.is_available()
    if use_cuda:
        torch.cuda.set_device(local_rank)
    torch.distributed.init_process_group(
        "nccl" if use_cuda else "gloo", timeout=timedelta(minutes=30)
    )
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))


def resolve_device(name: str) -> torch.device:
    """The device of a config: "auto" is CUDA where there is one, else the CPU.

    Raises:
        ValueError: the name is unknown, or the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train.device='{name}' is no device that torch knows") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"train.device='{name}', but torch sees no GPU here; take auto or cpu")
    return device


def setup(cfg: DictConfig, args: Namespace) -> DictConfig:
    """Resolve a config, make the run's folder, start the log and save the config there.

    The saved ``config.yaml`` holds values instead of references: it is a config of its own, for
    evaluation and inference also where the training data are gone.

    Returns:
        The resolved config; the one that was passed in is unchanged.

    Raises:
        ValueError, OSError: the config refers to what is not there.
    """
    cfg = cfg.copy()
    OmegaConf.resolve(cfg)
    default_setup(cfg, args)
    # fvcore and detectron2 have their loggers; ours writes to the same places.
    ours, theirs = logging.getLogger("crossmae_det"), logging.getLogger("detectron2")
    ours.handlers, ours.propagate = theirs.handlers, False
    ours.setLevel(theirs.level)
    return cfg
