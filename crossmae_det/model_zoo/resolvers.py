"""The rules by which config values follow from a few free keys.

Importing this module registers them as OmegaConf resolvers (see ``RULES``). Configs write
``${crossmae.NAME:...}``, with references to other keys as arguments, so that a changed key changes
everything that depends on it.
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import DictConfig, OmegaConf
from timm.layers import to_2tuple

from crossmae_det.detection import DatasetInfo, category_indices, describe, formats

Names = str | Sequence[str]

# Image folders by name, besides detectron2's datasets: the path under DETECTRON2_DATASETS, and the
# number of images for configs that are read where the images are absent.
IMAGE_FOLDERS = {"imagenet_train": ("imagenet/train", 1_281_167)}


def dataset_info(
    train: DictConfig, test: DictConfig | None = None, *, _root_: DictConfig
) -> dict[str, dict[str, Any]]:
    """Facts about the datasets of a config, by name, which a run keeps in its saved config.

    Args:
        train: ``dataloader.train.dataset``.
        test: ``dataloader.test.dataset``, if there is one.

    Returns:
        Plain values: the number of images; for a detection dataset also the number of images with
        an annotation that is not a crowd region, the categories, and whether there are masks.
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


def iterations(epochs: float, dataset: DictConfig, batch_size: int, *, _root_: DictConfig) -> int:
    """Iterations of ``epochs`` passes over the images that are used, rounded; at least one.

    Args:
        epochs: positive.
        dataset: ``dataloader.train.dataset``; its options select the images.
        batch_size: images per iteration.

    Raises:
        ValueError: an argument out of range.
    """
    for key, value in (("train.epochs", epochs), ("total_batch_size", batch_size)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"{key} must be a positive number, not {value!r}")
    if "name" in dataset:
        images = _count_images(dataset.name, _root_)
    else:
        defaults = {"filter_empty": True, "crowd": "ignore"}
        options = {key: dataset.get(key, default) for key, default in defaults.items()}
        images = sum(_info(name, _root_, **options).num_images for name in _list(dataset.names))
    if dataset.get("max_images") is not None:
        images = min(images, dataset.max_images)
    return max(1, round(epochs * images / batch_size))


def image_set(name: str) -> str:
    """The images of a dataset, as :func:`crossmae_det.pretraining.find_images` takes them.

    Args:
        name: a name in :data:`IMAGE_FOLDERS`, or of a dataset registered in detectron2; anything
            else is returned as it is.

    Raises:
        ValueError: a registered dataset without a COCO json and an image folder, or a dataset in a
            layout of `crossmae_det.detection.formats`.
        FileNotFoundError: a registered dataset whose json is absent.
    """
    if name in IMAGE_FOLDERS:
        root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
        return os.path.join(root, IMAGE_FOLDERS[name][0])
    if (pair := formats.coco_string(name)) is not None:
        return pair
    if formats.parse(name) is not None:
        raise ValueError(f"dataset '{name}' has labels: name the folder of its images instead")
    if name not in DatasetCatalog:
        return name
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if not json_file or not image_root:
        raise ValueError(f"dataset '{name}' has no image folder: name the folder instead")
    if not os.path.isfile(json_file):
        DatasetCatalog.get(name)  # writes the built-in dataset; others raise what is missing
    return f"{json_file}:{image_root}"


def categories(
    train_names: Names, test_names: Names | None, *, _root_: DictConfig
) -> dict[int, str]:
    """Category id -> name of the first training set, in the order of the model's classes.

    Other datasets are matched by name: their ids and their order may differ.

    Raises:
        ValueError: a dataset lacks a class of the first, or has an additional one.
    """
    for name in _list(test_names):
        spec = formats.parse(name)
        split = formats.with_split(name, "val") if spec and not spec.split else None
        if split is not None:  # overrides and yaml configs have named it by now
            raise ValueError(f"{name!r} has splits: name the one to evaluate on, as in {split}")
    first, *others = _list(train_names) + _list(test_names)
    result = _info(first, _root_).categories
    for name in others:
        category_indices(_info(name, _root_).categories, result, name, first)
    return result


def default_val(train_names: Names, val_name: str, *, _root_: DictConfig) -> str | None:
    """The validation set of a recipe, if it fits the training set.

    Args:
        train_names: the training sets.
        val_name: the recipe's validation set, registered in detectron2.

    Returns:
        The validation split of a training set that has one, such as ``yolo:data.yaml``. Else
        ``val_name`` for the recipe's own training set, and for others with the same classes if the
        annotations of ``val_name`` are there; else None, to train without evaluation.
    """
    train = _list(train_names)
    if len(train) == 1 and (own := _own_val(train[0], _root_)) is not None:
        return own
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
    """Whether to train masks: there are some, and the model has a mask head."""
    infos = (_info(name, _root_, crowd=crowd) for name in _list(names))
    return mask_head is not None and any(info.has_masks for info in infos)


def linear_lr(base_lr: float, batch_size: int, base_batch_size: int) -> float:
    """A learning rate proportional to the batch size (https://arxiv.org/abs/1706.02677)."""
    return base_lr * batch_size / base_batch_size


def pretraining_lr(
    base_lr: float, batch_size: int, prediction_ratio: float, mask_ratio: float
) -> float:
    """CrossMAE's rule: linear in the batch size over 256 and in the predicted masked patches.

    Raises:
        ValueError: no patch is masked.
    """
    if not mask_ratio > 0:
        raise ValueError(f"model.mask_ratio={mask_ratio}: must be above 0")
    return linear_lr(base_lr, batch_size, 256) * prediction_ratio / mask_ratio


def fraction(total: int, parts: int, at_least: int) -> int:
    """A period that divides a run into about ``parts``, but is not shorter than ``at_least``."""
    return max(at_least, total // parts)


def sides(image_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of an image size, which is a side or (height, width).

    Raises:
        ValueError: it is neither.
    """
    pair = to_2tuple(image_size)
    if len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
        raise ValueError(
            f"dataloader.image_size={image_size}: must be a side or [height, width] in whole pixels"
        )
    return pair


def choose(condition: Any, value: Any, other: Any = None) -> Any:
    """``value`` if the condition is true or set, else ``other``."""
    return value if condition else other


# Rules that read data are called "dataset.": overrides do not resolve them.
RULES: dict[str, Callable] = {
    "dataset.info": dataset_info,
    "dataset.default_val": default_val,
    "dataset.iterations": iterations,
    "dataset.categories": categories,
    "dataset.has_masks": has_masks,
    "crossmae.linear_lr": linear_lr,
    "crossmae.pretraining_lr": pretraining_lr,
    "crossmae.fraction": fraction,
    "crossmae.height": lambda image_size: sides(image_size)[0],
    "crossmae.width": lambda image_size: sides(image_size)[1],
    "crossmae.if": choose,
    "crossmae.count": len,
}

for _name, _rule in RULES.items():
    OmegaConf.register_new_resolver(_name, _rule, replace=True)


def _list(names: Names | None) -> list[str]:
    return [] if names is None else [names] if isinstance(names, str) else list(names)


def _recorded(name: str, root: DictConfig) -> dict[str, Any] | None:
    """The facts about a dataset that a run kept in this config."""
    return (OmegaConf.select(root, "dataloader.recorded") or {}).get(name)


def _is_present(name: str) -> bool:
    """Whether the annotations of a detection dataset can be read."""
    if (layout := formats.parse(name)) is not None:
        return formats.is_present(layout)
    if name in DatasetCatalog:
        path = MetadataCatalog.get(name).get("json_file")
        return path is None or "://" in path or os.path.isfile(path)
    spec = re.match(r"(.+?\.json):", name, re.IGNORECASE)
    return spec is not None and os.path.isfile(os.path.expanduser(spec[1]))


def _own_val(name: str, root: DictConfig) -> str | None:
    """The validation split of a training set; without its files, the one that a run kept."""
    train = formats.parse(name)
    if train is None:
        return None
    if formats.is_present(train):
        names = [formats.with_split(name, "val")]
    else:
        names = list(OmegaConf.select(root, "dataloader.recorded") or {})
    for other in filter(None, names):
        val = formats.parse(other)
        if val is None or (val.layout, val.path) != (train.layout, train.path):
            continue
        if val.split and formats.find_split([val.split], "val") and val.split != train.split:
            return other
    return None


def _info(name: str, root: DictConfig, **options: Any) -> DatasetInfo:
    recorded = None if _is_present(name) else _recorded(name, root)
    if recorded is None:
        return describe(name, **options)
    used = recorded["num_annotated" if options.get("filter_empty") else "num_images"]
    return DatasetInfo(used, dict(recorded["categories"]), recorded["has_masks"])


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
