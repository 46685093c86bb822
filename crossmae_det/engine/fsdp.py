"""A model spread over the processes of a job by FSDP2 (https://arxiv.org/abs/2304.11277).

Each process keeps a part of every parameter, of its gradient and of the optimizer's state; a block
is put together for as long as it computes. The arithmetic is that of DistributedDataParallel, and
the checkpoints are, too: see :mod:`crossmae_det.checkpoint.loading`.
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


# Methods that compute beside forward: the parameters are put together for them as well.
FORWARD_METHODS = ("reconstruct",)


def check_config(cfg: DictConfig) -> None:
    """Refuse a config with what a spread model cannot do.

    Raises:
        ValueError: it evaluates, or averages weights.
    """
    if "evaluator" in cfg.dataloader:
        # Processes with fewer images would leave the others waiting for their parts.
        raise ValueError(
            "train.fsdp is for jobs without evaluation, such as pretraining, and this config has a"
            " dataloader.evaluator"
        )
    if cfg.train.ema.enabled:
        raise ValueError("train.fsdp and train.ema do not go together: switch one of them off")


def shard(model: nn.Module) -> nn.Module:
    """Spread a model over the processes of the job, each of its transformer blocks as one unit.

    Args:
        model: on its device; the weights of the first process count. Changed in place.

    Returns:
        The model; as it was where the job has one process.
    """
    if comm.get_world_size() == 1:
        return model
    # Processes are seeded differently, and so are the weights that they begin with.
    for tensor in model.state_dict().values():
        torch.distributed.broadcast(tensor, src=0)
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (comm.get_world_size(),))
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "blocks":
            for block in module:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in FORWARD_METHODS:
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
    parts = [p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)]
    whole = sum(parameter.numel() for parameter in model.parameters())
    logger.info("%d of %d parameters are in this process", sum(parts), whole)
    return model


def distribute_state(
    optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]
) -> dict[str, Any]:
    """An optimizer's state as a file holds it, in the parts that its parameters are in.

    Args:
        optimizer: over parameters that are spread, or whole.
        state_dict: of an optimizer over the same parameters, with whole tensors.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def distribute(value: Any, parameter: Tensor) -> Any:
        # Beside tensors of a parameter's shape there are single numbers, which every process has.
        same_shape = isinstance(value, Tensor) and value.shape == parameter.shape
        return distribute_like(value, parameter) if same_shape else value

    state = {
        index: {name: distribute(value, parameters[index]) for name, value in values.items()}
        for index, values in state_dict["state"].items()
    }
    return {**state_dict, "state": state}
