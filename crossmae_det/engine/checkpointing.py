"""The checkpoints of a run: atomic, safe to read, enough to continue bit by bit."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.engine.hooks import PeriodicCheckpointer as PeriodicHook
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer as FvcoreCheckpointer
from torch import nn

from crossmae_det.checkpoint import atomic_path, load, read_checkpoint, save_checkpoint
from crossmae_det.checkpoint.resizing import position_grid
from crossmae_det.checkpoint.sharded import gather
from crossmae_det.engine.resuming import Change, changes, check_changes, check_model

logger = logging.getLogger(__name__)


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
            :func:`crossmae_det.engine.resuming.settings`.
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
