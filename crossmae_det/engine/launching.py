"""Starting the processes of a job: one, many on a machine, or many machines."""

import os
import socket
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import distributed
from torch.multiprocessing import start_processes

from crossmae_det.engine.configuration import check_keys
from crossmae_det.engine.run_folder import check_folder
from crossmae_det.engine.setup import resolve_device, run_tool

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
