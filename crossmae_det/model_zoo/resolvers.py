"""The rules by which values of a config follow from its few free keys.

Importing this module registers them as OmegaConf resolvers. Configs write ``${crossmae.NAME:...}``;
the arguments are references to other keys, so that a changed key changes all that depends on it.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import OmegaConf
from timm.layers import to_2tuple

from crossmae_det.data import describe
from crossmae_det.pretraining import find_images

Names = str | Sequence[str]

# Image folders by name, beside the data sets of detectron2: the path under DETECTRON2_DATASETS, and
# the number of images, for a config that is looked at where they are not.
IMAGE_FOLDERS = {"imagenet_train": ("imagenet/train", 1_281_167)}


def _list(names: Names) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def iterations(epochs: float, names: Names, batch_size: int) -> int:
    """Iterations of ``epochs`` passes over the training images, rounded; at least one."""
    images = sum(describe(name).num_images for name in _list(names))
    return max(1, round(epochs * images / batch_size))


def image_set(name: str) -> str:
    """The images of a data set, as :func:`crossmae_det.pretraining.find_images` takes them.

    Args:
        name: a name in :data:`IMAGE_FOLDERS` or of a data set registered in detectron2 (the
            built-in one is written on first use); anything else is taken as it is.

    Raises:
        ValueError: a registered data set that is not one of a COCO json and an image folder.
        FileNotFoundError: a registered data set whose json is absent.
    """
    if name in IMAGE_FOLDERS:
        root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
        return os.path.join(root, IMAGE_FOLDERS[name][0])
    if name not in DatasetCatalog:
        return name
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if not json_file or not image_root:
        raise ValueError(f"data set '{name}' has no image folder; name the folder itself")
    if not os.path.isfile(json_file):
        DatasetCatalog.get(name)  # a loader may make its files when called; others say what lacks
    return f"{json_file}:{image_root}"


def image_iterations(epochs: float, name: str, batch_size: int) -> int:
    """Iterations of ``epochs`` passes over a set of unlabelled images, rounded; at least one."""
    images = image_set(name)
    if name in IMAGE_FOLDERS and not os.path.isdir(images):
        count = IMAGE_FOLDERS[name][1]
    else:
        count = len(find_images(images))
    return max(1, round(epochs * count / batch_size))


def categories(train_names: Names, test_names: Names) -> dict[int, str]:
    """Category id -> name of the training set, in the order of the classes.

    Raises:
        ValueError: a set has other categories than the first: its numbers would mean other classes.
    """
    first, *others = _list(train_names) + _list(test_names)
    result = describe(first).categories
    for name in others:
        if describe(name).categories != result:
            raise ValueError(f"data sets '{first}' and '{name}' do not have the same categories")
    return result


def has_masks(names: Names) -> bool:
    """Whether the training set has masks; boxes alone train a Faster R-CNN."""
    return all(describe(name).has_masks for name in _list(names))


def linear_lr(base_lr: float, batch_size: int, base_batch_size: int) -> float:
    """The linear rule: a learning rate proportional to the batch (https://arxiv.org/abs/1706.02677)."""
    return base_lr * batch_size / base_batch_size


def pretraining_lr(
    base_lr: float, batch_size: int, prediction_ratio: float, mask_ratio: float
) -> float:
    """The rule of CrossMAE: linear in the batch, of 256, and in the masked patches predicted."""
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


def is_set(value: Any) -> bool:
    """Whether a key that is empty by default has a value."""
    return bool(value)


# Those that look at the data have names of their own: a run's saved config keeps their values.
_RULES: dict[str, Callable] = {
    "dataset.iterations": iterations,
    "dataset.image_iterations": image_iterations,
    "dataset.categories": categories,
    "dataset.has_masks": has_masks,
    "crossmae.linear_lr": linear_lr,
    "crossmae.pretraining_lr": pretraining_lr,
    "crossmae.fraction": fraction,
    "crossmae.height": height,
    "crossmae.width": width,
    "crossmae.is_set": is_set,
    "crossmae.when": when,
    "crossmae.count": len,
}
for _name, _rule in _RULES.items():
    OmegaConf.register_new_resolver(_name, _rule, replace=True)
