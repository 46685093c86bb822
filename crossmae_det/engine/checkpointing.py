"""The checkpoints of a run: atomic, safe to read, enough to continue bit by bit."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fvcore.common.checkpoint import Checkpointer as FvcoreCheckpointer

from crossmae_det.checkpoint import atomic_path, load, read_checkpoint, save_checkpoint
from crossmae_det.checkpoint.resizing import position_grid
from crossmae_det.checkpoint.sharded import gather

logger = logging.getLogger(__name__)


class Checkpointer(FvcoreCheckpointer):
    """fvcore's checkpointer with atomic writes and without arbitrary pickles.

    The random numbers and the data of iteration i depend on the seed and on i alone (see
    :class:`~crossmae_det.engine.trainer.Trainer`), so a file holds no random state.
    """

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
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        save_checkpoint(data | kwargs, path)
        if tag:
            self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write the name of the checkpoint that ``--resume`` continues from."""
        with atomic_path(os.path.join(self.save_dir, "last_checkpoint")) as temporary:
            temporary.write_text(last_filename_basename)

    def resume(self) -> Mapping[str, Any]:
        """Load the tagged checkpoint of the run's folder: the model and everything beside it.

        Raises:
            FileNotFoundError, ValueError: it is missing, damaged, or of another model.
        """
        path = self.get_checkpoint_file()
        checkpoint = read_checkpoint(path)
        load(self.model, path, content=checkpoint, whole=True, exact=True)
        for key, item in self.checkpointables.items():
            if key not in checkpoint:
                raise ValueError(
                    f"{path} has no '{key}' to resume; was it on when the run started?"
                )
            item.load_state_dict(checkpoint[key])
        # What a kill during a save may have left.
        for leftover in Path(self.save_dir).glob(".model_*.pth") if self.save_to_disk else ():
            leftover.unlink()
        logger.info("Resumed from %s", path)
        return checkpoint
