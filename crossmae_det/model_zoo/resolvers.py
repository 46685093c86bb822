"""The rules by which values of a config follow from its few free keys.

Importing this module registers them as OmegaConf resolvers. Configs write ``${crossmae.NAME:...}``;
the arguments are references to other keys, so that a changed key changes all that depends on it.
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import DictConfig, OmegaConf
from timm.layers import to_2tuple

from crossmae_det.detection import DatasetInfo, category_indices, describe

Names = str | Sequence[str]


# Image folders by name, beside the datasets of detectron2: the path under DETECTRON2_DATASETS, and
# the number of images, for a config that is looked at where they are not.
IMAGE_FOLDERS = {"imagenet_train": ("imagenet/train", 1_281_167)}


def _list(names: Names | None) -> list[str]:
    return [] if names is None else [names] if isinstance(names, str) else list(names)


def _recorded(name: str, root: DictConfig) -> dict[str, Any] | None:
    """What the run that saved this config knew of a dataset."""
    return (OmegaConf.select(root, "dataloader.recorded") or {}).get(name)


def _is_present(name: str) -> bool:
    """Whether the annotations of a detection dataset can be looked at."""
    if name in DatasetCatalog:
        path = MetadataCatalog.get(name).get("json_file")
        return path is None or "://" in path or os.path.isfile(path)
    spec = re.match(r"(.+?\.json):", name, re.IGNORECASE)
    return spec is not None and os.path.isfile(os.path.expanduser(spec[1]))


def _info(name: str, root: DictConfig, **options: Any) -> DatasetInfo:
    recorded = None if _is_present(name) else _recorded(name, root)
    if recorded is None:
        return describe(name, **options)
    used = recorded["num_annotated" if options.get("filter_empty") else "num_images"]
    return DatasetInfo(used, dict(recorded["categories"]), recorded["has_masks"])


def dataset_info(
    train: DictConfig, test: DictConfig | None = None, *, _root_: DictConfig
) -> dict[str, dict[str, Any]]:
    """What a config knows of its datasets, by name: kept in the saved config of a run.

    Args:
        train: ``dataloader.train.dataset``.
        test: ``dataloader.test.dataset``, if there is one.

    Returns:
        Plain values: the number of images, and of a detection dataset the number with an annotation
        that is not a crowd region, the categories, and whether there are masks.
    """
    if "name" in train:
        return {train.name: {"num_images": _count_images(train.name, _root_)}}
    result = {}
    for name in _list(train.names) + _list(test.names if test is not None else None):
        info = _info(name, _root_)
        result[name] = {
            "num_images": info.num_images,
            "num_annotated": _info(name, _root_, filter_empty=True).num_images,
            "categories": info.categories,
            "has_masks": info.has_masks,
        }
    return result


def _check_schedule(epochs: Any, batch_size: Any) -> None:
    for key, value in (("train.epochs", epochs), ("total_batch_size", batch_size)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"{key} must be a positive number, not {value!r}")


def iterations(epochs: float, dataset: DictConfig, batch_size: int, *, _root_: DictConfig) -> int:
    """Iterations of ``epochs`` passes over the images that are trained on, rounded; at least one.

    Args:
        epochs: positive.
        dataset: ``dataloader.train.dataset``, whose options say which images are used.
        batch_size: images per iteration.

    Raises:
        ValueError: an argument out of range.
    """
    _check_schedule(epochs, batch_size)
    options = {
        "filter_empty": dataset.get("filter_empty", True),
        "crowd": dataset.get("crowd", "ignore"),
    }
    images = sum(_info(name, _root_, **options).num_images for name in _list(dataset.names))
    if dataset.get("max_images") is not None:
        images = min(images, dataset.max_images)
    return max(1, round(epochs * images / batch_size))


def image_set(name: str) -> str:
    """The images of a dataset, as :func:`crossmae_det.pretraining.find_images` takes them.

    Args:
        name: a name in :data:`IMAGE_FOLDERS` or of a dataset registered in detectron2 (the
            built-in one is written on first use); anything else is taken as it is.

    Raises:
        ValueError: a registered dataset that is not one of a COCO json and an image folder.
        FileNotFoundError: a registered dataset whose json is absent.
    """
    if name in IMAGE_FOLDERS:
        root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
        return os.path.join(root, IMAGE_FOLDERS[name][0])
    if name not in DatasetCatalog:
        return name
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if not json_file or not image_root:
        raise ValueError(f"dataset '{name}' has no image folder; name the folder itself")
    if not os.path.isfile(json_file):
        DatasetCatalog.get(name)  # a loader may make its files when called; others say what lacks
    return f"{json_file}:{image_root}"


def image_iterations(epochs: float, name: str, batch_size: int, *, _root_: DictConfig) -> int:
    """Iterations of ``epochs`` passes over a set of unlabeled images, rounded; at least one."""
    _check_schedule(epochs, batch_size)
    return max(1, round(epochs * _count_images(name, _root_) / batch_size))


def _count_images(name: str, root: DictConfig) -> int:
    from crossmae_det.pretraining import find_images  # not needed to import crossmae_det

    images = image_set(name)
    try:
        return len(find_images(images))
    except FileNotFoundError:
        if (recorded := _recorded(name, root)) is not None:
            return recorded["num_images"]
        if name in IMAGE_FOLDERS and not os.path.isdir(images):
            return IMAGE_FOLDERS[name][1]
        raise


def categories(
    train_names: Names, test_names: Names | None, *, _root_: DictConfig
) -> dict[int, str]:
    """Category id -> name of the training set, in the order of the model's classes.

    Other datasets are mapped to them by name: their ids and their order may differ.

    Raises:
        ValueError: a dataset lacks a class of the first, or has one more.
    """
    first, *others = _list(train_names) + _list(test_names)
    result = _info(first, _root_).categories
    for name in others:
        category_indices(_info(name, _root_).categories, result, name, first)
    return result


def default_val(train_names: Names, val_name: str, *, _root_: DictConfig) -> str | None:
    """The validation set of a recipe, where it fits the training set; else none.

    Args:
        train_names: what is trained on.
        val_name: the recipe's own validation set, a name registered in detectron2.

    Returns:
        ``val_name`` for the recipe's own training set, and for any other with the same classes if
        the annotations of ``val_name`` are there; else None: training without a validation set.
    """
    train = _list(train_names)
    if all(name in DatasetCatalog and name.startswith("coco_") for name in train):
        return val_name
    if not _is_present(val_name):
        return None
    wanted = set(_info(val_name, _root_).categories.values())
    same = all(set(_info(name, _root_).categories.values()) == wanted for name in train)
    return val_name if same else None


def has_masks(
    names: Names, mask_head: Any = "", crowd: str = "ignore", *, _root_: DictConfig
) -> bool:
    """Whether masks are trained: boxes alone, or a model without mask head, make a Faster R-CNN."""
    infos = (_info(name, _root_, crowd=crowd) for name in _list(names))
    return mask_head is not None and any(info.has_masks for info in infos)


def linear_lr(base_lr: float, batch_size: int, base_batch_size: int) -> float:
    """The linear rule: a learning rate proportional to the batch (https://arxiv.org/abs/1706.02677)."""
    return base_lr * batch_size / base_batch_size


def pretraining_lr(
    base_lr: float, batch_size: int, prediction_ratio: float, mask_ratio: float
) -> float:
    """The rule of CrossMAE: linear in the batch, of 256, and in the masked patches predicted.

    Raises:
        ValueError: no patch is masked.
    """
    if not mask_ratio > 0:
        raise ValueError(f"model.mask_ratio={mask_ratio}: must be above 0")
    return linear_lr(base_lr, batch_size, 256) * prediction_ratio / mask_ratio


def fraction(total: int, parts: int, at_least: int) -> int:
    """A period that divides a run in about ``parts``, but no shorter than ``at_least``."""
    return max(at_least, total // parts)


def height(image_size: int | Sequence[int]) -> int:
    """The height of an image size: a side, or (height, width).

    Raises:
        ValueError: it is neither.
    """
    return _sides(image_size)[0]


def width(image_size: int | Sequence[int]) -> int:
    """The width of an image size, as :func:`height`."""
    return _sides(image_size)[1]


def _sides(image_size: int | Sequence[int]) -> tuple[int, int]:
    sides = to_2tuple(image_size)
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(
            "dataloader.image_size must be a side or [height, width], in whole pixels; got"
            f" {image_size}"
        )
    return sides


def when(condition: bool, value: Any) -> Any:
    """``value`` where the condition holds, None where it does not."""
    return value if condition else None


def either(condition: bool, value: Any, other: Any) -> Any:
    """``value`` where the condition holds, else ``other``."""
    return value if condition else other


def is_set(value: Any) -> bool:
    """Whether a key that is empty by default has a value."""
    return bool(value)


# Those that look at the data have names of their own: an override does not resolve them.
_RULES: dict[str, Callable] = {
    "dataset.info": dataset_info,
    "dataset.default_val": default_val,
    "dataset.iterations": iterations,
    "dataset.image_iterations": image_iterations,
    "dataset.categories": categories,
    "dataset.has_masks": has_masks,
    "crossmae.linear_lr": linear_lr,
    "crossmae.pretraining_lr": pretraining_lr,
    "crossmae.fraction": fraction,
    "crossmae.height": height,
    "crossmae.width": width,
    "crossmae.either": either,
    "crossmae.is_set": is_set,
    "crossmae.when": when,
    "crossmae.count": len,
}

for _name, _rule in _RULES.items():
    OmegaConf.register_new_resolver(_name, _rule, replace=True)
