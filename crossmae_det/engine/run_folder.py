"""The folder of a run: a new run never mixes with an old one there."""

import os
import re
import shutil
from argparse import Namespace
from pathlib import Path

from detectron2.utils import comm
from omegaconf import DictConfig

from crossmae_det.checkpoint.locations import split_prefix

# The names that the checkpoints of a run have, and those that a kill during a save leaves behind.
CHECKPOINT = re.compile(r"\.?model_(\d{7}|final|best|before_nonfinite)(\.\d+)?\.pth")
POINTER = "last_checkpoint"  # has the name of the checkpoint that --resume continues from
METRICS = "metrics.json"
# What else a run writes. The log and the config stay: the new run appends to the one and replaces
# the other.
FILES = (
    POINTER,
    METRICS,
    "init_checkpoint.json",
    "curves.png",
    "predictions.png",
    "early_stopping.json",
    "events.out.tfevents.*",
)
FOLDERS = ("inference", "inference_ema", "reconstructions")


def find_run(output_dir: str | os.PathLike[str]) -> list[str]:
    """The names of the files in a folder that tell of a run: checkpoints and metrics, sorted.

    Other files, such as a user's own weights or images, do not make a folder a used one.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir()]
    return sorted(name for name in names if name in (POINTER, METRICS) or CHECKPOINT.match(name))


def check_folder(cfg: DictConfig, args: Namespace) -> None:
    """Reject a training run in the folder of another one; nothing is changed.

    Args:
        cfg: with ``train.output_dir`` and ``train.init_checkpoint``.
        args: ``eval_only``, ``resume`` and, where given, ``overwrite``.

    Raises:
        ValueError: the folder has a run, and neither ``--resume`` nor ``--overwrite`` says what is
            to become of it; both are given; ``--resume`` finds checkpoints and not which of them is
            the last; or ``--overwrite`` would remove what the run starts from.
    """
    if args.eval_only:
        return
    folder = cfg.train.output_dir
    overwrite = getattr(args, "overwrite", False)
    if overwrite and args.resume:
        raise ValueError("--resume continues a run and --overwrite discards it: take one of them")
    found = find_run(folder)
    to_resume = [name for name in found if re.match(r"model_(\d{7}|final)\.pth", name)]
    if args.resume and to_resume and POINTER not in found:
        raise ValueError(
            f"{folder} has checkpoints ({', '.join(to_resume[:3])}) and no {POINTER}, so none is"
            f" resumed: write the name of one into {folder}/{POINTER}, or take --overwrite"
        )
    if not found or args.resume:
        return
    if not overwrite:
        more = f" and {len(found) - 3} more files" if len(found) > 3 else ""
        raise ValueError(
            f"{folder} already has a run ({', '.join(found[:3])}{more}): --resume continues it,"
            " --overwrite removes it, or choose another train.output_dir"
        )
    start, _ = split_prefix(cfg.train.init_checkpoint)
    if start and os.path.exists(start):
        path = Path(start).resolve()
        if any(path.is_relative_to(old.resolve()) for old in _files_of_run(folder)):
            raise ValueError(
                f"--overwrite would remove {start}, which train.init_checkpoint starts from: move"
                " it, or choose another train.output_dir"
            )


def claim_folder(cfg: DictConfig, args: Namespace) -> list[str]:
    """Make the folder of a run, and with ``--overwrite`` remove the run that is in it.

    Every process calls it; the first one looks and decides for all of them, before any writes.

    Args:
        cfg: see :func:`check_folder`.
        args: see :func:`check_folder`.

    Returns:
        The names of what was removed.

    Raises:
        ValueError, OSError: see :func:`check_folder`; or the folder cannot be made or changed.
    """
    outcome: list[str] | Exception = []
    if comm.is_main_process():
        try:
            check_folder(cfg, args)
            os.makedirs(cfg.train.output_dir, exist_ok=True)
            if getattr(args, "overwrite", False) and not args.eval_only:
                outcome = _remove_run(cfg.train.output_dir)
        except (ValueError, OSError) as error:
            outcome = error
    outcome = comm.all_gather(outcome)[0]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _files_of_run(output_dir: str) -> list[Path]:
    """What a run has written into its folder, the pointer of ``--resume`` first."""
    folder = Path(output_dir)
    names = [path for pattern in FILES for path in sorted(folder.glob(pattern))]
    checkpoints = [p for p in sorted(folder.iterdir()) if CHECKPOINT.match(p.name)]
    inside = [folder / name for name in FOLDERS if (folder / name).is_dir()]
    return names + checkpoints + inside


def _remove_run(output_dir: str) -> list[str]:
    """Remove what a run has left in a folder; nothing where there was no run."""
    old = _files_of_run(output_dir) if find_run(output_dir) else []
    for path in old:  # the pointer first: a kill in between leaves nothing to resume
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return [path.name for path in old]
