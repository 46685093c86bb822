"""Mixed precision at inference: in the backbone, with float32 after it."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from crossmae_det.engine.trainer import autocast


@contextlib.contextmanager
def inference_autocast(model: nn.Module, dtype: str | None) -> Iterator[None]:
    """Mixed precision for the inference of any model: evaluation, demo and drawings.

    A model with a ``backbone`` runs it in mixed precision, where nearly all of the time goes, and
    everything after it in float32: logits of 8 bits would give tied scores, and detectron2 pastes a
    mask on a sampling grid of the mask's own type. Other models run in mixed precision as a whole.

    Args:
        model: the model itself, not a wrapper of it.
        dtype: "bf16", "fp16", or None for float32.

    Raises:
        ValueError: another dtype.
    """
    device = next(model.parameters()).device
    backbone = getattr(model, "backbone", None)
    if dtype is None or not isinstance(backbone, nn.Module):
        with autocast(device, dtype):
            yield
        return
    autocast(device, dtype)  # rejects an unknown dtype now
    model.backbone = _MixedPrecision(backbone, dtype)
    try:
        yield
    finally:
        model.backbone = backbone


class _MixedPrecision(nn.Module):
    """A module that runs in mixed precision and returns float32; its attributes are the module's.

    It stands in for the module only for a while. A forward method or hooks on the module itself
    would become a part of its compiled graph, and compile it again in every evaluation.
    """

    def __init__(self, module: nn.Module, dtype: str):
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with autocast(next(self.module.parameters()).device, self.dtype):
            output = self.module(*args, **kwargs)
        return _float32(output)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def _float32(value: Any) -> Any:
    """The floating-point tensors of a tensor, a dict, a list or a tuple in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _float32(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_float32(item) for item in value)
    return value
