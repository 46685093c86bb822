"""Shipped configs by name, lazy or yaml, and their models with published weights."""

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from crossmae_det.checkpoint import load
from crossmae_det.detection.yaml_config import read_yaml, to_lazy
from crossmae_det.engine import resolve_device
from crossmae_det.model_zoo import records
from crossmae_det.model_zoo.overrides import apply_overrides

logger = logging.getLogger(__name__)

# Of an installed package and of a checkout.
PACKAGE_CONFIGS = Path(__file__).parent / "configs"
CHECKOUT_CONFIGS = Path(__file__).parents[2] / "configs"

# Parts that configs share; they cannot be run.
SHARED = "common"

# One of each task, for messages.
EXAMPLES = (
    "coco/mask_rcnn_crossmae_vit_b_100ep.py",
    "pretraining/crossmae_vit_b_800ep.py",
    "demo/mask_rcnn.py",
)

# The run folder of a config that names none.
OUTPUT_DIR = "output/{name}"

# What a record's checkpoint holds, if it is the model of the config.
WHOLE = "whole model"


def list_configs() -> list[str]:
    """The names of the shipped configs that can be run ("coco/...", "pretraining/..."), sorted."""
    return [name for name in _names() if not name.startswith(f"{SHARED}/")]


def get_config_file(config_path: str) -> str:
    """The path of a shipped config.

    Args:
        config_path: its name, such as "coco/mask_rcnn_crossmae_vit_b_100ep.py".

    Raises:
        ValueError: there is no such config.
    """
    path = _folder() / config_path
    if not path.is_file():
        close = difflib.get_close_matches(config_path, _names(), n=1, cutoff=0.5)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"there is no config '{config_path}'{hint}")
    return str(path)


def get_config(
    config_file: str, overrides: Sequence[str] = (), *, trained: bool = False
) -> DictConfig:
    """Read a config and apply overrides.

    Args:
        config_file: a path, or the name of a shipped config. A yaml file with detectron2's keys is
            converted to the equivalent lazy config.
        overrides: ``path.key=value`` for lazy configs, ``PATH.KEY VALUE`` pairs for yaml configs.
        trained: use the weights of a finished run. If the config is the config.yaml of a run and
            no override names weights, ``train.init_checkpoint`` is the run's best checkpoint, or
            its last.

    Returns:
        The unresolved config: values that follow from others still do. ``train.output_dir``
        defaults to ``output/NAME_OF_CONFIG``.

    Raises:
        FileNotFoundError, ValueError: no such file, not a config, or an invalid override.
    """
    path = _find_config(config_file)
    yaml_config = None if path.endswith(".py") else read_yaml(path, overrides)
    # The config.yaml of a run is a lazy config.
    cfg = _load(path) if yaml_config is None else to_lazy(yaml_config, get_config)
    default = OUTPUT_DIR.format(name=Path(path).stem)
    if "train" in cfg and not cfg.train.get("output_dir"):
        cfg.train.output_dir = default
    if yaml_config is None:
        if trained and (checkpoint := _checkpoint_of_run(path)):
            cfg.train.init_checkpoint = checkpoint
        apply_overrides(cfg, overrides)
        if "train" in cfg and not cfg.train.output_dir:  # train.output_dir=null
            cfg.train.output_dir = default
    return cfg


def get_checkpoint_url(config_path: str) -> str:
    """The URL of the published checkpoint with the whole model of a shipped config.

    Raises:
        ValueError: there is no such config, or no checkpoint of it is published.
    """
    get_config_file(config_path)
    rows = records.checkpoints()
    urls = {row["config"]: row["url"] for row in rows if row["config"] and row["holds"] == WHOLE}
    if config_path not in urls:
        raise ValueError(
            f"no checkpoint of the whole model of '{config_path}' is published; there is one of"
            f" {', '.join(urls)}"
        )
    return urls[config_path]


def get(
    config_path: str,
    trained: bool = False,
    device: str | None = None,
    overrides: Sequence[str] = (),
) -> nn.Module:
    """The model of a shipped config, in training mode as detectron2's.

    Args:
        config_path: its name, as in :func:`get_config_file`.
        trained: load the published checkpoint of the config; otherwise the weights are random.
        device: the device of the model; None for ``train.device`` of the config.
        overrides: as in :func:`get_config`.

    Raises:
        ValueError: there is no such config, device or key; or, with ``trained``, no checkpoint is
            published, or the overrides change the model.
        OSError: the checkpoint cannot be read.
    """
    url = get_checkpoint_url(config_path) if trained else None
    cfg = get_config(get_config_file(config_path), overrides)
    target = resolve_device(cfg.train.device if device is None else device)
    model = instantiate(cfg.model)
    if url is not None:
        load(model, url, whole=True)
    return model.to(target)


def _folder() -> Path:
    return PACKAGE_CONFIGS if PACKAGE_CONFIGS.is_dir() else CHECKOUT_CONFIGS


def _names() -> list[str]:
    """Every shipped config and shared part."""
    folder = _folder()
    files = (path for path in folder.rglob("*") if path.suffix in (".py", ".yaml"))
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _find_config(config_file: str) -> str:
    """The path of a config file or of the shipped config of that name."""
    if not config_file:
        raise FileNotFoundError(
            "no config: add --config-file with a path or the name of a shipped config, such as"
            f" {', '.join(EXAMPLES)}"
        )
    if Path(config_file).is_file():
        return config_file
    try:
        return get_config_file(config_file)
    except ValueError as error:
        raise FileNotFoundError(f"no config file '{config_file}', and {error}") from None


def _load(path: str) -> DictConfig:
    """Load a lazy config and check its structure."""
    try:
        cfg = LazyConfig.load(path)
    except Exception as error:  # the file is code and may raise anything
        if isinstance(error, OSError) or Path(path).is_relative_to(_folder()):
            raise
        logger.debug("Traceback of the error", exc_info=True)
        raise ValueError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    for key in ("model", "dataloader", "optimizer", "lr_multiplier", "train"):
        if key in cfg and not OmegaConf.is_dict(cfg[key]):
            raise ValueError(f"{path} is not a config: '{key}' must have keys below it")
    return cfg


def _checkpoint_of_run(config_file: str) -> str | None:
    """The best checkpoint of the run that a config belongs to, or its last."""
    folder = Path(config_file).parent
    best, pointer = folder / "model_best.pth", folder / "last_checkpoint"
    if best.is_file():
        return str(best)
    last = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else "model_final.pth"
    return str(folder / last) if (folder / last).is_file() else None
