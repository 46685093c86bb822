"""The memory of a process that computes on the CPU.

The log of a run: everything in its folder, what a person watches on the terminal.

The folder of a run: a new run never mixes with an old one there.

From a command line to a running job: one process, many, or many machines.

Starting the processes of a job: one, many on a machine, or many machines.
"""

import ctypes
import logging
import os
import re
import shutil
import socket
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import distributed
from torch.multiprocessing import ProcessExitedException, start_processes

import crossmae_det
from crossmae_det.checkpoint.reading import split_prefix
from crossmae_det.engine.config import check_keys, log_data, resolve
from crossmae_det.engine.trainer import NonFiniteError

logger = logging.getLogger(__name__)


# Of glibc's malloc.h.
M_TRIM_THRESHOLD = -1

M_MMAP_MAX = -4


def keep_freed_memory(device: torch.device) -> bool:
    """On the CPU, let this process keep the memory that tensors free, for those that come after.

    glibc gives large blocks back to the kernel, and the next step's activations then cost a page
    fault and a page of zeros for every 4 KiB: a quarter of the time of a step of ViT-B on 32
    images. The price is that the process never becomes smaller than it was at its largest. On GPUs
    torch keeps memory by itself.

    Args:
        device: where the process computes.

    Returns:
        False where nothing has changed: on a GPU, and where the C library is not glibc.
    """
    if device.type != "cpu":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1)):
        logger.info("This C library cannot be told to keep freed memory: steps take longer")
        return False
    return True


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


# The names that the checkpoints of a run have, and those that a kill during a save leaves behind.
CHECKPOINT = re.compile(r"\.?model_(\d{7}|final|best|before_nonfinite)(\.\d+)?\.pth")

POINTER = "last_checkpoint"  # has the name of the checkpoint that --resume continues from

METRICS = "metrics.json"

# What else a run writes. The log and the config stay: the new run appends to the one and replaces
# the other.
FILES = (
    POINTER,
    METRICS,
    "init_checkpoint.json",
    "curves.png",
    "predictions.png",
    "early_stopping.json",
    "events.out.tfevents.*",
)

FOLDERS = ("inference", "inference_ema", "reconstructions")


def find_run(output_dir: str | os.PathLike[str]) -> list[str]:
    """The names of the files in a folder that tell of a run: checkpoints and metrics, sorted.

    Other files, such as a user's own weights or images, do not make a folder a used one.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir()]
    return sorted(name for name in names if name in (POINTER, METRICS) or CHECKPOINT.match(name))


def check_folder(cfg: DictConfig, args: Namespace) -> None:
    """Reject a training run in the folder of another one; nothing is changed.

    Args:
        cfg: with ``train.output_dir`` and ``train.init_checkpoint``.
        args: ``eval_only``, ``resume`` and, where given, ``overwrite``.

    Raises:
        ValueError: the folder has a run, and neither ``--resume`` nor ``--overwrite`` says what is
            to become of it; both are given; ``--resume`` finds checkpoints and not which of them is
            the last; or ``--overwrite`` would remove what the run starts from.
    """
    if args.eval_only:
        return
    folder = cfg.train.output_dir
    overwrite = getattr(args, "overwrite", False)
    if overwrite and args.resume:
        raise ValueError("--resume continues a run and --overwrite discards it: take one of them")
    found = find_run(folder)
    to_resume = [name for name in found if re.match(r"model_(\d{7}|final)\.pth", name)]
    if args.resume and to_resume and POINTER not in found:
        raise ValueError(
            f"{folder} has checkpoints ({', '.join(to_resume[:3])}) and no {POINTER}, so none is"
            f" resumed: write the name of one into {folder}/{POINTER}, or take --overwrite"
        )
    if not found or args.resume:
        return
    if not overwrite:
        more = f" and {len(found) - 3} more files" if len(found) > 3 else ""
        raise ValueError(
            f"{folder} already has a run ({', '.join(found[:3])}{more}): --resume continues it,"
            " --overwrite removes it, or choose another train.output_dir"
        )
    start, _ = split_prefix(cfg.train.init_checkpoint)
    if start and os.path.exists(start):
        path = Path(start).resolve()
        if any(path.is_relative_to(old.resolve()) for old in _files_of_run(folder)):
            raise ValueError(
                f"--overwrite would remove {start}, which train.init_checkpoint starts from: move"
                " it, or choose another train.output_dir"
            )


def claim_folder(cfg: DictConfig, args: Namespace) -> list[str]:
    """Make the folder of a run, and with ``--overwrite`` remove the run that is in it.

    Every process calls it; the first one looks and decides for all of them, before any writes.

    Args:
        cfg: see :func:`check_folder`.
        args: see :func:`check_folder`.

    Returns:
        The names of what was removed.

    Raises:
        ValueError, OSError: see :func:`check_folder`; or the folder cannot be made or changed.
    """
    outcome: list[str] | Exception = []
    if comm.is_main_process():
        try:
            check_folder(cfg, args)
            os.makedirs(cfg.train.output_dir, exist_ok=True)
            if getattr(args, "overwrite", False) and not args.eval_only:
                outcome = _remove_run(cfg.train.output_dir)
        except (ValueError, OSError) as error:
            outcome = error
    outcome = comm.all_gather(outcome)[0]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _files_of_run(output_dir: str) -> list[Path]:
    """What a run has written into its folder, the pointer of ``--resume`` first."""
    folder = Path(output_dir)
    names = [path for pattern in FILES for path in sorted(folder.glob(pattern))]
    checkpoints = [p for p in sorted(folder.iterdir()) if CHECKPOINT.match(p.name)]
    inside = [folder / name for name in FOLDERS if (folder / name).is_dir()]
    return names + checkpoints + inside


def _remove_run(output_dir: str) -> list[str]:
    """Remove what a run has left in a folder; nothing where there was no run."""
    old = _files_of_run(output_dir) if find_run(output_dir) else []
    for path in old:  # the pointer first: a kill in between leaves nothing to resume
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return [path.name for path in old]


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


TIMEOUT = timedelta(minutes=30)  # of an exchange between processes


def run_distributed(main: Callable[[Namespace], Any], args: Namespace, cfg: DictConfig) -> None:
    """Run ``main(args)`` in every process of the job.

    Under torchrun this process is one of them. Otherwise ``args.num_gpus`` processes are started on
    this machine. Processes exchange tensors over nccl where the run is on GPUs, over gloo where it
    is on the CPU, also on a machine with GPUs.

    Args:
        main: what a process runs; it can be pickled.
        args: of :func:`crossmae_det.engine.argument_parser`.
        cfg: the config of the job, for its device and its folder; ``main`` reads its own.

    Raises:
        ValueError: a config that is not one of a job, fewer GPUs than processes, a device of one
            process for several, or a folder that has another run.
    """
    check_keys(cfg)
    device = resolve_device(cfg.train.device)
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    # As in detectron2, 0 GPUs are one process.
    local_size = int(os.environ["LOCAL_WORLD_SIZE"]) if torchrun else args.num_gpus or 1
    world_size = int(os.environ["WORLD_SIZE"]) if torchrun else args.num_machines * local_size
    _check_devices(device, local_size, world_size)
    if not torchrun or os.environ["RANK"] == "0":
        check_folder(cfg, args)
    if torchrun:
        _run_process(int(os.environ["LOCAL_RANK"]), main, args, device.type, local_size, {})
    elif world_size == 1:
        main(args)
    else:
        url = _free_address(args) if args.dist_url == "auto" else args.dist_url
        group = {"init_method": url, "world_size": world_size}
        start_processes(
            _start_process,
            (main, args, device.type, local_size, group),
            nprocs=local_size,
            start_method="spawn",
        )


def _check_devices(device: torch.device, local_size: int, world_size: int) -> None:
    if local_size < 1:
        raise ValueError(f"--num-gpus must not be negative, got {local_size}")
    if device.type == "cuda" and local_size > torch.cuda.device_count():
        raise ValueError(
            f"{local_size} processes need as many GPUs, and this machine has"
            f" {torch.cuda.device_count()}: lower --num-gpus, or take train.device=cpu"
        )
    if world_size > 1 and device.index is not None:
        raise ValueError(
            f"train.device='{device}' is one device, and there are {world_size} processes: take"
            f" train.device={device.type}"
        )


def _free_address(args: Namespace) -> str:
    if args.num_machines > 1:
        raise ValueError("--dist-url auto is for one machine: give the address of the first one")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def _start_process(
    local_rank: int,
    main: Callable[[Namespace], Any],
    args: Namespace,
    device_type: str,
    local_size: int,
    group: dict[str, Any],
) -> None:
    group["rank"] = args.machine_rank * local_size + local_rank
    run_tool(lambda: _run_process(local_rank, main, args, device_type, local_size, group))


def _run_process(
    local_rank: int,
    main: Callable[[Namespace], Any],
    args: Namespace,
    device_type: str,
    local_size: int,
    group: dict[str, Any],
) -> None:
    """Join the group of all processes, run, and leave it.

    Args:
        local_rank: of this process, on its machine.
        main: what to run with ``args``.
        args: of the command line.
        device_type: of the run: "cuda", "cpu".
        local_size: processes on this machine.
        group: ``init_method``, ``world_size`` and ``rank``; torchrun has them in the environment.
    """
    if device_type == "cuda":
        torch.cuda.set_device(local_rank)
    backend = distributed.get_default_backend_for_device(device_type)
    distributed.init_process_group(backend, timeout=TIMEOUT, **group)
    comm.create_local_process_group(local_size)
    comm.synchronize()  # detectron2 issue: groups that are used at once may time out
    main(args)
    distributed.destroy_process_group()
