"""Resolve and check the config of a job, and save it as a config that can be loaded again.

A saved config keeps the values that the user set, as they were set. Values derived from the data
are kept apart, in ``dataloader.recorded``: they are derived again if the data exist, and read from
there otherwise.
"""

import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError
from torch import nn

from crossmae_det.utils import atomic_path
from crossmae_det.utils.messages import list_names, shorten

logger = logging.getLogger(__name__)

FILE = "config.yaml"  # in the folder of a run

KEYS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")

# What is derived from the data, and the record of it in a saved config.
DATASET_INFO = "dataloader.dataset_info"

RECORDED = "dataloader.recorded"

# The classes of the model by dataset id, in their order, and the keys that hold their number.
CATEGORIES = "dataloader.categories"

NUM_CLASSES_KEYS = "dataloader.num_classes_keys"

TEST_NAMES = "dataloader.test.dataset.names"

# (key, least value, whether it is a whole number); keys that a config lacks are not checked.
RANGES: Sequence[tuple[str, float, bool]] = (
    ("dataloader.image_size", 1, True),
    ("dataloader.train.total_batch_size", 1, True),
    ("dataloader.train.num_workers", 0, True),
    ("train.max_iter", 1, True),
    ("train.eval_period", 0, True),
    ("train.log_period", 1, True),
    ("train.checkpointer.period", 1, True),
    ("train.checkpointer.max_to_keep", 1, True),
    ("train.gradient_accumulation_steps", 1, True),
    ("train.seed", 0, True),
    ("train.early_stopping.patience", 1, True),
    ("train.clip_grad.max_norm", 0, False),
    ("lr_multiplier.warmup_iters", 0, True),
    ("optimizer.lr", 0, False),
    ("optimizer.weight_decay", 0, False),
)

WITHOUT_TRAINING = frozenset({"dataloader.image_size", "train.seed"})  # checked in any case

LARGEST = 2**31 - 1  # largest whole number allowed


def check_keys(cfg: DictConfig) -> None:
    """Reject a config that cannot be run.

    Raises:
        ValueError: one of its five keys is absent.
    """
    if absent := [key for key in KEYS if key not in cfg]:
        raise ValueError(
            f"the config has no {', '.join(absent)}: a config to run needs the keys"
            f" {', '.join(KEYS)}"
        )


def check_ranges(cfg: DictConfig, *, training: bool = True) -> None:
    """Reject values of :data:`RANGES` that are out of range; whole floats become integers.

    Args:
        cfg: not resolved.
        training: False checks only what a tool needs to use a trained model: the other values may
            be derived from data that do not exist here.

    Raises:
        ValueError: a value is out of range.
    """
    for key, least, whole in RANGES:
        if not training and key not in WITHOUT_TRAINING:
            continue
        value = OmegaConf.select(cfg, key, default=least)
        kind = "a whole number" if whole else "a number"
        for number in value if OmegaConf.is_list(value) else [value]:
            fits = isinstance(number, int | float) and not isinstance(number, bool)
            if not fits or not least <= number < math.inf or (whole and number != int(number)):
                raise ValueError(f"{key}={value}: must be {kind} of at least {least}")
            if whole and number > LARGEST:
                raise ValueError(f"{key}={value}: must be at most {LARGEST}")
        if whole and isinstance(value, float):  # 1e3
            OmegaConf.update(cfg, key, int(value))


def resolve(cfg: DictConfig) -> DictConfig:
    """Replace the references of a config by values and check it; ``cfg`` is unchanged.

    Without a test set (``dataloader.test.dataset.names`` is null) the result has no evaluation.

    Raises:
        ValueError, OSError: a key is absent, a value out of range, or a dataset is missing.
    """
    check_keys(cfg)
    resolved = cfg.copy()
    check_ranges(resolved)
    OmegaConf.resolve(resolved)
    _check_classes(resolved)
    if _is_without_test_set(resolved):  # removed only now: other keys refer to it
        if OmegaConf.select(resolved, "train.validation_loss.enabled"):
            raise ValueError(f"train.validation_loss needs a validation set: set {TEST_NAMES}")
        for key in ("test", "validation", "evaluator"):
            resolved.dataloader.pop(key, None)
        resolved.train.visualizer = None
    if "recorded" in resolved.dataloader:
        resolved.dataloader.recorded = {}
    return resolved


def _is_without_test_set(cfg: DictConfig) -> bool:
    dataset = OmegaConf.select(cfg, "dataloader.test.dataset")
    evaluated = OmegaConf.select(cfg, "dataloader.evaluator") is not None
    return evaluated and dataset is not None and "names" in dataset and not dataset.names


def _check_classes(cfg: DictConfig) -> None:
    """Reject a model whose number of classes is set and differs from that of the data.

    Raises:
        ValueError: the numbers differ, or the categories are not a mapping.
    """
    categories = OmegaConf.select(cfg, CATEGORIES)
    if categories is None:
        return
    if not isinstance(categories, Mapping | DictConfig):
        raise ValueError(
            f"{CATEGORIES}={shorten(categories)}: must be a mapping, {{ID: NAME, ...}}"
        )
    for key in OmegaConf.select(cfg, NUM_CLASSES_KEYS) or ():
        number = OmegaConf.select(cfg, key)
        if number is not None and number != len(categories):
            raise ValueError(
                f"{key}={number}, but the data have {list_names(categories.values())} classes:"
                " remove the key to use the number of classes in the data"
            )


def save(cfg: DictConfig, resolved: DictConfig, path: str | os.PathLike[str]) -> None:
    """Write a config, with its references and the dataset info in ``resolved``, to a yaml file.

    The file is written atomically.

    Raises:
        OSError: the file cannot be written.
    """
    saved = cfg.copy()
    if (info := OmegaConf.select(resolved, DATASET_INFO)) is not None:
        OmegaConf.update(saved, RECORDED, info, merge=False)
    with atomic_path(path) as temporary:
        LazyConfig.save(saved, str(temporary))


def is_run_of(folder: str | os.PathLike[str], cfg: DictConfig) -> bool:
    """Whether the run in a folder has exactly this config, on the same data and checkpoint.

    Raises:
        ValueError, OSError: as :func:`resolve`.
    """
    found = Path(folder, FILE)
    if not found.is_file():
        return False
    start = Path(cfg.train.init_checkpoint or os.devnull)
    if start.is_file() and start.stat().st_mtime > found.stat().st_mtime:
        return False
    with tempfile.TemporaryDirectory() as temporary:
        wanted = Path(temporary, FILE)
        save(cfg, resolve(cfg), wanted)
        return found.read_bytes() == wanted.read_bytes()


def log_data(cfg: DictConfig, resolved: DictConfig, *, training: bool) -> None:
    """Log what has changed in the datasets since a run saved ``cfg``, and a missing test set."""
    if training and _is_without_test_set(cfg):
        logger.info("No validation set (%s is empty): training without evaluation", TEST_NAMES)
    recorded = OmegaConf.select(cfg, RECORDED) or {}
    now = OmegaConf.select(resolved, DATASET_INFO) or {}
    for name in sorted(recorded.keys() & now.keys()):
        before, after = recorded[name], now[name]
        for key in before:
            if key in after and before[key] != after[key]:
                logger.warning(
                    "Dataset '%s' has changed since this config was saved: %s was %s, is %s",
                    name,
                    key,
                    *map(_shown, (before[key], after[key])),
                )


def _shown(value: Any) -> str:
    return list_names(value.values(), 20) if isinstance(value, Mapping) else shorten(value)


def use_trained_categories(cfg: DictConfig, content: Mapping[str, Any]) -> None:
    """Give the model the classes that its weights were trained for, in place.

    The datasets of the config may have the same classes in another order by now.

    Args:
        cfg: not resolved.
        content: of the checkpoint. Those of this package's runs record their categories; for
            others, the categories recorded in a saved config are used.
    """
    if OmegaConf.select(cfg, "dataloader.train.dataset.names") is None:
        return
    names = cfg.dataloader.train.dataset.names
    first = names if isinstance(names, str) else names[0]
    recorded = (OmegaConf.select(cfg, RECORDED) or {}).get(first, {})
    settings = content.get("settings", {})
    if categories := settings.get(CATEGORIES) or recorded.get("categories"):
        OmegaConf.update(cfg, CATEGORIES, dict(categories), merge=False)


def build_model(cfg: DictConfig) -> nn.Module:
    """The model of a config.

    Raises:
        ValueError: its arguments do not fit together.
    """
    return build(cfg.model, "model")


def build(part: DictConfig, key: str) -> Any:
    """The object that a part of a resolved config describes; ``key`` is its key, for messages.

    Raises:
        ValueError: its arguments do not fit together.
    """
    try:
        return instantiate(part)
    except InterpolationResolutionError:
        raise  # a reference that leads nowhere; the error names its key
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    except (
        TypeError,
        AttributeError,
        AssertionError,
        LookupError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        # The shipped configs are built by tests, so the cause is a key that the user changed.
        logger.debug("Traceback of the error", exc_info=True)
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{key} cannot be built with these {key}.* keys: {type(error).__name__}: {reason}"
        ) from error
