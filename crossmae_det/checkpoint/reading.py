"""Reading checkpoints from any location, in any format, without executing them.

A location is a file, a folder, a URL or a repository of the Hugging Face Hub. A file is one of
``torch.save``, of safetensors, or a pickle of numpy arrays.
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

logger = logging.getLogger(__name__)

_path_manager = PathManager()
_path_manager.register_handler(HTTPURLHandler())

HUB = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<file>.+))?$")

# detectron2's request to match keys by suffix, which is never needed here.
HEURISTICS = re.compile(r"\?matching_heuristics=\w+$")

# A part of a checkpoint, as in "dino.pth:teacher."; not the port of a server.
PART = re.compile(r"(?!\w+://[^/]*$)(?P<location>.{2,}):(?P<prefix>[^:/\\]+)$")

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".pkl")

# First bytes of torch.save, of torch.save before torch 1.6, and of a pointer of Git LFS.
ARCHIVE = b"PK\x03\x04"
LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
GIT_LFS = b"version https:/"

# Pickles in a legacy file before the tensor data: magic number, protocol, machine, content.
LEGACY_PICKLES = 4

# Entries that hold the weights, or averages of them; the first one present is used. They come from
# this package, MAE, timm and Lightning, then from DINO, which publishes its teacher.
MODELS = ("model", "state_dict", "model_state_dict", "teacher")
AVERAGES = ("ema", "model_ema", "state_dict_ema")

# Prefixes of every key: of DistributedDataParallel, and of modules that hold the model.
WRAPPERS = ("module", "model")

MAX_KEY_LENGTH = 300

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)

# Stand-ins for what training checkpoints hold beside tensors and torch does not allow: command
# lines, numpy scalars and arrays, paths, dates, other containers. Listed under their names in
# Python 3, and in both numpy 1 and 2.
ADMITTED_CLASSES: list[Any] = [
    Namespace,
    *((stand_in, name.replace("__builtin__", "builtins")) for name, stand_in in ADMITTED.items()),
    *(
        (stand_in, name.replace("numpy.core", "numpy._core"))
        for name, stand_in in ADMITTED.items()
        if name.startswith("numpy.core")
    ),
]


# Locations


def split_prefix(location: str | PathLike[str]) -> tuple[str, str]:
    """Split "a.pth:teacher." into "a.pth" and "teacher."; without a prefix, the second is "".

    An existing file with a colon in its name is that file.
    """
    name = os.fspath(location)
    match = PART.match(name)
    if match is None or os.path.exists(name):
        return name, ""
    return match["location"], match["prefix"]


def checkpoint_files(location: str | PathLike[str]) -> list[Path]:
    """Find the files of a checkpoint, and download them if they are remote.

    Args:
        location: a file; a folder of a checkpoint, whole or in shards, or of a run (its last
            checkpoint); ``http(s)://``; ``hf://owner/repository[@revision][/file]``; or, with
            detectron2, any address that its PathManager knows, such as ``detectron2://``.
            URLs are cached in iopath's cache (set by ``FVCORE_CACHE``), files of the hub in the
            hub's. A prefix after the location is ignored, see :func:`split_prefix`.

    Returns:
        The files: several if the checkpoint is sharded.

    Raises:
        FileNotFoundError: the location does not exist, or holds no checkpoint.
        ValueError: the folder holds several checkpoints.
        OSError: the download fails.
    """
    name = HEURISTICS.sub("", split_prefix(location)[0])
    scheme, separator, rest = name.partition("://")
    if not separator or not scheme.isalnum():
        path = Path(name)
    elif scheme.lower() in ("http", "https"):
        path = _download(f"{scheme.lower()}://{rest}")
    elif scheme == "hf":
        path = _download_from_hub(name)
    else:
        path = _download_by_detectron2(name)
    if path.is_dir():
        return _files_in_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    return [path]


def _download(url: str) -> Path:
    try:
        parts = urlsplit(url)
        if ".." in parts.path.split("/"):
            raise ValueError("its path contains '..'")
        # iopath caches by the path of a URL alone: two servers may serve the same path.
        cache_dir = os.path.join(get_cache_dir(), re.sub(r"[^\w.-]", "_", parts.netloc))
        return Path(_path_manager.get_local_path(url, cache_dir=cache_dir))
    except (OSError, ValueError, HTTPException) as error:
        raise OSError(f"cannot download {url}: {error}") from error


def _download_from_hub(name: str) -> Path:
    match = HUB.match(name)
    if match is None:
        raise ValueError(f"{name} is not of the form hf://owner/repository[@revision][/file]")
    repo, revision, file = match["repo"], match["revision"], match["file"]
    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
        # Of the formats in a repository, prefer safetensors, which cannot contain code.
        listed = huggingface_hub.HfApi().list_repo_files(repo, revision=revision)
        names = [name for name in listed if "/" not in name]
        for suffix in SUFFIXES:
            files = [name for name in names if name.endswith(suffix)]
            indices = [name for name in names if name.endswith(f"{suffix}.index.json")]
            if len(files) > 1 and not indices:
                break
            if files:
                folder = huggingface_hub.snapshot_download(
                    repo, revision=revision, allow_patterns=[*files, *indices]
                )
                return Path(folder)
    except Exception as error:  # which kinds the libraries raise depends on their versions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"cannot download {name}: {reason}") from error
    raise FileNotFoundError(
        f"{name} does not have exactly one checkpoint at its top level: use {name}/FILE"
    )


def _download_by_detectron2(name: str) -> Path:
    try:
        from detectron2.utils.file_io import PathManager
    except ImportError as error:
        raise ValueError(
            f"{name}: addresses other than http://, https:// and hf:// need detectron2"
        ) from error
    try:
        path = Path(PathManager.get_local_path(name))
    except (OSError, ValueError, HTTPException) as error:
        raise OSError(f"cannot download {name}: {error}") from error
    if not path.exists():
        raise ValueError(f"{name}: unknown address: use http://, https://, hf:// or detectron2://")
    return path


def _files_in_folder(folder: Path) -> list[Path]:
    last = folder / "last_checkpoint"
    if last.is_file():
        name = last.read_text(encoding="utf-8", errors="replace").strip()
        if not (folder / name).is_file() or Path(name).name != name:
            raise FileNotFoundError(f"{last} does not name a file in its folder")
        return [folder / name]
    for suffix in SUFFIXES:
        for index in folder.glob(f"*{suffix}.index.json"):
            return _shards(index)
        files = sorted(file for file in folder.glob(f"*{suffix}") if file.is_file())
        if len(files) > 1:
            names = ", ".join(file.name for file in files[:3])
            raise ValueError(f"{folder} holds {len(files)} checkpoints ({names}, ...): name one")
        if files:
            return files
    raise FileNotFoundError(f"{folder} holds no checkpoint ({', '.join(SUFFIXES)})")


def _shards(index: Path) -> list[Path]:
    """The files that an index of the Hugging Face Hub lists."""
    try:
        listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        # Only names count: an index must not lead out of its folder.
        files = [index.parent / Path(str(name)).name for name in sorted(listed)]
        if not files:
            raise ValueError("it lists no file")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is not the index of a sharded checkpoint") from error
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{index} lists {file.name}, which does not exist")
    return files


# Files


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint; nothing in it is executed.

    The format follows from the content: ``torch.save`` (tensors, plain values and command lines),
    safetensors, or a plain pickle of numpy arrays as in detectron2's zoo. Paths become strings, and
    other containers become lists or dicts.

    Args:
        path: see :func:`~crossmae_det.checkpoint.reading.checkpoint_files`.

    Returns:
        The content, on the CPU. Tensors of ``torch.save`` (since torch 1.6) and of safetensors stay
        on disk until they are used.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: the download fails.
        ValueError: the file is not a checkpoint, is damaged, or holds anything else.
    """
    files = checkpoint_files(path)
    content = _read_file(files[0])
    for file in files[1:]:
        shard = _read_file(file)
        if repeated := sorted(shard.keys() & content.keys()):
            raise ValueError(f"{file} repeats '{repeated[0]}' of another shard of {path}")
        content |= shard
    return content


def _read_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        head = file.read(len(LEGACY))
    try:
        if head.startswith(ARCHIVE):
            _check_archive(path)
            content = _torch_load(path, mmap=True)
        elif head == LEGACY:
            with path.open("rb") as file:
                for _ in range(LEGACY_PICKLES):
                    check_tuples(file)
            content = _torch_load(path, mmap=False)
        elif head.startswith(GIT_LFS):
            raise ValueError("it is a pointer of Git LFS: get the file with git lfs pull")
        elif path.suffix.lower() == ".safetensors" or head[8:9] == b"{":
            content = safetensors.torch.load_file(path)
        else:
            content = read_pickle(path)
    except Exception as error:  # damaged bytes make any of these readers raise anything
        raise ValueError(f"{path} cannot be read as a checkpoint: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return dict.copy(content)  # a plain one: attributes of an OrderedDict may shadow its methods


def _check_archive(path: Path) -> None:
    """Reject damaged and compressed archives, which torch accepts.

    torch.save does not compress; a compressed entry could expand to any size.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("it has two entries of the same name")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, which torch.save never does")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its entries claim to be larger than the file")
        damaged = archive.testzip()
        for entry in entries:
            if entry.filename.endswith("/data.pkl"):
                check_tuples(archive.open(entry))
    if damaged is not None:
        raise ValueError(f"the checksum of its entry '{damaged}' is wrong: download it again")


def _torch_load(path: Path, mmap: bool) -> Any:
    with torch.serialization.safe_globals(ADMITTED_CLASSES):
        return with_tensors(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))


def _reason(error: Exception) -> str:
    """The message of a library's error in one line."""
    # torch replaces the actual error by advice on how to execute the file after all.
    if isinstance(error, pickle.UnpicklingError) and isinstance(error.__context__, Exception):
        error = error.__context__
    text = str(error).strip()
    if "Unsupported operand" in text:
        return f"{text}: it is damaged, or was not saved with torch's default pickle_protocol"
    if isinstance(error, zipfile.BadZipFile):
        return f"it is truncated or damaged ({text})"
    if unsupported := re.search(r"GLOBAL (\S+)", text):
        return not_admitted(unsupported[1])
    return text.splitlines()[0] if text else type(error).__name__


# Weights inside a file


def extract_state_dict(
    checkpoint: Mapping[str, Any],
    path: str | PathLike[str],
    weights: str = "model",
    prefix: str = "",
) -> dict[str, Tensor]:
    """Find the weights in the content of a checkpoint file.

    Args:
        checkpoint: from :func:`read_checkpoint`.
        path: the file, for messages and for a prefix after it ("a.pth:teacher.").
        weights: "model" takes the first entry of :data:`MODELS` that is present, or else the top
            level; "ema" takes averaged weights, the first entry of :data:`AVERAGES`.
        prefix: entry to take instead, prefix of keys, or both: "teacher.", "encoder.",
            "student.backbone.". It is removed from the keys. "" uses the one in ``path``.

    Returns:
        Tensors by key, without the prefixes of DistributedDataParallel, torch.compile, Lightning.

    Raises:
        ValueError: there are no weights, or an entry is not a plain tensor.
    """
    path, given = split_prefix(path)
    prefix = prefix or given
    rest = [part for part in prefix.split(".") if part]
    entry: Mapping[Any, Any] = checkpoint
    while rest and isinstance(entry.get(rest[0]), Mapping):
        entry = entry[rest.pop(0)]
    if entry is checkpoint:
        entry = _default_entry(checkpoint, path, weights)
    # dict.copy: attributes of an OrderedDict may shadow its methods.
    state = dict.copy(entry) if isinstance(entry, dict) else dict(entry)
    if weights == "ema":
        state.pop("n_averaged", None)
    if not state:
        raise ValueError(f"{path} holds no weights, neither under 'model' nor at its top level")
    for key, value in state.items():
        _check_tensor(key, value, path)
    if not rest:
        return _unwrapped(state)
    start = ".".join(rest) + "."
    for tensors in (state, _unwrapped(state)):
        if below := {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}:
            return _unwrapped(below)
    raise ValueError(
        f"{path} has no keys that start with '{prefix}': they start with"
        f" {_listed({key.partition('.')[0] for key in state})}"
    )


def _default_entry(
    checkpoint: Mapping[Any, Any], path: str | PathLike[str], weights: str
) -> Mapping[Any, Any]:
    """The entry with the weights, if the user names none."""
    keys = AVERAGES if weights == "ema" else MODELS
    found = next((key for key in keys if isinstance(checkpoint.get(key), Mapping)), None)
    others = [
        key
        for key, value in checkpoint.items()
        if isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())
        if key != found
    ]
    if found:
        if others:
            logger.info(
                "%s: using the weights under '%s'; a prefix selects others: %s",
                *(path, found, _listed(others)),
            )
        return checkpoint[found]
    if weights == "ema":
        raise ValueError(f"{path} holds no averaged weights (under {', '.join(AVERAGES)})")
    tensors = {key: value for key, value in checkpoint.items() if isinstance(value, Tensor)}
    if tensors or not others:
        # Entries beside tensors may be anything, except for further tensors.
        return tensors | {key: checkpoint[key] for key in others} or checkpoint
    raise ValueError(
        f"{path} holds no weights under {', '.join(MODELS)}, but under {_listed(others)}: select"
        f" them with {Path(path).name}:{_listed(others[:1])}. or --prefix {_listed(others[:1])}."
    )


def _listed(names: Iterable[Any]) -> str:
    """The first printable names of a file, for a message."""
    shown = sorted(str(name)[:40] for name in names if str(name).isprintable())
    return ", ".join(shown[:5]) + (", ..." if len(shown) > 5 else "")


def _check_tensor(key: Any, value: Any, path: str | PathLike[str]) -> None:
    """Reject what is not an array of numbers that the file contains."""
    if not isinstance(key, str) or not key.isprintable() or len(key) > MAX_KEY_LENGTH:
        raise ValueError(f"{path}: a key is not a valid name of a tensor")
    if not isinstance(value, Tensor):
        raise ValueError(f"{path}: '{key}' is a {type(value).__name__}, not a tensor")
    if value.device.type != "cpu" or value.layout != torch.strided or value.dtype not in DTYPES:
        raise ValueError(
            f"{path}: '{key}' is not a plain tensor ({value.device.type}, {value.layout},"
            f" {value.dtype})"
        )
    # With a stride of 0, a few bytes can claim any size.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{path}: '{key}' is larger than its data in the file")


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove what wrappers add to every key: ``module.``, ``model.``, ``_orig_mod.``."""
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    while len(wrappers := {key.partition(".")[0] for key in state}) == 1:
        if wrappers.isdisjoint(WRAPPERS) or not all("." in key for key in state):
            break
        state = {key.partition(".")[2]: value for key, value in state.items()}
    return state
