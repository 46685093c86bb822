"""From a command line to a running job: one process, many, or many machines."""

import logging
import os
import re
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch.multiprocessing import ProcessExitedException

from crossmae_det.engine.configuration import log_data, resolve
from crossmae_det.engine.logs import environment, start_log, versions
from crossmae_det.engine.run_folder import claim_folder
from crossmae_det.engine.trainer import NonFiniteError

logger = logging.getLogger(__name__)

# What a user can mend is told in one line; anything else is a defect of ours, with its traceback.
USER_ERRORS = (ValueError, OSError, OmegaConfBaseException, NonFiniteError)
BAD_INPUT = 2
WAIT_FOR_FIRST = 5  # seconds


def argument_parser(description: str, epilog: str) -> ArgumentParser:
    """detectron2's arguments for training and evaluation tools, and what weights may lack.

    Args:
        description: first lines of the help text.
        epilog: its last lines.

    Returns:
        To be used by ``parse_intermixed_args``: options may stand before and after overrides.
    """
    parser = default_argument_parser(epilog)
    parser.description = description
    for action in parser._actions:
        if action.dest == "opts":  # detectron2 takes all that follows the first override as one
            action.nargs, action.default = "*", []
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="remove the run that is in train.output_dir: its checkpoints, metrics and results",
    )
    add_loading_arguments(parser)
    return parser


def add_loading_arguments(parser: ArgumentParser) -> None:
    """What a user knows about weights that would be refused, or that are not the whole file."""
    parser.add_argument(
        "--prefix",
        default="",
        help="part of the checkpoint to take: an entry (teacher.), a beginning of names (encoder.)"
        " or both (student.backbone.)",
    )
    for name, what in (
        ("missing", "names in the model that the checkpoint may lack"),
        ("unexpected", "names in the checkpoint that may have no place in the model"),
    ):
        parser.add_argument(
            f"--allow-{name}",
            action="append",
            default=[],
            metavar="PATTERN",
            help=f"{what}, with * and ? as in a shell; may be given several times",
        )


def run_tool(main: Callable[[], Any]) -> None:
    """Run a tool's main function; what the user can mend ends in one line and exit code 2."""
    try:
        main()
    except USER_ERRORS as error:
        logger.debug("Traceback of the error", exc_info=True)
        if comm.get_rank() > 0:
            # The first process says it and ends, which ends the others; unless it met nothing.
            time.sleep(WAIT_FOR_FIRST)
        print(f"{os.path.basename(sys.argv[0])}: error: {_one_line(error)}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except ProcessExitedException as error:
        # A worker has said it already.
        sys.exit(error.exit_code)


def _one_line(error: Exception) -> str:
    """The message of an error in one line; of one from a loader's worker, what it said there."""
    while isinstance(error, OmegaConfBaseException) and isinstance(error.__context__, USER_ERRORS):
        error = error.__context__  # what a reference met, without OmegaConf's words around it
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "DataLoader worker" in lines[0]:
        # torch puts the worker's traceback into the message; "package.Error: message" ends it.
        return re.sub(r"^[\w.]+: ", "", lines[-1])
    return " ".join(line.strip() for line in lines)


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
    if device.type not in ("cpu", "cuda", "meta"):  # meta: shapes only, for model_zoo.get
        raise ValueError(f"train.device='{name}': models run on cpu and cuda; take auto")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"train.device='{name}', but torch sees no GPU here; take auto or cpu")
    return device


def setup(cfg: DictConfig, args: Namespace) -> DictConfig:
    """Resolve the config, claim the run's folder, start the log and seed this process.

    Returns:
        The config without references; the one that was passed in is unchanged.

    Raises:
        ValueError, OSError: the config refers to what is not there, or the folder has another run.
    """
    resolved = resolve(cfg)
    options = resolved.train
    device = resolve_device(options.device)
    if device.type == "meta":
        raise ValueError(
            "train.device='meta' has no values to compute with; take auto, cpu or cuda"
        )
    removed = claim_folder(resolved, args)
    start_log(options.output_dir)
    world_size = comm.get_world_size()
    processes = f" x {world_size} processes" if world_size > 1 else ""
    logger.info("%s, device %s%s", versions(), device, processes)
    files = "log.txt" if args.eval_only else "config.yaml, log.txt"
    logger.info("Output: %s (%s)", options.output_dir, files)
    if removed:
        logger.warning("--overwrite removed the run that was there: %s", ", ".join(removed))
    logger.debug("Command line arguments: %s", args)
    if comm.is_main_process():
        logger.debug("Environment\n%s", environment())
    log_data(cfg, resolved, training=not args.eval_only)
    seed_all_rng(options.seed + comm.get_rank())
    torch.backends.cudnn.benchmark = options.cudnn_benchmark and not args.eval_only
    return resolved
