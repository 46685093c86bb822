"""Loading weights into a model: every tensor is accounted for, or nothing is changed.

A file holds either the whole model that it is loaded into, or a trunk: a bare ViT (the keys of
detectron2's ViT and of published MAE files), a pretraining model (``encoder.*``), or the trunk
inside a detector (``backbone.net.*``). The trunk of any of these fits the trunk of any model.
"""

import contextlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossmae_det.checkpoint.files import read_checkpoint
from crossmae_det.checkpoint.published import to_native
from crossmae_det.checkpoint.report import Report
from crossmae_det.checkpoint.sharded import distribute_like
from crossmae_det.layers.position_embedding import resample_position_embedding
from crossmae_det.layers.relative_position import resample_table
from crossmae_det.modeling import ViT

# Where files of a whole model keep the trunk.
TRUNK_PREFIXES = ("", "encoder.", "backbone.net.", "backbone.")
# What a trunk's file may lack: the model starts it from its own initial values.
RELATIVE_POSITION = re.compile(r"blocks\.\d+\.attn\.rel_pos_[hw]$")
# Layers of a detector that have a row for every class.
CLASS_DEPENDENT = re.compile(r"roi_heads\.(box_predictor(s\.\d+)?|mask_head\.predictor)\.")
# What a trunk's file may hold beyond the trunk: the class token where the model has none, and the
# parts of pretraining and classification models that come after the trunk.
MAY_BE_DROPPED = re.compile(
    r"(cls_token$|mask_token$|decoder|dec_norms\.|wfm\.|norm\.|fc_norm\.|head\.)"
)


def load(
    model: nn.Module,
    path: str | Path,
    *,
    whole: bool = False,
    exact: bool = False,
    weights: str = "model",
) -> Report:
    """Load a checkpoint into a model, strictly.

    The file's trunk is loaded into the model's trunk. From a file of the same kind of model (a
    detector into a detector), so is every other part of that name, but for the last layers where
    the classes are others. The rest of the model stays as it is and is listed as initialised, the
    rest of the file is listed as dropped. Position embeddings and relative-position tables of
    another size are resampled.

    Args:
        model: the model, in place. It must contain one ViT where the file is not the whole model's.
        path: a file that :func:`read_checkpoint` reads; the weights may lie under "model".
        whole: refuse a file that does not hold the whole model, as evaluation needs.
        exact: refuse to resample as well, as resuming needs.
        weights: "model", or "ema" for the averaged weights of a run.

    Returns:
        What was loaded, resampled, initialised and dropped.

    Raises:
        FileNotFoundError, ValueError: the file cannot be read, or something in it is missing,
            unexpected or of another shape; the model is then unchanged.
    """
    target = model.state_dict()
    state = _native_names(extract_state_dict(read_checkpoint(path), path, weights), target)
    trunks = _trunks(model)
    report = Report(str(path))
    same_names = set(state) == set(target)
    if whole and not same_names:
        raise ValueError(_difference(state, target, path))
    if whole or (same_names and len(trunks) != 1):
        names = {name: name for name in state}
    else:
        names = _match_parts(model, state, report)
    grids = _position_grids(model)
    new = {}
    for name, source in names.items():
        grid = grids.get(name)
        new[name] = _fit(source, state[source], target[name], grid, path, exact)
        resampled = new[name].shape != state[source].shape
        (report.resampled if resampled else report.loaded).append(name)
    # Only now, when everything fits: a refused file leaves the model as it was.
    with torch.no_grad():
        for name, tensor in new.items():
            target[name].copy_(distribute_like(tensor, target[name]))
    return report


def extract_state_dict(
    checkpoint: Mapping[str, Any], path: str | Path, weights: str = "model"
) -> dict[str, Tensor]:
    """The weights in what a checkpoint file holds.

    Args:
        checkpoint: what the file holds.
        path: the file, for messages.
        weights: "model" for what is under that name, or else for the file itself; "ema" for the
            averaged weights of a run.

    Raises:
        ValueError: there are none, or something else than tensors.
    """
    if weights == "ema":
        if "ema" not in checkpoint:
            raise ValueError(
                f"{path} holds no averaged weights; the run had train.ema.enabled=False"
            )
        averaged = checkpoint["ema"].items()
        state = {key.removeprefix("module."): v for key, v in averaged if key != "n_averaged"}
    else:
        state = checkpoint.get("model", checkpoint)
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path} holds no weights, neither under 'model' nor at its top level")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: entry '{name}' is a {type(value).__name__}, not a tensor")
    return dict(state)


def _native_names(state: dict[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by the names here, where a published file goes into a pretraining model."""
    if "patch_embed.proj.weight" in state and "encoder.patch_embed.proj.weight" in target:
        with contextlib.suppress(ValueError):  # a classifier's file, say: its trunk will do
            return to_native(state)
    return state


def _position_grids(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(H, W) in patches of every table of positions, of a trunk or of a decoder, by its name."""
    return {
        f"{name}.pos_embed".lstrip("."): module.pos_grid
        for name, module in model.named_modules()
        if hasattr(module, "pos_grid")
    }


def _trunks(model: nn.Module) -> dict[str, ViT]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ViT)}


def _match_parts(model: nn.Module, state: dict[str, Tensor], report: Report) -> dict[str, str]:
    """Names in the model -> names in the file; lists what is dropped and initialised."""
    path = report.path
    trunks = _trunks(model)
    whole_target = model.state_dict()
    source_prefix = next(
        (prefix for prefix in TRUNK_PREFIXES if f"{prefix}patch_embed.proj.weight" in state), None
    )
    if len(trunks) != 1 or source_prefix is None:
        raise ValueError(_difference(state, whole_target, path))
    ((trunk_name, trunk),) = trunks.items()
    prefix = f"{trunk_name}." if trunk_name else ""
    target = trunk.state_dict()

    # CrossMAE's decoder and MAE's share names, but not what they stand for: all of it or nothing.
    same_kind = source_prefix == prefix and _decoder(state) in (_decoder(whole_target), set())

    names = {}
    for source, tensor in state.items():
        inside = source.removeprefix(source_prefix) if source.startswith(source_prefix) else None
        if inside in target:
            names[prefix + inside] = source
        elif inside is None:
            # Beside the trunk: of use where the model is of the same kind.
            same_part = same_kind and source in whole_target
            if same_part and not _other_classes(source, tensor, whole_target[source]):
                names[source] = source
            else:
                report.dropped.append(source)
        elif MAY_BE_DROPPED.match(inside):
            report.dropped.append(source)
        else:
            raise ValueError(f"{path}: the trunk has no place for '{source}' {tuple(tensor.shape)}")
    for name in whole_target:
        if name in names:
            continue
        inside = name.removeprefix(prefix) if name.startswith(prefix) else None
        if inside in target and not RELATIVE_POSITION.match(inside):
            raise ValueError(
                f"{path}: the file has no '{source_prefix}{inside}'"
                f" for the trunk's {tuple(target[inside].shape)}"
            )
        report.initialised.append(name)
    return names


def _decoder(state: Mapping[str, Tensor]) -> set[str]:
    return {name for name in state if name.startswith("decoder.")}


def _other_classes(name: str, tensor: Tensor, target: Tensor) -> bool:
    return CLASS_DEPENDENT.match(name) is not None and tensor.shape != target.shape


def _fit(
    name: str,
    tensor: Tensor,
    target: Tensor,
    grid: tuple[int, int] | None,
    path: str | Path,
    exact: bool,
) -> Tensor:
    """The tensor in the shape of ``target``: as it is, or a position table resampled.

    Args:
        name: of the tensor in the file.
        tensor: of the file.
        target: of the model.
        grid: (H, W) in patches where the tensor is a position embedding, else None.
        path: of the file.
        exact: refuse to resample.
    """
    if tensor.shape == target.shape:
        return tensor
    channels_fit = tensor.ndim == target.ndim and tensor.shape[-1] == target.shape[-1]
    may_resample = channels_fit and not exact
    if may_resample and RELATIVE_POSITION.search(name):
        return resample_table(tensor.float(), (len(target) + 1) // 2)
    if may_resample and grid is not None:
        side = math.isqrt(tensor.shape[1] - 1)
        if side * side == tensor.shape[1] - 1:
            return resample_position_embedding(tensor.float(), (side, side), grid)
        raise ValueError(
            f"{path}: '{name}' {tuple(tensor.shape)} is not that of a square grid with a class"
            f" token; the model has {tuple(target.shape)}"
        )
    raise ValueError(
        f"{path}: '{name}' is {tuple(tensor.shape)} in the file and {tuple(target.shape)} in the"
        " model; take a model of the checkpoint's size, or its checkpoint"
    )


def _difference(state: Mapping[str, Tensor], target: Mapping[str, Tensor], path: str | Path) -> str:
    """One line on how the keys of a file differ from those of a model."""
    missing = sorted(set(target) - set(state))
    unexpected = sorted(set(state) - set(target))
    parts_there = {name.partition(".")[0] for name in state}
    parts_missing = {name.partition(".")[0] for name in missing}
    if not unexpected and not parts_missing & parts_there:
        return (
            f"{path} has no weights of the {' and the '.join(sorted(parts_missing))}: take the"
            " checkpoint of a whole model"
        )
    parts = [
        f"{len(names)} {what} (first: '{names[0]}')"
        for names, what in ((missing, "tensors of the model missing"), (unexpected, "unexpected"))
        if names
    ]
    return f"{path} does not hold this model: {', '.join(parts)}"
