"""Mixed precision: which one a device has, and where training and inference use it."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Instruction sets that multiply bf16 matrices: of AMD and Intel, and of ARM.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


def amp_dtype(options: Mapping[str, Any], device: torch.device) -> str | None:
    """The mixed precision that the ``train`` key of a config selects, for :func:`autocast`.

    "auto" is the fastest one on the device: on a GPU "bf16", or "fp16" before Ampere; on a CPU
    "bf16" if it has instructions for it, else None: emulated bf16 is ten times slower than float32.
    """
    if not options["amp"]["enabled"]:
        return None
    if options["amp"]["dtype"] != "auto":
        return options["amp"]["dtype"]
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # Before torch 2.9 there is no such function, and "auto" is float32 on a CPU.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if any(capabilities.get(name) for name in BF16_INSTRUCTIONS) else None


def autocast(device: torch.device, dtype: str | None) -> contextlib.AbstractContextManager:
    """Mixed precision on ``device``: "bf16", "fp16", or None for none.

    Raises:
        ValueError: another name.
    """
    if dtype is None:
        return contextlib.nullcontext()
    if dtype not in AMP_DTYPES:
        raise ValueError(f"train.amp.dtype='{dtype}': must be one of auto, {', '.join(AMP_DTYPES)}")
    return torch.autocast(device.type, dtype=AMP_DTYPES[dtype])


@contextlib.contextmanager
def inference_autocast(model: nn.Module, dtype: str | None) -> Iterator[None]:
    """Mixed precision for inference: evaluation, prediction and visualizations.

    A model with a ``backbone`` runs it in mixed precision, where nearly all of the time goes, and
    everything after it in float32: with the 8 significant bits of bf16, scores would tie, and
    detectron2 pastes a mask on a sampling grid of the mask's own type. Other models run in mixed
    precision as a whole.

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
    """Runs a module in mixed precision and returns float32; its attributes are the module's.

    A temporary stand-in: a forward method or hooks set on the module itself would become a part of
    its compiled graph, and compile it again in every evaluation.
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
