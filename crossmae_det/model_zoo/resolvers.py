"""The rules by which values of a config follow from its few free keys.

Importing this module registers them as OmegaConf resolvers. Configs write ``${crossmae.NAME:...}``;
the arguments are references to other keys, so that a changed key changes all that depends on it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import OmegaConf

from crossmae_det.data import describe

Names = str | Sequence[str]


def _list(names: Names) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def iterations(epochs: float, names: Names, batch_size: int) -> int:
    """Iterations of ``epochs`` passes over the training images, rounded; at least one."""
    images = sum(describe(name).num_images for name in _list(names))
    return max(1, round(epochs * images / batch_size))


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


def fraction(total: int, parts: int, at_least: int) -> int:
    """A period that divides a run in about ``parts``, but no shorter than ``at_least``."""
    return max(at_least, total // parts)


def when(condition: bool, value: Any) -> Any:
    """``value`` where the condition holds, None where it does not."""
    return value if condition else None


# Those that look at the data have names of their own: a run's saved config keeps their values.
_RULES: dict[str, Callable] = {
    "dataset.iterations": iterations,
    "dataset.categories": categories,
    "dataset.has_masks": has_masks,
    "crossmae.linear_lr": linear_lr,
    "crossmae.fraction": fraction,
    "crossmae.when": when,
    "crossmae.count": len,
}
for _name, _rule in _RULES.items():
    OmegaConf.register_new_resolver(_name, _rule, replace=True)
