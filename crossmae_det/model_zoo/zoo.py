"""Finding and reading configs, lazy or yaml.

Models of the shipped configs, with published weights where there are any.
"""

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
from crossmae_det.model_zoo import (
    records,
    resolvers,  # noqa: F401  (registers the rules of the configs)
)
from crossmae_det.model_zoo.overrides import apply_overrides

logger = logging.getLogger(__name__)


PACKAGE_CONFIGS = Path(__file__).parent / "configs"

CHECKOUT_CONFIGS = Path(__file__).parents[2] / "configs"

# Parts that configs share; they cannot be run.
SHARED = "common"

# One of each kind, for help texts and messages.
EXAMPLES = (
    "coco/mask_rcnn_crossmae_vit_b_100ep.py",
    "pretraining/crossmae_vit_b_800ep.py",
    "demo/mask_rcnn.py",
)

# Where a config that names no folder puts its runs: a folder of its own for each config.
OUTPUT_DIR = "output/{name}"


def _folder() -> Path:
    return PACKAGE_CONFIGS if PACKAGE_CONFIGS.is_dir() else CHECKOUT_CONFIGS


def _names() -> list[str]:
    """Every file of the configs' folder that is a config or a part of one."""
    folder = _folder()
    files = (path for path in folder.rglob("*") if path.suffix in (".py", ".yaml"))
    return sorted(path.relative_to(folder).as_posix() for path in files)


def list_configs() -> list[str]:
    """The names of the shipped configs that can be run, sorted.

    Returns:
        Names that :func:`get_config` and ``--config-file`` take: "coco/...", "demo/...",
        "pretraining/...".
    """
    return [name for name in _names() if not name.startswith(f"{SHARED}/")]


def get_config_file(config_path: str) -> str:
    """The path of a shipped config.

    Args:
        config_path: relative to the configs' folder: "coco/mask_rcnn_crossmae_vit_b_100ep.py".

    Raises:
        ValueError: there is no such config.
    """
    path = _folder() / config_path
    if not path.is_file():
        close = difflib.get_close_matches(config_path, _names(), n=1, cutoff=0.5)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"there is no config '{config_path}'{hint}")
    return str(path)


def _find_config(config_file: str) -> str:
    """The path of a config file: the file itself, or the shipped config of that name.

    Raises:
        FileNotFoundError: there is neither.
    """
    if not config_file:
        raise FileNotFoundError(
            "no config is named: add --config-file with a path or the name of a shipped config, "
            f"such as {', '.join(EXAMPLES)} (--help of the training tools lists them)"
        )
    if Path(config_file).is_file():
        return config_file
    try:
        return get_config_file(config_file)
    except ValueError as error:
        raise FileNotFoundError(f"no config file '{config_file}', and {error}") from None


def usage_examples(tool: str) -> str:
    """Examples and the shipped configs, for the end of a tool's ``--help``.

    Args:
        tool: how the tool is called.
    """
    lazy, *_ = EXAMPLES
    commands = (
        f"{tool} --config-file demo/mask_rcnn.py",
        f"{tool} --config-file {lazy} --num-gpus 8 train.init_checkpoint=backbone.pth",
        f"{tool} --config-file {lazy} dataloader.train.dataset.names=train.json:images "
        "dataloader.train.total_batch_size=8",
        f"{tool} --config-file {lazy.replace('.py', '.yaml')} SOLVER.IMS_PER_BATCH 8",
        f"{tool} --config-file output/mask_rcnn_crossmae_vit_b_100ep/config.yaml --eval-only",
    )
    lines = ["Examples:", *(f"  {command}" for command in commands), "", "Shipped configs:"]
    return "\n".join([*lines, *(f"  {name}" for name in list_configs())])


def get_config(
    config_file: str, overrides: Sequence[str] = (), *, trained: bool = False
) -> DictConfig:
    """Read a config with its five keys and apply overrides.

    Args:
        config_file: a path, or the name of a shipped config. A yaml file with detectron2's keys is
            turned into the lazy config that it stands for.
        overrides: ``path.key=value`` for lazy configs, ``PATH.KEY VALUE`` pairs for yaml ones.
        trained: to look at a trained model. Where the config is a run's own config.yaml and no
            override names weights, ``train.init_checkpoint`` is the run's best checkpoint, or its
            last, instead of the weights that it started from.

    Returns:
        The unresolved config: values that follow from others still do. Where it names no
        ``train.output_dir``, that is ``output/NAME_OF_CONFIG``.

    Raises:
        FileNotFoundError, ValueError: no such file, not a config, or an override of an unknown key.
    """
    path = _find_config(config_file)
    yaml_config = None if path.endswith(".py") else read_yaml(path, overrides)
    # A run's own config.yaml is a lazy config in yaml's clothes.
    lazy = _load(path) if yaml_config is None else to_lazy(yaml_config, get_config)
    default = OUTPUT_DIR.format(name=Path(path).stem)
    if "train" in lazy and not lazy.train.get("output_dir"):
        lazy.train.output_dir = default
    if yaml_config is None:
        if trained and (checkpoint := _checkpoint_of_run(path)):
            lazy.train.init_checkpoint = checkpoint
        apply_overrides(lazy, overrides)
        if "train" in lazy and not lazy.train.output_dir:  # train.output_dir=null
            lazy.train.output_dir = default
    return lazy


def _load(path: str) -> DictConfig:
    """A lazy config as it is in its file.

    Raises:
        ValueError: running the file fails, or its keys have no keys below them.
    """
    try:
        cfg = LazyConfig.load(path)
    except Exception as error:  # a user's code may raise anything
        if isinstance(error, OSError) or Path(path).is_relative_to(_folder()):
            raise
        logger.debug("Traceback of the error", exc_info=True)
        raise ValueError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    for key in ("model", "dataloader", "optimizer", "lr_multiplier", "train"):
        if key in cfg and not OmegaConf.is_dict(cfg[key]):
            raise ValueError(f"{path} is not a config of a job: '{key}' must have keys below it")
    return cfg


def _checkpoint_of_run(config_file: str) -> str | None:
    """The best checkpoint of the run that a config is of, or its last; None without a run."""
    folder = Path(config_file).parent
    best, pointer = folder / "model_best.pth", folder / "last_checkpoint"
    if best.is_file():
        return str(best)
    last = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else "model_final.pth"
    return str(folder / last) if (folder / last).is_file() else None


WHOLE = "whole model"


def get_checkpoint_url(config_path: str) -> str:
    """The published checkpoint of a shipped config: what its recipe produced, and nothing else.

    Args:
        config_path: as in :func:`get_config_file`: "pretraining/crossmae_vit_b_800ep_pred75.py".

    Returns:
        The URL of a file that holds the whole model of the config.

    Raises:
        ValueError: there is no such config, or no checkpoint of it is published.
    """
    get_config_file(config_path)
    urls = _urls()
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
    """The model of a shipped config.

    Args:
        config_path: as in :func:`get_config_file`.
        trained: load the published checkpoint of the config; else the weights are random.
        device: where the model goes; None for ``train.device`` of the config.
        overrides: as in :func:`get_config`.

    Returns:
        The model, in training mode as detectron2's.

    Raises:
        ValueError: there is no such config, device or key, or, with ``trained``, no checkpoint of
            it is published, or the overrides make another model than the checkpoint's.
        OSError: the checkpoint cannot be read.
    """
    url = get_checkpoint_url(config_path) if trained else None
    cfg = get_config(get_config_file(config_path), overrides)
    place = resolve_device(cfg.train.device if device is None else device)
    model = instantiate(cfg.model)
    if url is not None:
        load(model, url, whole=True)
    return model.to(place)


def _urls() -> dict[str, str]:
    """Config -> URL of the checkpoint of its whole model."""
    rows = records.checkpoints()
    return {row["config"]: row["url"] for row in rows if row["config"] and row["holds"] == WHOLE}
