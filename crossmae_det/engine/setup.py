"""From a command line to a running job: one process, many, or many machines."""

import logging
import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from detectron2.config import LazyConfig
from detectron2.engine import default_argument_parser, launch
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.multiprocessing import ProcessExitedException

from crossmae_det.checkpoint import atomic_path
from crossmae_det.engine.trainer import NonFiniteError

logger = logging.getLogger(__name__)

# What a user can mend is told in one line; anything else is a defect of ours, with its traceback.
USER_ERRORS = (ValueError, OSError, OmegaConfBaseException, NonFiniteError)
BAD_INPUT = 2


def argument_parser(description: str) -> ArgumentParser:
    """detectron2's arguments for training and evaluation tools, and what weights may lack."""
    parser = default_argument_parser()
    parser.description = description
    add_loading_arguments(parser)
    return parser


def add_loading_arguments(parser: ArgumentParser) -> None:
    """What a user knows about weights that would be refused."""
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


def run_distributed(main: Callable[[Namespace], Any], args: Namespace) -> None:
    """Run ``main(args)`` in every process of the job.

    Under torchrun this process is one of them; otherwise detectron2's launcher starts
    ``args.num_gpus`` processes on this machine (over gloo where there is no GPU).

    Raises:
        ValueError: there are GPUs, but fewer than processes.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _join_torchrun()
        main(args)
        torch.distributed.destroy_process_group()
        return
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and args.num_gpus > gpus:
        raise ValueError(f"--num-gpus {args.num_gpus}, but this machine has {gpus}")
    launch(
        _worker,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(main, args),
    )


def _worker(main: Callable[[Namespace], Any], args: Namespace) -> None:
    if comm.get_world_size() == 1:
        main(args)
    else:
        run_tool(lambda: main(args))
        torch.distributed.destroy_process_group()


def _join_torchrun() -> None:
    local_rank = int(os.environ["LOCAL_RANK"])
    use_cuda = torch.cuda.is_available()
    if use_cuda:
        torch.cuda.set_device(local_rank)
    backend = "nccl" if use_cuda else "gloo"
    torch.distributed.init_process_group(backend, timeout=timedelta(minutes=30))
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
    """Make the run's folder, start the log, seed this process and resolve the config.

    A training run keeps its config there as ``config.yaml``, with values instead of what follows
    from the data: it is a config of its own, also where the data are gone.

    Returns:
        The config without references; the one that was passed in is unchanged.

    Raises:
        ValueError, OSError: the config refers to what is not there.
    """
    settled = _settle(cfg.copy())
    resolved = settled.copy()
    OmegaConf.resolve(resolved)
    options = resolved.train
    rank = comm.get_rank()
    if comm.is_main_process():
        os.makedirs(options.output_dir, exist_ok=True)
    for name in ("fvcore", "detectron2", "crossmae_det"):
        log = setup_logger(options.output_dir, distributed_rank=rank, name=name)
        for handler in log.handlers:
            if type(handler) is logging.StreamHandler and handler.stream is sys.stdout:
                handler.setLevel(logging.INFO)  # tracebacks of a user's errors go to the file only
    logger.info("Rank of this process: %d. World size: %d", rank, comm.get_world_size())
    logger.info("Environment\n%s", collect_env_info())
    logger.info("Command line arguments: %s", args)
    if comm.is_main_process() and not args.eval_only:
        path = os.path.join(options.output_dir, "config.yaml")
        with atomic_path(path) as temporary:
            LazyConfig.save(settled, str(temporary))
        logger.info("The config is in %s", path)
    seed_all_rng(options.seed + rank)
    torch.backends.cudnn.benchmark = options.cudnn_benchmark and not args.eval_only
    return resolved


def _settle(node: DictConfig | ListConfig) -> Any:
    """Put values in place of the references that need the data, in place; the others stay."""
    keys = list(node) if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        if OmegaConf.is_interpolation(node, key):
            if "${dataset." in str(node._get_node(key)._value()):  # type: ignore[union-attr]
                node[key] = node[key]
        elif OmegaConf.is_config(node[key]):
            _settle(node[key])
    return node
