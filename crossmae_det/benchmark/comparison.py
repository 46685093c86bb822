"""Backbones side by side: parameters, FLOPs, latency, throughput and memory.

How the cost of a block grows with the side of the image, by window and by global attention.

Legend: N images, S side of an image in pixels, L patches, C channels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from crossmae_det.benchmark.costs import backbone_parts, detector_cost, flops_of, parameters_of
from crossmae_det.benchmark.measuring import MEMORY_NOTES, Outcome, Spread, Work, measure
from crossmae_det.benchmark.report import Section

KINDS = {
    "alone": "Backbones",
    "pyramid": "Backbones with their pyramid",
    "detector": "Backbones in Mask R-CNN",
}

FEW_OBJECTS = (
    "With random weights a detector finds few objects or none, and its mask head has little to do:"
    " name a config and its checkpoint for the time of one that finds some."
)


@dataclass(frozen=True)
class Count:
    """Parameters of a model, and FLOPs of the forward pass of one image by part."""

    parameters: int
    parts: dict[str, int]

    @property
    def flops(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Case:
    """A backbone at one size and batch, beside the first backbone there.

    Attributes:
        outcome: what was measured.
        count: parameters and FLOPs.
        time_ratio: time over the first backbone's, round by round; None where one of them failed.
        memory_ratio: peak memory over the first backbone's, likewise.
    """

    outcome: Outcome[Work]
    count: Count
    time_ratio: Spread | None
    memory_ratio: float | None


def count(work: Work) -> Count:
    """Count a model's parameters and the FLOPs of one image, on the meta device.

    Raises:
        ValueError: the model does not take images of that size.
    """
    # Not made on the meta device: some models ask for values while they are built.
    model: nn.Module = work.build().eval().to("meta")
    parameters = parameters_of(model)
    size = work.image_size
    try:
        if work.part == "detector":
            return Count(parameters, detector_cost(work.name, model, size).flops)
        counts, _ = flops_of(model, torch.empty(1, 3, size, size, device="meta"))
    except (RuntimeError, AssertionError) as error:  # what torch, timm and detectron2 raise then
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"'{work.name}' does not take images of {size} x {size} pixels: {reason[0]}"
        ) from error
    return Count(parameters, backbone_parts(model, counts))


def compare(groups: Sequence[Sequence[Work]], repeats: int) -> list[list[Case]]:
    """Measure groups of cases; within a group, in turns.

    Args:
        groups: of one image size and batch each; the first case of each is what the others are
            compared with.
        repeats: rounds that count.

    Raises:
        ValueError: ``repeats`` is not positive, or a model does not take images of that size.
    """
    counts: dict[tuple[str, int], Count] = {}
    for work in tqdm([work for group in groups for work in group], desc="FLOPs"):
        key = (work.name, work.image_size)
        counts[key] = counts.get(key) or count(work)
    results = []
    for group in groups:
        size, batch = group[0].image_size, group[0].batch_size
        outcomes = measure(group, repeats, f"{size} x {size}, batch {batch}")
        first = outcomes[0]
        results.append(
            [
                Case(outcome, counts[outcome.work.name, size], *outcome.against(first))
                for outcome in outcomes
            ]
        )
    return results


def comparison_section(groups: Sequence[Sequence[Case]]) -> Section:
    """The comparison as a table."""
    cases = [case for group in groups for case in group]
    work, first = cases[0].outcome.work, cases[0].outcome.work.name
    step = "forward, backward and AdamW" if work.train else "forward"
    return Section(
        key="backbones",
        title=", ".join(
            [f"{KINDS[work.part]}: {step}", work.precision, work.device]
            + ["compiled"] * work.compiled
        ),
        headers=[
            *("backbone", "pixels", "batch", "M params", "GFLOPs", "median ms", "p90 ms"),
            *("images/s", "MiB", f"time x {first} (range)", "memory x"),
        ],
        rows=[_row(case) for case in cases],
        notes=[
            f"{max(len(case.outcome.seconds) for case in cases)} repeats in turns; range: lowest to"
            " highest of the ratios, round by round.",
            "GFLOPs: of the forward pass of one image, 2 FLOPs for each multiply-add; products of"
            " matrices and convolutions.",
            MEMORY_NOTES[work.device],
            *([FEW_OBJECTS] if work.part == "detector" and not work.train else []),
        ],
        values=[case_values(case) for case in cases],
    )


def flops_section(groups: Sequence[Sequence[Case]]) -> Section:
    """The FLOPs of one image by part, at each size."""
    counts = {}
    for case in (case for group in groups for case in group):
        counts[case.outcome.work.name, case.outcome.work.image_size] = case.count
    detectors = any(case.outcome.work.part == "detector" for group in groups for case in group)
    parts = list(dict.fromkeys(part for count in counts.values() for part in count.parts))
    return Section(
        key="flops",
        title="GFLOPs of the forward pass of one image, by part",
        headers=["backbone", "pixels", *(part.replace("_", " ") for part in parts), "total"],
        rows=[
            [name, str(size)]
            + [f"{count.parts[part] / 1e9:.1f}" if part in count.parts else "-" for part in parts]
            + [f"{count.flops / 1e9:.1f}"]
            for (name, size), count in counts.items()
        ],
        notes=[
            "2 FLOPs for each multiply-add; products of matrices and convolutions."
            + " Heads: with as many boxes as the detector allows for." * detectors
        ],
        values=[
            {"backbone": name, "image_size": size, **asdict(count)}
            for (name, size), count in counts.items()
        ],
    )


def find_earlier(works: Iterable[Work], earlier: Mapping[str, Any]) -> dict[Work, dict[str, Any]]:
    """What an earlier run measured of the same work.

    Args:
        works: the cases.
        earlier: from :func:`crossmae_det.benchmark.read_json`.

    Raises:
        ValueError: they have no case in common.
    """
    found = {}
    for work in works:
        own = work_values(work).items()
        for case in earlier.get("backbones", []):
            if own <= case.items() and not case["failure"]:
                found[work] = case
    if not found:
        raise ValueError(
            "the earlier results have no backbone in common with this run, at the same size, batch,"
            " precision, part and device"
        )
    return found


def earlier_section(groups: Sequence[Sequence[Case]], earlier: Mapping[str, Any]) -> Section:
    """Time and memory over those of an earlier run, for the cases that both have.

    Args:
        groups: of this run.
        earlier: from :func:`crossmae_det.benchmark.read_json`.

    Raises:
        ValueError: they have no case in common.
    """
    cases = [case for group in groups for case in group]
    known = find_earlier((case.outcome.work for case in cases), earlier)
    rows, values = [], []
    for case in cases:
        work, new = case.outcome.work, case_values(case)
        old = known.get(work)
        if old is None or case.outcome.failure:
            continue
        time = new["median_seconds"] / old["median_seconds"]
        memory = new["peak_bytes"] / old["peak_bytes"] if old["peak_bytes"] else None
        rows.append(
            [work.name, str(work.image_size), str(work.batch_size), f"{time:.3f}"]
            + ["-" if memory is None else f"{memory:.2f}"]
        )
        values.append(work_values(work) | {"time": time, "memory": memory})
    machine = ", ".join(f"{name}: {value}" for name, value in earlier["environment"].items())
    return Section(
        key="earlier",
        title="Against the earlier run",
        headers=["backbone", "pixels", "batch", "time x earlier", "memory x earlier"],
        rows=rows,
        notes=[f"Earlier: {earlier['command']} on {machine}."],
        values=values,
    )


def work_values(work: Work) -> dict[str, Any]:
    """What tells cases apart, for JSON and CSV."""
    return {
        "backbone": work.name,
        "part": work.part,
        "image_size": work.image_size,
        "batch_size": work.batch_size,
        "train": work.train,
        "precision": work.precision,
        "device": work.device,
        "compiled": work.compiled,
    }


def case_values(case: Case) -> dict[str, Any]:
    """A case with all its digits, for JSON and CSV."""
    outcome, work = case.outcome, case.outcome.work
    values: dict[str, Any] = work_values(work) | {
        "parameters": case.count.parameters,
        "flops": case.count.flops,
        "flops_by_part": case.count.parts,
        **outcome.values(work.batch_size),
    }
    if case.time_ratio is not None:
        values |= {
            "time_ratio": asdict(case.time_ratio),
            "memory_ratio": case.memory_ratio,
        }
    return values


def _row(case: Case) -> list[str]:
    values: Mapping[str, Any] = case_values(case)
    start = [values["backbone"], str(values["image_size"]), str(values["batch_size"])]
    start += [f"{values['parameters'] / 1e6:.1f}", f"{values['flops'] / 1e9:.1f}"]
    if case.outcome.failure:
        return [*start, case.outcome.failure, *["-"] * 5]
    return [
        *start,
        f"{1e3 * values['median_seconds']:.4g}",
        f"{1e3 * values['p90_seconds']:.4g}",
        f"{values['images_per_second']:.3g}",
        f"{values['peak_bytes'] / 2**20:.0f}",
        "-" if case.time_ratio is None else str(case.time_ratio),
        "-" if case.memory_ratio is None else f"{case.memory_ratio:.2f}",
    ]


class OneBlock(nn.Module):
    """A block of a backbone as a model of images, of which only the size counts.

    Args:
        block: of a backbone, in map mode.
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
