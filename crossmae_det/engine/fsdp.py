"""FSDP2: a model sharded over the processes of a job (https://arxiv.org/abs/2304.11277).

Each process keeps a part of every parameter, of its gradient and of the optimizer's state; the
parameters of a block are gathered while it computes. Arithmetic and checkpoints are those of
DistributedDataParallel: see :mod:`crossmae_det.checkpoint.loading`.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from crossmae_det.checkpoint.loading import distribute_like

logger = logging.getLogger(__name__)


def check_config(cfg: DictConfig) -> None:
    """Reject a config that a sharded model cannot run.

    Raises:
        ValueError: it evaluates, or averages weights.
    """
    if "evaluator" in cfg.dataloader:
        # Processes with fewer images would leave the others waiting for their parts.
        raise ValueError(
            "train.fsdp is for jobs without evaluation, but the config has dataloader.evaluator:"
            " set train.fsdp.enabled=False"
        )
    if cfg.train.ema.enabled:
        raise ValueError("train.fsdp and train.ema exclude each other: disable one of them")


def shard(model: nn.Module) -> nn.Module:
    """Shard a model over the processes of the job, each of its transformer blocks as one unit.

    Args:
        model: on its device; changed in place. All processes start from the weights of the first.
            ``model.forward_methods`` names the methods other than ``forward`` that run layers.

    Returns:
        The model; unchanged if the job has one process.
    """
    if comm.get_world_size() == 1:
        return model
    # Processes are seeded differently, and so are their initial weights.
    for tensor in model.state_dict().values():
        torch.distributed.broadcast(tensor, src=0)
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (comm.get_world_size(),))
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "blocks":
            for block in module:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in getattr(model, "forward_methods", ()):
        register_fsdp_forward_method(model, method)
    parts = [p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)]
    whole = sum(parameter.numel() for parameter in model.parameters())
    logger.info("%d of %d parameters are in this process", sum(parts), whole)
    return model


def distribute_state(
    optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]
) -> dict[str, Any]:
    """Shard a state dict of whole tensors like the parameters of an optimizer."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def distribute(value: Any, parameter: Tensor) -> Any:
        # Other values are single numbers, which every process has.
        same_shape = isinstance(value, Tensor) and value.shape == parameter.shape
        return distribute_like(value, parameter) if same_shape else value

    state = {
        index: {name: distribute(value, parameters[index]) for name, value in values.items()}
        for index, values in state_dict["state"].items()
    }
    return {**state_dict, "state": state}
