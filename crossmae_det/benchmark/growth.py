"""How the cost of a block grows with the side of the image, by window and by global attention.

Legend: N images, S side of an image in pixels, L patches, C channels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from crossmae_det.benchmark.report import Section
from crossmae_det.benchmark.work import Work
from crossmae_det.benchmark.workers import measure


class OneBlock(nn.Module):
    """A block of a trunk as a model of images, of which only the size counts.

    Args:
        block: of a trunk, in map mode.
        dim: channels C.
        patch_size: side of a patch in pixels.
    """

    def __init__(self, block: nn.Module, dim: int, patch_size: int):
        super().__init__()
        self.block = block
        self.dim = dim
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, S, S) -> {"tokens": (N, L, C)}."""
        grid = images.shape[2] // self.patch_size, images.shape[3] // self.patch_size
        tokens = images.new_ones(len(images), grid[0] * grid[1], self.dim)
        return {"tokens": self.block(tokens, grid)}


@dataclass(frozen=True)
class Point:
    """A block at one size of the image; what is None could not be measured."""

    kind: str
    image_size: int
    seconds: float | None
    bytes: int | None
    failure: str


@dataclass(frozen=True)
class Growth:
    """A curve, and the powers of the side that time and memory grow with (a fit in logarithms)."""

    kind: str
    points: list[Point]
    time_exponent: float | None
    memory_exponent: float | None


def grow(
    work: Work,
    builds: Mapping[str, Callable[[], nn.Module]],
    sizes: Sequence[int],
    repeats: int,
) -> list[Growth]:
    """Measure a windowed and a global block over sizes of the image, in turns at each size.

    Args:
        work: what is done with a block; its name, build and image size are replaced, and its
            weights are not counted: they do not grow.
        builds: kind of block -> what builds it, a picklable callable.
        sizes: sides of the image in pixels, at least two.
        repeats: rounds that count.

    Raises:
        ValueError: ``repeats`` is not positive, or there are fewer than two sizes.
    """
    if len(set(sizes)) < 2:
        raise ValueError("a curve takes images of at least two sizes")
    points: dict[str, list[Point]] = {kind: [] for kind in builds}
    for size in sizes:
        works = [
            replace(work, name=kind, build=build, image_size=size, count_model=False)
            for kind, build in builds.items()
        ]
        for outcome in measure(works, repeats, f"blocks at {size} x {size}"):
            failed = bool(outcome.failure)
            points[outcome.work.name].append(
                Point(
                    outcome.work.name,
                    size,
                    None if failed else float(np.median(outcome.seconds)),
                    None if failed else outcome.bytes,
                    outcome.failure,
                )
            )
    return [
        Growth(
            kind,
            curve,
            fitted_exponent([(p.image_size, p.seconds) for p in curve]),
            fitted_exponent([(p.image_size, p.bytes) for p in curve]),
        )
        for kind, curve in points.items()
    ]


def fitted_exponent(points: Sequence[tuple[int, float | None]]) -> float | None:
    """The power p of value = a * side ** p that fits best, by least squares in logarithms.

    Args:
        points: (side, value); those without a positive value are left out.

    Returns:
        p; None where fewer than two points are left.
    """
    known = [(side, value) for side, value in points if value]
    if len(known) < 2:
        return None
    sides, values = np.log(np.array(known, dtype=float)).T
    return float(np.polyfit(sides, values, 1)[0])


def growth_section(curves: Sequence[Growth], work: Work) -> Section:
    """The curves as a table; ``work`` is what :func:`grow` was given."""
    rows = [
        [
            f"{point.kind} block",
            str(point.image_size),
            point.failure or f"{1e3 * (point.seconds or 0):.4g}",
            "-" if point.bytes is None else f"{point.bytes / 2**20:.0f}",
        ]
        for curve in curves
        for point in curve.points
    ]
    notes = [
        f"{curve.kind.capitalize()} blocks: time grows as the side to the power of"
        f" {_exponent(curve.time_exponent)}, memory {_exponent(curve.memory_exponent)}."
        for curve in curves
    ]
    step = "forward, backward and AdamW" if work.train else "forward"
    values: dict[str, Any] = {
        curve.kind: {
            "time_exponent": curve.time_exponent,
            "memory_exponent": curve.memory_exponent,
            "points": [vars(point) for point in curve.points],
        }
        for curve in curves
    }
    return Section(
        key="growth",
        title=(
            f"One block of {work.name}: {step}, batch of {work.batch_size}, {work.precision},"
            f" {work.device}"
        ),
        headers=["block", "pixels", "median ms", "MiB"],
        rows=rows,
        notes=[
            *notes,
            "Proportional to the area is 2; to pairs of patches 4. MiB: peak, without the weights.",
        ],
        values=values,
    )


def _exponent(exponent: float | None) -> str:
    return "an unknown number" if exponent is None else f"{exponent:.2f}"
