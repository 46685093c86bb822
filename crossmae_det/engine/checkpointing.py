"""The checkpoints of a run: written atomically, read safely, complete enough to resume bit for bit.

On ``--resume`` the config decides every setting: learning rates, weight decay, betas, schedule,
batch size, data, seed. The checkpoint provides what was trained: the weights, the optimizer's state
(by parameter name) and the number of images seen. Settings that differ from those in the checkpoint
are logged; settings that cannot be combined with it are rejected.
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

POINTER = "last_checkpoint"  # the file with the name of the checkpoint that --resume continues from

# The weights come from the run's checkpoint, whatever the run started from.
WITHOUT_EFFECT = "train.init_checkpoint"

OPTIMIZER = "optimizer._target_"

_ABSENT = "(not set)"


class Change(NamedTuple):
    """A setting that differs between a checkpoint and the config of the resumed run."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        note = "  (no effect: the weights are the run's)" if self.key == WITHOUT_EFFECT else ""
        old, new = (v if v == _ABSENT else shorten(v) for v in (self.old, self.new))
        return f"{self.key}: {old} -> {new}{note}"


def settings(cfg: DictConfig) -> dict[str, Any]:
    """The values of a resolved config by their full keys, for :func:`changes`.

    Returns:
        "train.seed" -> 0 and so on: plain values that a checkpoint can hold. Classes and functions
        are given by name.
    """
    flat: dict[str, Any] = {}

    def visit(node: Any, key: str) -> None:
        if isinstance(node, str) and "\n" in node:
            node = yaml.safe_load(node)  # the yaml keys of a model that is built from them
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
    """The differences between two results of :func:`settings`, sorted by key."""
    pairs = {key: (old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in old.keys() | new.keys()}
    return [Change(key, *pairs[key]) for key in sorted(pairs) if pairs[key][0] != pairs[key][1]]


def check_changes(path: str, found: Iterable[Change]) -> None:
    """Reject changed settings that the run of a checkpoint cannot be resumed with.

    Raises:
        ValueError: the optimizer or the classes differ.
    """
    for key, old, new in found:
        if key == OPTIMIZER:
            raise ValueError(
                f"cannot resume {path} (optimizer {old}) with {new}: restore {key}, or start a new"
                f" run from it with train.init_checkpoint={path}"
            )
        if key == CATEGORIES:
            names = [list(v.values()) if isinstance(v, Mapping) else v for v in (old, new)]
            if names[0] != names[1]:
                there, here = (list_names(n) if isinstance(n, list) else n for n in names)
                raise ValueError(
                    f"cannot resume {path}, trained on the classes {there}, with a dataset of the"
                    f" classes {here}: use a dataset with the same classes, or start a new run"
                    f" from it with train.init_checkpoint={path}"
                )


def check_model(
    path: str, file: Mapping[str, Tensor], model: Mapping[str, Tensor], found: Iterable[Change]
) -> None:
    """Reject a checkpoint of another model, by the state dicts of the file and of the model.

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
            f"cannot resume {path}, a checkpoint of another model: '{name}' {there} in it and"
            f" {here} in the config's model{because}: restore the model's settings, or choose"
            " another train.output_dir"
        )


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names, in ``model``, of the parameters in each group of an optimizer, in its order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def match_optimizer_state(
    state_dict: Mapping[str, Any],
    old_names: list[list[str]] | None,
    optimizer: torch.optim.Optimizer,
    names: list[list[str]],
) -> dict[str, Any]:
    """Fit the optimizer state of a file to the parameters and settings of another optimizer.

    Args:
        state_dict: state dict of the optimizer in the file.
        old_names: its :func:`parameter_names`; None if the file has none: parameters are then
            matched by their order.
        optimizer: the optimizer to load the state into.
        names: its :func:`parameter_names`.

    Returns:
        The argument of ``optimizer.load_state_dict``: the state of every parameter that has one in
        the file; the groups and their settings are those of ``optimizer``.

    Raises:
        ValueError: the file has no names and the parameters differ; or the settings of
            ``optimizer`` (such as amsgrad) need state that the file does not have.
    """
    wanted = [name for group in names for name in group]
    order = [index for group in state_dict["param_groups"] for index in group["params"]]
    if old_names is None:
        _check_order(state_dict["state"], order, wanted, optimizer)
        known = dict(zip(wanted, order, strict=True))
    else:
        known = dict(zip((name for group in old_names for name in group), order, strict=True))
    state = {
        index: state_dict["state"][known[name]]
        for index, name in enumerate(wanted)
        if known.get(name) in state_dict["state"]
    }
    _check_entries(optimizer, state, wanted)
    for what, missing in (
        ("were not trained before and start without optimizer state", set(wanted) - known.keys()),
        ("are no longer trained: their optimizer state is dropped", known.keys() - set(wanted)),
    ):
        if missing:
            logger.warning("%d parameters %s (first: %s)", len(missing), what, min(missing))
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def _check_order(
    state: Mapping[int, Mapping[str, Any]],
    order: list[int],
    names: list[str],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Reject a state without names whose parameters differ in number or shape."""
    advice = (
        "the checkpoint, of an earlier version, has no parameter names: resume with the parameters"
        " and groups of that run, or start a new run from its weights with train.init_checkpoint"
    )
    if len(order) != len(names):
        raise ValueError(
            f"the optimizer's state is for {len(order)} parameters, and the config trains"
            f" {len(names)}; {advice}"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, name, parameter in zip(order, names, parameters, strict=True):
        for value in state.get(index, {}).values():
            same_rank = isinstance(value, Tensor) and value.ndim == parameter.ndim > 0
            if same_rank and value.shape != parameter.shape:
                raise ValueError(
                    f"the optimizer's state for '{name}' {tuple(parameter.shape)} is"
                    f" {tuple(value.shape)}; {advice}"
                )


def _check_entries(
    optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]], names: list[str]
) -> None:
    """Reject settings that need entries which the state lacks; torch would fail at the first step.

    A trial step on a single number shows which entries the optimizer keeps for a parameter.
    """
    place = 0
    arguments = inspect.signature(type(optimizer)).parameters.keys() & optimizer.defaults.keys()
    for group in optimizer.param_groups:
        places = range(place, place + len(group["params"]))
        place = places.stop
        if not any(state.get(index) for index in places):
            continue
        like = group["params"][0]
        trial = nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))
        trial.grad = torch.zeros_like(trial)
        one = type(optimizer)([trial], **{name: group[name] for name in arguments})
        one.step()
        needed = {name for name, value in one.state[trial].items() if value is not None}
        for index in places:
            if state.get(index) and (missing := sorted(needed - state[index].keys())):
                raise ValueError(
                    f"the checkpoint has no '{missing[0]}' for '{names[index]}', which the config's"
                    f" settings of {type(optimizer).__name__} need: restore those settings"
                )


class Resumed(NamedTuple):
    """What a resumed run starts with."""

    path: str  # the checkpoint
    changes: list[Change]  # settings that differ from those in the checkpoint
    missing: list[str]  # optional entries that the file does not have
    has_settings: bool  # files of earlier versions have none


class Checkpointer(FvcoreCheckpointer):
    """fvcore's checkpointer with atomic writes and without arbitrary pickles.

    A file holds no random state: the random numbers and the data of an iteration depend on the seed
    and the iteration alone (see :class:`~crossmae_det.engine.trainer.Trainer`).

    Args:
        model: the model without wrappers.
        save_dir: the run's folder.
        save_to_disk: False in the processes that do not write.
        run_settings: from :func:`settings`; saved in every file.
        **checkpointables: objects to save beside the model, each with ``state_dict`` and
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
        """Write ``name``.pth in the run's folder. Called in every process; one of them writes.

        Args:
            name: file name without suffix.
            tag: make it the one that ``--resume`` continues from.
            **kwargs: further plain values to save.

        Raises:
            OSError: the file cannot be written; the checkpoints before it are intact.
            NonFiniteError: the last step of the trainer that is saved has failed.
        """
        if not self.save_dir:
            return
        for item in self.checkpointables.values():
            if hasattr(item, "settle"):  # a trainer, whose last step may not be confirmed
                item.settle()
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
        """Write the name of the checkpoint that ``--resume`` continues from, atomically."""
        with atomic_path(os.path.join(self.save_dir, POINTER)) as temporary:
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
                f" of {len(seen)} see a checkpoint there: use a folder that all machines share"
            )
        return seen[0]

    def resume(self, optional: Sequence[str] = ()) -> Resumed:
        """Load the tagged checkpoint of the run's folder: the model and everything beside it.

        If it is rejected, no file has changed.

        Args:
            optional: checkpointables that the file may lack.

        Raises:
            FileNotFoundError, ValueError: the checkpoint is missing or damaged, or it cannot be
                continued with these settings.
        """
        path = self.get_checkpoint_file()
        checkpoint = read_checkpoint(path)
        if not isinstance(checkpoint.get("model"), Mapping):
            raise ValueError(
                f"cannot resume {path}: it is not a checkpoint of a run; to start from its weights,"
                f" set train.init_checkpoint={path} and another train.output_dir"
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
        # A kill during a save may have left temporary files.
        for leftover in Path(self.save_dir).glob(".model_*.pth") if self.save_to_disk else ():
            leftover.unlink()
        logger.info("Resumed from %s", path)
        return Resumed(path, found, missing, "settings" in checkpoint)


class PeriodicCheckpointer(PeriodicHook):
    """detectron2's hook, for runs that are resumed.

    A run that is resumed with another batch size recounts its iterations, so a file name may
    repeat. The file then counts as the newest one, and is not deleted in place of the old one.
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
