"""Reading checkpoints of any format without executing them."""

import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from crossmae_det.checkpoint.locations import checkpoint_files
from crossmae_det.checkpoint.pickles import read_pickle

# How files of torch.save begin: today's, and those from before torch 1.6.
ARCHIVE = b"PK\x03\x04"
LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
# What published training checkpoints hold beside tensors and plain values: their command line.
ADMITTED_CLASSES: list[Any] = [Namespace]


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint; nothing in it is executed.

    The format is told from the content: files of ``torch.save`` (with tensors, plain values and
    command lines), ``.safetensors``, and plain pickles of numpy arrays as detectron2's zoo has.

    Args:
        path: see :func:`~crossmae_det.checkpoint.locations.checkpoint_files`.

    Returns:
        What the checkpoint holds, on the CPU. Tensors of ``torch.save`` and ``.safetensors`` stay
        on disk until they are used (but for those from before torch 1.6).

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be fetched.
        ValueError: it is no checkpoint, is damaged, or holds anything else.
    """
    files = checkpoint_files(path)
    if len(files) == 1:
        return _read_file(files[0])
    merged: dict[str, Any] = {}
    for file in files:
        part = _read_file(file)
        if repeated := sorted(part.keys() & merged.keys()):
            raise ValueError(f"{file} repeats '{repeated[0]}' of another part of {path}")
        merged |= part
    return merged


def _read_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        head = file.read(len(LEGACY))
    try:
        if head.startswith(ARCHIVE):
            _check_archive(path)
            content = _torch_load(path, mmap=True)
        elif head == LEGACY:
            content = _torch_load(path, mmap=False)
        elif path.suffix == ".safetensors" or head[8:9] == b"{":
            content = safetensors.torch.load_file(path)
        else:
            content = read_pickle(path)
    except Exception as error:  # damaged bytes can stumble over anything in any of these
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors: {_reason(error)}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return content


def _check_archive(path: Path) -> None:
    """Refuse what torch would not notice: other bytes than were written, and compression.

    torch.save does not compress: an entry that does would take any amount of memory.

    Raises:
        ValueError, BadZipFile: it is damaged, or was not written by torch.save.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, which torch.save never does")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("it claims to hold more than its size")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of its part '{damaged}' is wrong: fetch or write it again")


def _torch_load(path: Path, mmap: bool) -> Any:
    with torch.serialization.safe_globals(ADMITTED_CLASSES):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _reason(error: Exception) -> str:
    """One line of what a library says."""
    # torch tells at length how to run the file after all; what it met is the error before that.
    if isinstance(error, pickle.UnpicklingError) and isinstance(error.__context__, Exception):
        error = error.__context__
    text = str(error).strip()
    if isinstance(error, zipfile.BadZipFile):
        return f"it is cut short or damaged ({text})"
    if unsupported := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {unsupported[1]}, and only tensors and plain values are admitted"
    return text.splitlines()[0] if text else type(error).__name__


def extract_state_dict(
    checkpoint: Mapping[str, Any], path: str | PathLike[str], weights: str = "model"
) -> dict[str, Tensor]:
    """The weights in what a checkpoint file holds.

    Args:
        checkpoint: what the file holds.
        path: the file, for messages.
        weights: "model" for what is under "model" or "state_dict", or else for the file itself;
            "ema" for the averaged weights of a run.

    Returns:
        Tensors by name. Where all names begin with what DistributedDataParallel or torch.compile
        put in front of them, that is left out.

    Raises:
        ValueError: there are none, or something else than tensors.
    """
    if weights == "ema":
        if "ema" not in checkpoint:
            raise ValueError(
                f"{path} holds no averaged weights; the run had train.ema.enabled=False"
            )
        state = {key: value for key, value in checkpoint["ema"].items() if key != "n_averaged"}
    else:
        state = checkpoint.get("model", checkpoint.get("state_dict", checkpoint))
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path} holds no weights, neither under 'model' nor at its top level")
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: an entry is called {name!r}, which is no name of a tensor")
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: entry '{name}' is a {type(value).__name__}, not a tensor")
        if value.device.type != "cpu" or value.layout != torch.strided or value.is_quantized:
            raise ValueError(
                f"{path}: '{name}' is not a plain tensor ({value.layout}, {value.dtype})"
            )
    for wrapper in ("module.", "_orig_mod."):
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return dict(state)
