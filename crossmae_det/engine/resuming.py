"""What of a checkpoint and of a config counts when a run is resumed.

The config decides every setting, the checkpoint has what was trained. A resumed run takes the
learning rates, weight decay, betas, schedule, batch size, data and seed of its config, and from the
checkpoint the weights, the state of the optimizer (by the names of the parameters) and the number
of images seen. What differs from the run so far is logged; what cannot be combined is rejected.
"""

import inspect
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from detectron2.config.instantiate import locate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from crossmae_det.engine.configuration import CATEGORIES

logger = logging.getLogger(__name__)

# The weights are those of the checkpoint, whatever the run started from.
WITHOUT_EFFECT = frozenset({"train.init_checkpoint"})
OPTIMIZER = "optimizer._target_"
_ABSENT = "(not set)"


class Change(NamedTuple):
    """A setting that differs between a checkpoint and the config of the resumed run."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        note = "" if self.key not in WITHOUT_EFFECT else "  (no effect: the weights are the run's)"
        return f"{self.key}: {_short(self.old)} -> {_short(self.new)}{note}"


def _short(value: Any) -> str:
    """A value in one line that leaves room for another."""
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def settings(cfg: DictConfig) -> dict[str, Any]:
    """The values of a resolved config by their full keys, for :func:`changes`.

    Returns:
        "train.seed" -> 0 and so on: numbers, strings, booleans, None, and lists and dicts of them.
        Classes and functions are given by name. All can be saved in a checkpoint.
    """
    flat: dict[str, Any] = {}

    def visit(node: Any, key: str) -> None:
        if isinstance(node, str) and "\n" in node:
            node = yaml.safe_load(node)  # the config of a model that is built from yaml keys
        if isinstance(node, dict) and all(isinstance(name, str) for name in node):
            for name, value in node.items():
                if name == "_target_" and isinstance(value, str):
                    value = locate(value)  # one spelling for a class and for its name in yaml
                visit(value, f"{key}.{name}" if key else name)
        elif isinstance(node, list) and any(isinstance(value, dict) for value in node):
            for index, value in enumerate(node):
                visit(value, f"{key}.{index}")
        else:
            flat[key] = _plain(node)

    visit(OmegaConf.to_container(cfg, resolve=True), "")
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Where two results of :func:`settings` differ, sorted by key."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        pair = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if pair[0] != pair[1]:
            found.append(Change(key, *pair))
    return found


def check_changes(path: str, found: Iterable[Change]) -> None:
    """Reject what a run cannot take up on its way.

    Args:
        path: the checkpoint, for the message.
        found: by :func:`changes`.

    Raises:
        ValueError: another optimizer, or other classes.
    """
    for key, old, new in found:
        if key == OPTIMIZER:
            raise ValueError(
                f"cannot resume {path}: its optimizer is {old} and the config's is {new}: set"
                f" {key} back, or start a new run from it with train.init_checkpoint={path}"
            )
        if key == CATEGORIES and _names(old) != _names(new):
            raise ValueError(
                f"cannot resume {path}: its classes are {_listing(old)} and those of the config's"
                f" dataset are {_listing(new)}: take a dataset of the same classes, or start a new"
                f" run from it with train.init_checkpoint={path}"
            )


def _names(categories: Any) -> Any:
    return list(categories.values()) if isinstance(categories, Mapping) else categories


def _listing(categories: Any) -> str:
    names = _names(categories)
    if not isinstance(names, list):
        return str(names)
    first = ", ".join(map(str, names[:5]))
    return f"{len(names)} ({first}{', ...' if len(names) > 5 else ''})"


def check_model(
    path: str, file: Mapping[str, Tensor], model: Mapping[str, Tensor], found: Iterable[Change]
) -> None:
    """Reject a checkpoint of another model.

    Args:
        path: the checkpoint, for the message.
        file: the weights in the checkpoint.
        model: the state dict of the model.
        found: by :func:`changes`; those of the model are in the message.

    Raises:
        ValueError: names or shapes differ.
    """
    for name in sorted(file.keys() | model.keys()):
        shapes = [tuple(state[name].shape) if name in state else None for state in (file, model)]
        if shapes[0] == shapes[1]:
            continue
        there, here = ("is missing" if shape is None else f"is {shape}" for shape in shapes)
        causes = [str(change) for change in found if change.key.startswith("model.")]
        because = f" (changed: {', '.join(causes[:3])})" if causes else ""
        raise ValueError(
            f"cannot resume {path}: it is of another model, '{name}' {there} in it and {here} in"
            f" the config's model{because}: set the model back, or choose another train.output_dir"
        )


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of the parameters in each group of an optimizer, in its order.

    Args:
        model: without a DistributedDataParallel wrapper.
        optimizer: over parameters of the model.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def match_optimizer_state(
    state_dict: Mapping[str, Any],
    old_names: list[list[str]] | None,
    optimizer: torch.optim.Optimizer,
    names: list[list[str]],
) -> dict[str, Any]:
    """The state of an optimizer in a file, for the parameters and settings of another one.

    Args:
        state_dict: of the optimizer in the file.
        old_names: its :func:`parameter_names`; None in files that have none: parameters are then
            matched by their order.
        optimizer: the optimizer to load it into.
        names: of its parameters.

    Returns:
        What ``optimizer.load_state_dict`` takes: the state of every parameter that the file has one
        for, the groups and their settings as ``optimizer`` has them.

    Raises:
        ValueError: the file has no names and the parameters are not the same; or the settings of
            ``optimizer`` need a state that the file does not have (amsgrad, say).
    """
    ours = [name for group in names for name in group]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    order = [index for group in state_dict["param_groups"] for index in group["params"]]
    if old_names is None:
        saved_names = _by_order(state_dict, order, ours, parameters)
    else:
        saved_names = [name for group in old_names for name in group]
    known = dict(zip(saved_names, order, strict=True))
    state = {
        place: state_dict["state"][known[name]]
        for place, name in enumerate(ours)
        if known.get(name) in state_dict["state"]
    }
    _check_entries(optimizer, state, ours)
    for what, missing in (
        ("not trained so far start without optimizer state", [n for n in ours if n not in known]),
        ("are no longer trained: their optimizer state is dropped", known.keys() - set(ours)),
    ):
        if missing:
            logger.warning("%d parameters %s (first: %s)", len(missing), what, min(missing))
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def _by_order(
    state_dict: Mapping[str, Any], order: list[int], names: list[str], parameters: list[Tensor]
) -> list[str]:
    """The names of a file without names, where its parameters are the same."""
    advice = (
        "the checkpoint, of an earlier version, has no names for them: resume with the parameters"
        " and groups of that run, or start a new run from its weights by train.init_checkpoint"
    )
    if len(order) != len(names):
        raise ValueError(
            f"the optimizer's state is for {len(order)} parameters, and the config trains"
            f" {len(names)}; {advice}"
        )
    for index, name, parameter in zip(order, names, parameters, strict=True):
        tensors = [v for v in state_dict["state"].get(index, {}).values() if isinstance(v, Tensor)]
        for shape in (tensor.shape for tensor in tensors if tensor.ndim == parameter.ndim > 0):
            if shape != parameter.shape:
                raise ValueError(
                    f"the optimizer's state in the place of '{name}' {tuple(parameter.shape)} is"
                    f" {tuple(shape)}; {advice}"
                )
    return names


def _check_entries(
    optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]], names: list[str]
) -> None:
    """Reject settings that need what the state does not have; torch fails at the first step."""
    place = 0
    for group in optimizer.param_groups:
        needed: set[str] | None = None
        for _ in group["params"]:
            entries = state.get(place)
            if entries:
                needed = _entries(optimizer, group) if needed is None else needed
                if missing := sorted(needed - entries.keys()):
                    raise ValueError(
                        f"the checkpoint has no '{missing[0]}' for '{names[place]}', which the"
                        f" config's settings of {type(optimizer).__name__} need: set them back"
                    )
            place += 1


def _entries(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> set[str]:
    """The names of what an optimizer keeps for a parameter, tried out on one number."""
    like = group["params"][0]
    trial = nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))
    trial.grad = torch.zeros_like(trial)
    arguments = inspect.signature(type(optimizer)).parameters.keys() & optimizer.defaults.keys()
    one = type(optimizer)([trial], **{name: group[name] for name in arguments})
    one.step()
    return {name for name, value in one.state[trial].items() if value is not None}
