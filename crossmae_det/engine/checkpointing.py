"""What of a checkpoint and of a config counts when a run is resumed.

The config decides every setting, the checkpoint has what was trained. A resumed run takes the
learning rates, weight decay, betas, schedule, batch size, data and seed of its config, and from the
checkpoint the weights, the state of the optimizer (by the names of the parameters) and the number
of images seen. What differs from the run so far is logged; what cannot be combined is rejected.

The checkpoints of a run: atomic, safe to read, enough to continue bit by bit.
"""

import inspect
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from detectron2.config.instantiate import locate
from detectron2.engine.hooks import PeriodicCheckpointer as PeriodicHook
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer as FvcoreCheckpointer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from crossmae_det.checkpoint import load, read_checkpoint
from crossmae_det.checkpoint.loading import gather, position_grid
from crossmae_det.engine.config import CATEGORIES
from crossmae_det.utils import atomic_path, save_checkpoint
from crossmae_det.utils.messages import list_names, shorten

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
        old, new = (v if v == _ABSENT else shorten(v) for v in (self.old, self.new))
        return f"{self.key}: {old} -> {new}{note}"


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
    return list_names(names) if isinstance(names, list) else str(names)


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


class Resumed(NamedTuple):
    """What a resumed run began with.

    Attributes:
        path: the checkpoint.
        changes: settings that are others than in the checkpoint.
        missing: what was to be loaded and is not in the file.
        has_settings: whether the file tells its settings; those of earlier versions do not.
    """

    path: str
    changes: list[Change]
    missing: list[str]
    has_settings: bool


class Checkpointer(FvcoreCheckpointer):
    """fvcore's checkpointer with atomic writes and without arbitrary pickles.

    The random numbers and the data of iteration i depend on the seed and on i alone (see
    :class:`~crossmae_det.engine.trainer.Trainer`), so a file holds no random state.

    Args:
        model: the model without wrappers.
        save_dir: the run's folder.
        save_to_disk: False in the processes that do not write.
        run_settings: the settings of the run, which its files hold: see
            :func:`crossmae_det.engine.checkpointing.settings`.
        **checkpointables: what is saved beside the model, each with ``state_dict`` and
            ``load_state_dict``.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool = True,
        run_settings: Mapping[str, Any] | None = None,
        **checkpointables: Any,
    ):
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.run_settings = dict(run_settings or {})

    def save(self, name: str, tag: bool = True, **kwargs: Any) -> None:
        """Write ``name``.pth in the run's folder, from the process that writes; all take part.

        Args:
            name: file name without suffix.
            tag: make it the one that ``--resume`` continues from.
            **kwargs: further plain values to save.

        Raises:
            OSError: the file cannot be written; the checkpoints before it are intact.
        """
        if not self.save_dir:
            return
        data = {"model": self.model.state_dict()}
        data |= {key: item.state_dict() for key, item in self.checkpointables.items()}
        data = gather(data) | position_grid(self.model)
        if not self.save_to_disk:
            return
        if self.run_settings:
            data["settings"] = self.run_settings
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        save_checkpoint(data | kwargs, path)
        if tag:
            self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write the name of the checkpoint that ``--resume`` continues from."""
        with atomic_path(os.path.join(self.save_dir, "last_checkpoint")) as temporary:
            temporary.write_text(last_filename_basename)

    def has_run(self) -> bool:
        """Whether there is a run to resume; the same answer in every process.

        Raises:
            ValueError: some processes see its checkpoint and others, on other machines, do not.
        """
        seen = comm.all_gather(self.has_checkpoint())
        if len(set(seen)) > 1:
            raise ValueError(
                f"cannot resume {self.save_dir}: processes {[i for i, s in enumerate(seen) if s]}"
                f" of {len(seen)} see a checkpoint there: take a folder that all machines share"
            )
        return seen[0]

    def resume(self, optional: Sequence[str] = ()) -> Resumed:
        """Load the tagged checkpoint of the run's folder: the model and everything beside it.

        Args:
            optional: names of what is saved beside the model and may be missing in the file.

        Returns:
            What differs from the run so far. Where that is rejected, no file has been changed.

        Raises:
            FileNotFoundError, ValueError: the checkpoint is missing or damaged, or it cannot be
                continued with these settings.
        """
        path = self.get_checkpoint_file()
        checkpoint = read_checkpoint(path)
        if not isinstance(checkpoint.get("model"), Mapping):
            raise ValueError(
                f"cannot resume {path}: it is not a checkpoint of a run; to start from its weights,"
                f" take train.init_checkpoint={path} and another train.output_dir"
            )
        found = changes(checkpoint.get("settings", self.run_settings), self.run_settings)
        check_changes(path, found)
        check_model(path, checkpoint["model"], self.model.state_dict(), found)
        load(self.model, path, content=checkpoint, whole=True, exact=True)
        missing = []
        for key, item in self.checkpointables.items():
            if key in checkpoint:
                item.load_state_dict(checkpoint[key])
            elif key in optional:
                missing.append(key)
            else:
                raise ValueError(f"cannot resume {path}: it has no '{key}'")
        # What a kill during a save may have left.
        for leftover in Path(self.save_dir).glob(".model_*.pth") if self.save_to_disk else ():
            leftover.unlink()
        logger.info("Resumed from %s", path)
        return Resumed(path, found, missing, "settings" in checkpoint)


class PeriodicCheckpointer(PeriodicHook):
    """detectron2's hook, for runs that are resumed.

    Iterations are counted anew where a run is resumed with another batch size, so that a number may
    come again: the file is then the newest one, and not deleted as the old one of that name.
    """

    def resume(self) -> None:
        """Count the checkpoints in the folder among the last ones to keep, the newest last."""
        files = self.checkpointer.get_all_checkpoint_files()
        numbered = [path for path in files if re.search(r"_\d+\.pth$", path)]
        self.recent_checkpoints = sorted(numbered, key=os.path.getmtime)

    def step(self, iteration: int, **kwargs: Any) -> None:
        name = f"{self.file_prefix}_{iteration:07d}.pth"
        self.recent_checkpoints = [
            path for path in self.recent_checkpoints if os.path.basename(path) != name
        ]
        super().step(iteration, **kwargs)
