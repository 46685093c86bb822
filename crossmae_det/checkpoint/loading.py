"""Loading weights into a model: every tensor is accounted for, or nothing is changed.

A file holds either the whole model that it is loaded into, or a trunk: a bare ViT (the keys of
detectron2's ViT and of published MAE files), a pretraining model (``encoder.*``), or the trunk
inside a detector (``backbone.net.*``). The trunk of any of these fits the trunk of any model.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossmae_det.checkpoint.files import read_checkpoint
from crossmae_det.checkpoint.report import Report
from crossmae_det.layers.position_embedding import resample_position_embedding
from crossmae_det.modeling import ViT

# Where files of a whole model keep the trunk.
TRUNK_PREFIXES = ("", "encoder.", "backbone.net.", "backbone.")
# What a trunk's file may lack: the model starts it from its own initial values.
MAY_BE_INITIALISED = re.compile(r"blocks\.\d+\.attn\.rel_pos_[hw]$")
# What a trunk's file may hold beyond the trunk: the class token where the model has none, and the
# parts of pretraining and classification models that come after the trunk.
MAY_BE_DROPPED = re.compile(r"(cls_token$|mask_token$|decoder|norm\.|fc_norm\.|head\.|dec_norms\.)")


def load(model: nn.Module, path: str | Path, *, whole: bool = False) -> Report:
    """Load a checkpoint into a model, strictly.

    A file with the model's own keys is loaded as a whole. From any other file its trunk is loaded
    into the model's trunk; the rest of the model stays as it is and is listed as initialised, the
    rest of the file is listed as dropped. A position embedding of another grid is resampled.

    Args:
        model: the model, in place. It must contain one ViT where the file is a trunk's.
        path: a file that :func:`read_checkpoint` reads; the weights may lie under "model".
        whole: refuse a file that does not hold the whole model, as evaluation needs.

    Returns:
        What was loaded, resampled, initialised and dropped.

    Raises:
        FileNotFoundError, ValueError: the file cannot be read, or something in it is missing,
            unexpected or of another shape; the model is then unchanged.
    """
    state = extract_state_dict(read_checkpoint(path), path)
    target = model.state_dict()
    report = Report(str(path))
    if set(state) == set(target):
        new = {name: _fitting(name, state[name], target[name], path) for name in state}
        report.loaded = sorted(new)
    elif whole:
        raise ValueError(_difference(state, target, path))
    else:
        new = _trunk_into(model, state, report)
    # Only now, when everything fits: a refused file leaves the model as it was.
    with torch.no_grad():
        for name, tensor in new.items():
            target[name].copy_(tensor)
    return report


def extract_state_dict(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The weights in what a checkpoint file holds: under "model", or the file itself.

    Raises:
        ValueError: there is something else than tensors.
    """
    state = checkpoint.get("model", checkpoint)
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path} holds no weights, neither under 'model' nor at its top level")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: entry '{name}' is a {type(value).__name__}, not a tensor")
    return dict(state)


def _trunk_into(model: nn.Module, state: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    """The tensors of the file's trunk by their names in the model; fills in the report."""
    path = report.path
    trunks = [(name, module) for name, module in model.named_modules() if isinstance(module, ViT)]
    source_prefix = next(
        (p for p in TRUNK_PREFIXES if f"{p}patch_embed.proj.weight" in state), None
    )
    if len(trunks) != 1 or source_prefix is None:
        raise ValueError(_difference(state, model.state_dict(), path))
    ((trunk_name, trunk),) = trunks
    prefix = f"{trunk_name}." if trunk_name else ""
    target = trunk.state_dict()

    new: dict[str, Tensor] = {}
    for name, tensor in state.items():
        inside = name.removeprefix(source_prefix) if name.startswith(source_prefix) else None
        if inside in target:
            if inside == "pos_embed" and tensor.shape != target[inside].shape:
                tensor = _resample(tensor, trunk, path)
                report.resampled.append(prefix + inside)
            else:
                report.loaded.append(prefix + inside)
            new[prefix + inside] = _fitting(name, tensor, target[inside], path)
        elif source_prefix and inside is None or MAY_BE_DROPPED.match(inside or name):
            report.dropped.append(name)
        else:
            raise ValueError(f"{path}: the trunk has no place for '{name}' {tuple(tensor.shape)}")
    for name in model.state_dict():
        if name in new:
            continue
        inside = name.removeprefix(prefix) if name.startswith(prefix) else None
        if inside in target and not MAY_BE_INITIALISED.match(inside):
            raise ValueError(
                f"{path}: the file has no '{source_prefix}{inside}'"
                f" for the trunk's {tuple(target[inside].shape)}"
            )
        report.initialised.append(name)
    return new


def _resample(embedding: Tensor, trunk: ViT, path: str) -> Tensor:
    """A square position embedding at the grid of the trunk."""
    rows = embedding.shape[1] - 1 if embedding.ndim == 3 else 0
    side = int(rows**0.5)
    if side < 1 or side * side != rows:
        raise ValueError(
            f"{path}: 'pos_embed' {tuple(embedding.shape)} is not that of a square grid with a"
            f" class token; the trunk has {tuple(trunk.pos_embed.shape)}"
        )
    return resample_position_embedding(embedding.float(), (side, side), trunk.pos_grid)


def _fitting(name: str, tensor: Tensor, target: Tensor, path: str | Path) -> Tensor:
    if tensor.shape != target.shape:
        raise ValueError(
            f"{path}: '{name}' is {tuple(tensor.shape)} in the file and {tuple(target.shape)} in"
            " the model; take a model of the checkpoint's size, or its checkpoint"
        )
    return tensor


def _difference(state: Mapping[str, Tensor], target: Mapping[str, Tensor], path: str | Path) -> str:
    """One line on how the keys of a file differ from those of a model."""
    missing = sorted(set(target) - set(state))
    unexpected = sorted(set(state) - set(target))
    parts = [
        f"{len(names)} {what} (first: '{names[0]}')"
        for names, what in ((missing, "tensors of the model missing"), (unexpected, "unexpected"))
        if names
    ]
    return f"{path} does not hold this model: {', '.join(parts)}"
