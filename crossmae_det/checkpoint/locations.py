"""From what a user names to files on this machine: files, folders, URLs, repositories of a hub."""

import json
import os
import re
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
from iopath.common.file_io import HTTPURLHandler, PathManager, get_cache_dir

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
