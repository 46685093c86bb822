"""From what a user names to files on this machine: files, folders, URLs, repositories of a hub.

Reading checkpoints of any format without executing them.
"""

import json
import logging
import os
import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Mapping
from http.client import HTTPException
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import safetensors.torch
import torch
from iopath.common.file_io import HTTPURLHandler, PathManager, get_cache_dir
from torch import Tensor

from crossmae_det.checkpoint.safe_pickle import (
    ADMITTED,
    check_tuples,
    not_admitted,
    read_pickle,
    with_tensors,
)

# detectron2's short names of what Meta serves.
ALIASES = {"detectron2://": "https://dl.fbaipublicfiles.com/detectron2/"}

SCHEME = re.compile(r"\w+://")

HUB = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<file>.+))?$")

# How detectron2 is asked to guess names; here they are never guessed.
HEURISTICS = re.compile(r"\?matching_heuristics=\w+$")

# A part of a checkpoint, as in "dino.pth:teacher."; not the port of a server.
PART = re.compile(r"(?!\w+://[^/]*$)(?P<location>.{2,}):(?P<prefix>[^:/\\]+)$")

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".pkl")


_path_manager = PathManager()

_path_manager.register_handler(HTTPURLHandler())


def split_prefix(location: str | os.PathLike[str]) -> tuple[str, str]:
    """Where a checkpoint is, and which part of it is meant: "a.pth:teacher." is "a.pth", "teacher."

    Args:
        location: what a user names; a file with a colon in its name is taken for that.

    Returns:
        What :func:`checkpoint_files` takes, and the prefix for
        :func:`~crossmae_det.checkpoint.reading.extract_state_dict`, "" where there is none.
    """
    name = os.fspath(location)
    match = PART.match(name)
    if match is None or os.path.exists(name):
        return name, ""
    return match["location"], match["prefix"]


def checkpoint_files(location: str | os.PathLike[str]) -> list[Path]:
    """The files that hold a checkpoint, fetched where they are elsewhere.

    Args:
        location: a file; a folder with a checkpoint, whole or in parts, or of a run (then its
            last one); ``http(s)://``; ``detectron2://``; or ``hf://owner/repository``, with or
            without ``@revision`` and ``/file``. What is fetched is kept: URLs in iopath's cache,
            which FVCORE_CACHE moves, and the hub's files in its own. A part of the checkpoint that
            is named behind it is left to the reader: see :func:`split_prefix`.

    Returns:
        The files, of which there are several where a checkpoint is in parts.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: a folder does not tell which of its files is meant.
        OSError: it cannot be fetched.
    """
    name = HEURISTICS.sub("", split_prefix(location)[0])
    for alias, url in ALIASES.items():
        if name.startswith(alias):
            name = url + name.removeprefix(alias)
    if name.startswith("hf://"):
        path = _from_hub(name)
    elif name.lower().startswith(("http://", "https://")):
        path = _from_url(name)
    elif SCHEME.match(name):
        known = ", ".join(["http://", "https://", "hf://", *ALIASES])
        raise ValueError(f"{name}: addresses begin with {known}")
    else:
        path = Path(name)
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    return [path]


def _from_url(url: str) -> Path:
    try:
        parts = urlsplit(url)
        if ".." in parts.path.split("/"):
            raise ValueError("its path leads upwards")
        # iopath's cache knows the path of a URL only: two servers may serve one path.
        server = re.sub(r"[^\w.-]", "_", parts.netloc)
        scheme = f"{parts.scheme.lower()}{url[len(parts.scheme) :]}"
        cache = os.path.join(get_cache_dir(), server)
        return Path(_path_manager.get_local_path(scheme, cache_dir=cache))
    except (OSError, ValueError, HTTPException) as error:
        raise OSError(f"cannot fetch {url}: {error}") from error


def _from_hub(name: str) -> Path:
    match = HUB.match(name)
    if match is None:
        raise ValueError(f"{name} is not of the form hf://owner/repository[@revision][/file]")
    repo, revision, file = match["repo"], match["revision"], match["file"]
    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
        # One format of those that a repository has, and the one that cannot hold programs first.
        names = huggingface_hub.HfApi().list_repo_files(repo, revision=revision)
        for suffix in SUFFIXES:
            files = [name for name in names if name.endswith(suffix) and "/" not in name]
            indices = [name for name in names if name.endswith(f"{suffix}.index.json")]
            if len(files) > 1 and not indices:
                break  # several checkpoints: none is fetched
            if files:
                wanted = [*files, *indices]
                return Path(
                    huggingface_hub.snapshot_download(
                        repo, revision=revision, allow_patterns=wanted
                    )
                )
    except Exception as error:  # of several libraries below, by version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"cannot fetch {name}: {reason}") from error
    raise FileNotFoundError(f"{name} has not one checkpoint at its top: name the file, {name}/FILE")


def _in_folder(folder: Path) -> list[Path]:
    """The checkpoint in a folder.

    Raises:
        FileNotFoundError, ValueError: there is none, or there are several.
    """
    last = folder / "last_checkpoint"
    if last.is_file():
        name = last.read_text(encoding="utf-8", errors="replace").strip()
        if not (folder / name).is_file() or Path(name).name != name:
            raise FileNotFoundError(f"{last} names no file beside it")
        return [folder / name]
    for suffix in SUFFIXES:
        files = sorted(file for file in folder.glob(f"*{suffix}") if file.is_file())
        for index in folder.glob(f"*{suffix}.index.json"):
            return _parts(index)
        if len(files) == 1:
            return files
        if files:
            names = ", ".join(file.name for file in files[:3])
            raise ValueError(f"{folder} holds {len(files)} checkpoints ({names}, ...): name one")
    raise FileNotFoundError(f"{folder} holds no checkpoint ({', '.join(SUFFIXES)})")


def _parts(index: Path) -> list[Path]:
    """The files that an index of Hugging Face's lists."""
    try:
        listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        # Beside the index: it must not name files elsewhere.
        files = [index.parent / Path(str(name)).name for name in sorted(listed)]
        if not files:
            raise ValueError("it lists no file")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of a checkpoint in parts") from error
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{index} lists {file.name}, which is not there")
    return files


logger = logging.getLogger(__name__)


# How files of torch.save begin: today's, and those from before torch 1.6.
ARCHIVE = b"PK\x03\x04"

GIT_LFS = b"version https:/"

LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)

# Where files keep weights, and averages of them, the first that is there: this project, MAE, timm,
# Lightning; then DINO, whose teacher is what it publishes.
MODELS = ("model", "state_dict", "model_state_dict", "teacher")

AVERAGES = ("ema", "model_ema", "state_dict_ema")

# What is in front of every name: of DistributedDataParallel, and of modules that hold the model.
WRAPPERS = ("module", "model")

LONGEST_NAME = 300

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)

# Pickles in a legacy file before its numbers: magic number, protocol, machine, content.
OBJECTS_OF_LEGACY = 4

# What training checkpoints hold beside tensors and what torch admits itself: command lines, numpy's
# scalars and arrays, paths, dates, further containers. By their names in Python 3 and any numpy.
ADMITTED_CLASSES: list[Any] = [
    Namespace,
    *((stand_in, name.replace("__builtin__", "builtins")) for name, stand_in in ADMITTED.items()),
    *(
        (stand_in, name.replace("numpy.core", "numpy._core"))
        for name, stand_in in ADMITTED.items()
        if name.startswith("numpy.core")
    ),
]


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint; nothing in it is executed.

    The format is told from the content: files of ``torch.save`` (with tensors, plain values and
    command lines), ``.safetensors``, and plain pickles of numpy arrays as detectron2's zoo has.
    Paths are read as text, and other containers as the lists and dicts that they are like.

    Args:
        path: see :func:`~crossmae_det.checkpoint.reading.checkpoint_files`.

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
            with path.open("rb") as file:
                for _ in range(OBJECTS_OF_LEGACY):
                    check_tuples(file)
            content = _torch_load(path, mmap=False)
        elif head.startswith(GIT_LFS):
            raise ValueError("it is a pointer of Git LFS: fetch the file itself with git lfs pull")
        elif path.suffix.lower() == ".safetensors" or head[8:9] == b"{":
            content = safetensors.torch.load_file(path)
        else:
            content = read_pickle(path)
    except Exception as error:  # damaged bytes can stumble over anything in any of these
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors: {_reason(error)}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return dict.copy(content)  # a plain one: an ordered one may have attributes over its methods


def _check_archive(path: Path) -> None:
    """Refuse what torch would not notice: other bytes than were written, and compression.

    torch.save does not compress: an entry that does would take any amount of memory.

    Raises:
        ValueError, BadZipFile: it is damaged, or was not written by torch.save.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("it has two parts of one name")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, which torch.save never does")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("it claims to hold more than its size")
        damaged = archive.testzip()
        for entry in entries:
            if entry.filename.endswith("/data.pkl"):
                check_tuples(archive.open(entry))
    if damaged is not None:
        raise ValueError(f"the checksum of its part '{damaged}' is wrong: fetch or write it again")


def _torch_load(path: Path, mmap: bool) -> Any:
    with torch.serialization.safe_globals(ADMITTED_CLASSES):
        return with_tensors(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))


def _reason(error: Exception) -> str:
    """One line of what a library says."""
    # torch tells at length how to run the file after all; what it met is the error before that.
    if isinstance(error, pickle.UnpicklingError) and isinstance(error.__context__, Exception):
        error = error.__context__
    text = str(error).strip()
    if "Unsupported operand" in text:
        return f"{text}: it is damaged, or needs torch.save with its default pickle_protocol"
    if isinstance(error, zipfile.BadZipFile):
        return f"it is cut short or damaged ({text})"
    if unsupported := re.search(r"GLOBAL (\S+)", text):
        return not_admitted(unsupported[1])
    return text.splitlines()[0] if text else type(error).__name__


def extract_state_dict(
    checkpoint: Mapping[str, Any],
    path: str | PathLike[str],
    weights: str = "model",
    prefix: str = "",
) -> dict[str, Tensor]:
    """The weights in what a checkpoint file holds.

    Args:
        checkpoint: what the file holds.
        path: the file, for messages, and for a prefix behind it: "a.pth:teacher.".
        weights: "model" for what is under the first of :data:`MODELS` that is there, or else for
            the file itself; "ema" for averaged weights, under the first of :data:`AVERAGES`.
        prefix: an entry of the file to take instead, a beginning of names, or one after the other:
            "teacher.", "encoder.", "student.backbone."; "" for that of the path. It is taken off
            the names.

    Returns:
        Tensors by name. What DistributedDataParallel, torch.compile and Lightning put in front of
        all names is left out.

    Raises:
        ValueError: there are none, or something else than tensors.
    """
    path, given = split_prefix(path)
    prefix = prefix or given
    rest = [part for part in prefix.split(".") if part]
    state: Mapping[Any, Any] = checkpoint
    while rest and isinstance(state.get(rest[0]), Mapping):
        state = state[rest.pop(0)]
    if state is checkpoint:
        state = _default_entry(checkpoint, path, weights)
    state = dict.copy(state) if isinstance(state, dict) else dict(state)
    if weights == "ema":
        state.pop("n_averaged", None)
    if not state:
        raise ValueError(f"{path} holds no weights, neither under 'model' nor at its top level")
    for name, value in state.items():
        if not isinstance(name, str) or not name.isprintable() or len(name) > LONGEST_NAME:
            raise ValueError(f"{path}: one of its entries has a name that is none of a tensor")
        _check_tensor(name, value, path)
    if not rest:
        return _unwrapped(state)
    beginning = ".".join(rest) + "."
    below: dict[str, Tensor] = {}
    for names in (state, _unwrapped(state)):
        below = below or {
            name.removeprefix(beginning): value
            for name, value in names.items()
            if name.startswith(beginning)
        }
    if not below:
        raise ValueError(
            f"{path}: there is nothing below '{prefix}'; names begin with"
            f" {_listed({name.partition('.')[0] for name in state})}"
        )
    return _unwrapped(below)


def _default_entry(
    checkpoint: Mapping[Any, Any], path: str | PathLike[str], weights: str
) -> Mapping[Any, Any]:
    """The entry with the weights, where none is named.

    Raises:
        ValueError: there is none.
    """
    keys = AVERAGES if weights == "ema" else MODELS
    found = [key for key in keys if isinstance(checkpoint.get(key), Mapping)]
    others = [
        key
        for key, value in checkpoint.items()
        if isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())
    ]
    if found:
        if others := [key for key in others if key != found[0]]:
            logger.info(
                "%s: the weights are those under '%s'; a prefix selects others: %s",
                *(path, found[0], _listed(others)),
            )
        return checkpoint[found[0]]
    if weights == "ema":
        raise ValueError(
            f"{path} holds no averaged weights, neither under {' nor '.join(AVERAGES)}"
        )
    tensors = {key: value for key, value in checkpoint.items() if isinstance(value, Tensor)}
    if tensors or not others:
        # What lies beside tensors may be anything, but for further tensors.
        return tensors | {key: checkpoint[key] for key in others} or checkpoint
    raise ValueError(
        f"{path} holds no weights under {', '.join(MODELS)}, but under {_listed(others)}: name one"
        f" behind the file ({Path(path).name}:{_listed(others[:1])}.) or with --prefix"
        f" {_listed(others[:1])}."
    )


def _listed(names: Iterable[Any], longest: int = 5) -> str:
    """Some names of a file, of which it may have any, for a message."""
    shown = sorted(str(name)[:40] for name in names if str(name).isprintable())
    return ", ".join(shown[:longest]) + (", ..." if len(shown) > longest else "")


def _check_tensor(name: str, value: Any, path: str | PathLike[str]) -> None:
    """Refuse what is not an array of numbers that lies in the file."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{path}: entry '{name}' is a {type(value).__name__}, not a tensor")
    if value.device.type != "cpu" or value.layout != torch.strided or value.dtype not in DTYPES:
        raise ValueError(
            f"{path}: '{name}' is not a plain tensor ({value.device.type}, {value.layout},"
            f" {value.dtype})"
        )
    # A stride of 0 makes a number as many as one likes.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{path}: '{name}' is larger than what the file holds of it")


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without what wrappers put in front of, or into, their names."""
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    while len({name.partition(".")[0] for name in state}) == 1:
        wrapper = next(iter(state)).partition(".")[0]
        if wrapper not in WRAPPERS or not all("." in name for name in state):
            break
        state = {name.partition(".")[2]: value for name, value in state.items()}
    return state
