"""Start a job from a command line: arguments, device, log, run folder and processes."""

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
from crossmae_det.engine.checkpointing import POINTER
from crossmae_det.engine.config import check_keys, log_data, resolve
from crossmae_det.engine.hooks import CURVES, METRICS
from crossmae_det.engine.loggers import FILE as LOGGERS_FILE
from crossmae_det.engine.run_record import FILE as RECORD
from crossmae_det.engine.trainer import NonFiniteError
from crossmae_det.engine.validation import EarlyStopping

logger = logging.getLogger(__name__)

# Errors that the user can fix: one line, without a traceback. Anything else is a bug.
USER_ERRORS = (ValueError, OSError, OmegaConfBaseException, NonFiniteError)

BAD_INPUT = 2  # exit code

WAIT_FOR_FIRST = 10  # seconds

GLOO_RELEASE = 0.5  # seconds
TIMEOUT = timedelta(minutes=30)  # of an exchange between processes

# Loggers whose records are in the log file only.
FILE_ONLY = ("detectron2.data.common", "detectron2.data.dataset_mapper")

# Checkpoints of a run, and the temporary files that a kill during a save leaves behind.
CHECKPOINT = re.compile(r"\.?model_(\d{7}|final|best|before_nonfinite)(\.\d+)?\.pth")

REPORT = "init_checkpoint.json"  # how each tensor of train.init_checkpoint was used

PAGE = "report.html"  # of train.report
RECIPE = "recipe.yaml"  # the config that the run was started with, without overrides

EMA_FOLDER = "inference_ema"  # results of the averaged weights, beside "inference"

# What else a run and the visualizers write. The log and the config are not removed: a new run
# appends to the log and replaces the config.
FILES = (
    POINTER,
    METRICS,
    REPORT,
    CURVES,
    RECORD,
    RECIPE,
    PAGE,
    "predictions.png",
    EarlyStopping.FILE,
    "events.out.tfevents.*",
    "inference",
    EMA_FOLDER,
    "reconstructions",
    LOGGERS_FILE,
    "wandb",
)

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def argument_parser(description: str, epilog: str) -> ArgumentParser:
    """detectron2's arguments for training and evaluation, ``--overwrite`` and loading options.

    ``description`` begins the help text, ``epilog`` ends it. Call ``parse_intermixed_args``:
    options may precede and follow overrides.
    """
    parser = default_argument_parser(epilog)
    parser.description = description
    for action in parser._actions:
        if action.dest == "opts":  # detectron2 takes everything after the first override as one
            action.nargs, action.default = "*", []
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="remove the run that is in train.output_dir: its checkpoints, metrics and results",
    )
    add_loading_arguments(parser)
    return parser


def add_loading_arguments(parser: ArgumentParser) -> None:
    """Add ``--prefix``, ``--allow-missing`` and ``--allow-unexpected``."""
    parser.add_argument(
        "--prefix",
        default="",
        help="part of the checkpoint to load: an entry (teacher.), a name prefix (encoder.)"
        " or both (student.backbone.)",
    )
    for name, what in (
        ("missing", "names in the model that the checkpoint may lack"),
        ("unexpected", "names in the checkpoint that the model may lack"),
    ):
        parser.add_argument(
            f"--allow-{name}",
            action="append",
            default=[],
            metavar="PATTERN",
            help=f"{what}, with * and ? as in a shell; may be given several times",
        )


def run_tool(main: Callable[[], Any]) -> None:
    """Run the main function of a tool; an error of the user becomes one line and exit code 2."""
    try:
        main()
    except USER_ERRORS as error:
        logger.debug("Traceback of the error", exc_info=True)
        if comm.get_rank() > 0:
            # If the first process fails as well, it reports the error, and its exit ends this one.
            time.sleep(WAIT_FOR_FIRST)
        print(f"{os.path.basename(sys.argv[0])}: error: {_one_line(error)}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except ProcessExitedException as error:
        sys.exit(error.exit_code)  # the process has reported its error


def _one_line(error: Exception) -> str:
    """The message of an error in one line, without what OmegaConf and torch add to it."""
    cause: BaseException = error
    while isinstance(cause, OmegaConfBaseException) and isinstance(cause.__context__, USER_ERRORS):
        cause = cause.__context__
    if isinstance(cause, OmegaConfBaseException):  # not an error of a resolver: name the key
        key = getattr(error, "full_key", None)
        return f"{key}: {str(error).splitlines()[0]}" if key else str(error).splitlines()[0]
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    if "DataLoader worker" in lines[0]:
        # torch puts the worker's traceback into the message; "package.Error: message" ends it.
        return re.sub(r"^[\w.]+: ", "", lines[-1])
    return " ".join(line.strip() for line in lines)


def resolve_device(name: str) -> torch.device:
    """The device of a config: "auto" is CUDA if there is a GPU, else the CPU.

    Raises:
        ValueError: the name is unknown, or there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train.device='{name}': unknown device: use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda", "meta"):  # meta: shapes only, for model_zoo.get
        raise ValueError(f"train.device='{name}': models run on cpu and cuda: use auto")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"train.device='{name}': torch finds no GPU: use auto or cpu")
    return device


def keep_freed_memory(device: torch.device) -> bool:
    """On a CPU, let this process keep freed memory for later tensors.

    Otherwise glibc returns large blocks to the kernel, and the activations of the next step cost a
    page fault and a page of zeros for every 4 KiB: a quarter of the time of a step of ViT-B on 32
    images. The memory of the process then never shrinks. On a GPU, torch caches memory itself.

    Returns:
        Whether it took effect: False on a GPU, or if the C library is not glibc.
    """
    if device.type != "cpu":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1)):
        logger.info("mallopt is unavailable: CPU training may be slower")
        return False
    return True


def start_log(output_dir: str | None = None) -> None:
    """Log to ``log.txt`` in a folder (unless None) and, in the first process, to the terminal.

    The file has all records, the terminal those from INFO on. Other processes log to
    ``log.txt.rankN`` only, including warnings.
    """
    rank = comm.get_rank()
    for name in ("fvcore", "detectron2", "crossmae_det"):
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
    """The versions of the main packages, in one line."""
    return (
        f"crossmae_det {crossmae_det.__version__}, torch {torch.__version__},"
        f" detectron2 {detectron2.__version__}"
    )


def find_run(output_dir: str | os.PathLike[str]) -> list[str]:
    """The names of the checkpoints and metrics of a run in a folder, sorted.

    Other files, such as a user's own weights or images, are not signs of a run.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir()]
    return sorted(name for name in names if name in (POINTER, METRICS) or CHECKPOINT.match(name))


def check_folder(cfg: DictConfig, args: Namespace) -> None:
    """Reject a training run in a folder that already has one; no file is changed.

    Args:
        cfg: with ``train.output_dir`` and ``train.init_checkpoint``.
        args: ``eval_only``, ``resume`` and optionally ``overwrite``.

    Raises:
        ValueError: the folder has a run, without ``--resume`` or ``--overwrite``; both are given;
            ``--resume`` finds checkpoints but no record of the last one; or ``--overwrite``
            would remove the weights that the run starts from.
    """
    if args.eval_only:
        return
    folder = cfg.train.output_dir
    overwrite = getattr(args, "overwrite", False)
    if overwrite and args.resume:
        raise ValueError("--resume continues a run and --overwrite removes it: use one of them")
    found = find_run(folder)
    to_resume = [name for name in found if re.match(r"model_(\d{7}|final)\.pth", name)]
    if args.resume and to_resume and POINTER not in found:
        raise ValueError(
            f"{folder} has checkpoints ({', '.join(to_resume[:3])}) but no {POINTER}: write the"
            f" name of one into {folder}/{POINTER} to resume it, or use --overwrite"
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
                f"--overwrite would remove {start}, which train.init_checkpoint points to: move it,"
                " or choose another train.output_dir"
            )


def claim_folder(cfg: DictConfig, args: Namespace) -> list[str]:
    """Create the folder of a run, and with ``--overwrite`` remove the run in it.

    Every process calls it; the first one decides for all of them, before any of them writes. For
    the arguments see :func:`check_folder`.

    Returns:
        The names of the files and folders removed.

    Raises:
        ValueError: see :func:`check_folder`; or the folder cannot be created or changed.
    """
    result: list[str] | ValueError = []
    if comm.is_main_process():
        folder = cfg.train.output_dir
        try:
            check_folder(cfg, args)
            os.makedirs(folder, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"{folder} is not writable")
            if getattr(args, "overwrite", False) and not args.eval_only and find_run(folder):
                old = _files_of_run(folder)  # the pointer first: a kill leaves nothing to resume
                for path in old:
                    is_folder = path.is_dir() and not path.is_symlink()
                    shutil.rmtree(path) if is_folder else path.unlink()
                result = [path.name for path in old]
        except ValueError as error:
            result = error
        except OSError as error:
            result = ValueError(f"train.output_dir={folder}: {error}")
    result = comm.all_gather(result)[0]
    if isinstance(result, ValueError):
        raise result
    return result


def _files_of_run(output_dir: str) -> list[Path]:
    """What a run has written into its folder, the pointer of ``--resume`` first."""
    folder = Path(output_dir)
    files = [path for pattern in FILES for path in sorted(folder.glob(pattern))]
    return files + [path for path in sorted(folder.iterdir()) if CHECKPOINT.match(path.name)]


def setup(cfg: DictConfig, args: Namespace) -> DictConfig:
    """Resolve the config, claim the run's folder, start the log and seed this process.

    Returns:
        The config without references; the one that was passed in is unchanged.

    Raises:
        ValueError, OSError: a file of the config is missing, or the folder has another run.
    """
    resolved = resolve(cfg)
    options = resolved.train
    device = resolve_device(options.device)
    if device.type == "meta":
        raise ValueError("train.device='meta' cannot run a job: use auto, cpu or cuda")
    removed = claim_folder(resolved, args)
    start_log(options.output_dir)
    world_size = comm.get_world_size()
    processes = f" x {world_size} processes" if world_size > 1 else ""
    logger.info("%s, device %s%s", versions(), device, processes)
    files = "log.txt" if args.eval_only else "config.yaml, log.txt"
    logger.info("Output: %s (%s)", options.output_dir, files)
    if removed:
        logger.warning("--overwrite removed the run in the folder: %s", ", ".join(removed))
    logger.debug("Command line arguments: %s", args)
    if comm.is_main_process():
        # Its import looks for a CUDA compiler.
        from detectron2.utils.collect_env import collect_env_info

        logger.debug("Environment\n%s", collect_env_info())
    log_data(cfg, resolved, training=not args.eval_only)
    seed_all_rng(options.seed + comm.get_rank())
    torch.backends.cudnn.benchmark = options.cudnn_benchmark and not args.eval_only
    return resolved


def run_distributed(main: Callable[[Namespace], Any], args: Namespace, cfg: DictConfig) -> None:
    """Run ``main(args)`` in every process of the job.

    Under torchrun this process is one of them. Otherwise ``args.num_gpus`` processes are started on
    this machine. detectron2's ``launch`` does not support torchrun, and uses nccl on any machine
    with GPUs, even for a run on the CPU; here the backend follows the device of the run.

    Args:
        main: function to run in each process; must be picklable.
        args: from :func:`argument_parser`.
        cfg: the config of the job, for its device and its folder; ``main`` reads its own.

    Raises:
        ValueError: the config lacks a key, there are fewer GPUs than processes, one device is named
            for several processes, or the folder has another run.
    """
    check_keys(cfg)
    device = resolve_device(cfg.train.device)
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    # As in detectron2, 0 GPUs are one process.
    local_size = int(os.environ["LOCAL_WORLD_SIZE"]) if torchrun else args.num_gpus or 1
    world_size = int(os.environ["WORLD_SIZE"]) if torchrun else args.num_machines * local_size
    if local_size < 1:
        raise ValueError(f"--num-gpus must not be negative, got {local_size}")
    if device.type == "cuda" and local_size > torch.cuda.device_count():
        raise ValueError(
            f"{local_size} processes need {local_size} GPUs, but this machine has"
            f" {torch.cuda.device_count()}: lower --num-gpus, or set train.device=cpu"
        )
    if world_size > 1 and device.index is not None:
        raise ValueError(
            f"train.device='{device}' is one device for {world_size} processes: set"
            f" train.device={device.type}"
        )
    if not torchrun or os.environ["RANK"] == "0":
        check_folder(cfg, args)
    if torchrun:
        _run_process(int(os.environ["LOCAL_RANK"]), main, args, device.type, local_size, None)
    elif world_size == 1:
        main(args)
    else:
        url = args.dist_url
        if url == "auto":
            if args.num_machines > 1:
                raise ValueError(
                    "--dist-url=auto works on one machine only: set the address of the first"
                    " machine, tcp://HOST:PORT"
                )
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                url = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        group = {"init_method": url, "world_size": world_size}
        if device.type == "cpu":
            # Each process would start as many threads as this one; torchrun sets one thread each.
            share = max(1, torch.get_num_threads() // local_size)
            os.environ["OMP_NUM_THREADS"] = str(share)
        start_processes(
            _start_process,
            (main, args, device.type, local_size, group),
            nprocs=local_size,
            start_method="spawn",
        )


def _start_process(local_rank: int, *job: Any) -> None:
    run_tool(lambda: _run_process(local_rank, *job))


def _run_process(
    local_rank: int,
    main: Callable[[Namespace], Any],
    args: Namespace,
    device_type: str,
    local_size: int,
    group: dict[str, Any] | None,
) -> None:
    """Join the group of all processes, run ``main(args)``, and leave it.

    ``group`` has ``init_method`` and ``world_size``; under torchrun, whose environment has them, it
    is None.
    """
    if group is not None:
        group["rank"] = args.machine_rank * local_size + local_rank
    if device_type == "cuda":
        torch.cuda.set_device(local_rank)
    backend = distributed.get_default_backend_for_device(device_type)
    distributed.init_process_group(backend, timeout=TIMEOUT, **(group or {}))
    comm.create_local_process_group(local_size)
    comm.synchronize()  # avoids a timeout after init_process_group, as in detectron2
    main(args)
    comm.synchronize()
    distributed.destroy_process_group()
    # gloo's threads need the GIL to release their last tensors. A thread that asks for it while
    # the interpreter shuts down aborts the process, after all work is done.
    time.sleep(GLOO_RELEASE)
