"""Measurements in turns, and what is said about them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from tqdm import tqdm

T = TypeVar("T")


def check_repeats(repeats: int) -> None:
    """Refuse a number of rounds that measures nothing.

    Raises:
        ValueError: it is not positive.
    """
    if repeats < 1:
        raise ValueError(f"the number of repeats must be at least 1, got {repeats}")


def interleaved(
    measures: Sequence[Callable[[], T]], repeats: int, description: str
) -> list[list[T]]:
    """Measure in turns, A B A B, so that a machine that drifts does so for all of them alike.

    One round more than asked for comes first and is dropped: it fills caches and makes the
    optimizers' state.

    Args:
        measures: each does the work once and returns what it measured.
        repeats: rounds that count.
        description: for the progress bar.

    Returns:
        For each of ``measures``, its ``repeats`` results. Those at one index were taken in one
        round, one after the other.

    Raises:
        ValueError: ``repeats`` is not positive.
    """
    check_repeats(repeats)
    results: list[list[T]] = [[] for _ in measures]
    with tqdm(total=(repeats + 1) * len(measures), desc=description) as bar:
        for _ in range(repeats + 1):
            for measure, taken in zip(measures, results, strict=True):
                taken.append(measure())
                bar.update()
    return [taken[1:] for taken in results]


@dataclass(frozen=True)
class Spread:
    """Several measurements of one quantity: the median, and from the lowest to the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(float(np.median(values)), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratios(values: Sequence[float], others: Sequence[float]) -> Spread:
    """``values`` over ``others``, round by round."""
    return Spread.of([value / other for value, other in zip(values, others, strict=True)])
