"""Tensors that are spread over processes: whole in a file, in parts in a model."""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def gather(content: Any) -> Any:
    """What a checkpoint holds, with whole tensors in place of those that are spread.

    Every process of the job must call it, with the same content. One tensor at a time is whole on
    the device.

    Args:
        content: dicts, lists, tensors and plain values, nested.

    Returns:
        The same, with tensors that were spread on the CPU.
    """
    if isinstance(content, DTensor):
        return content.full_tensor().cpu()
    if isinstance(content, dict):
        return {key: gather(value) for key, value in content.items()}
    if isinstance(content, list):
        return [gather(value) for value in content]
    return content


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor in the parts that ``like`` is in; as it is where that is whole.

    Every process of the job must call it, with the same whole tensor of the shape of ``like``.
    """
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device, like.dtype), like.device_mesh, like.placements)
