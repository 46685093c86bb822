"""Backbones side by side: parameters, FLOPs, latency, throughput and memory."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from crossmae_det.benchmark.detection_flops import backbone_parts, detector_cost
from crossmae_det.benchmark.flops import flops_of, parameters_of
from crossmae_det.benchmark.report import Section
from crossmae_det.benchmark.timing import Spread
from crossmae_det.benchmark.work import MEMORY_NOTES, Work
from crossmae_det.benchmark.workers import Outcome, measure

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
