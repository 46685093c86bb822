"""Compare the costs of backbones and their blocks, and the AP of detectors trained from them.

Legend: N images, S image size in pixels.
"""

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn import parameter_count
from scipy import stats
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from crossmae_det.benchmark.costs import backbone_parts, detection_cost, flops_of
from crossmae_det.benchmark.measuring import MEMORY_NOTES, Case, measure
from crossmae_det.benchmark.report import Column, Section, machine
from crossmae_det.engine.trainer import training_step
from crossmae_det.utils import plots

# Part that is measured -> title of the table.
PARTS = {
    "alone": "Backbones",
    "pyramid": "Backbones with their pyramid",
    "detector": "Backbones in Mask R-CNN",
}

# What identifies a case beside its name.
SETTINGS = ("part", "image_size", "batch_size", "train", "precision", "device", "compiled")

# What is counted for a backbone; the last one is a dict.
COUNTS = ("parameters", "flops", "flops_by_part")

CASE_COLUMNS = (
    Column("backbone", "backbone"),
    Column("pixels", "image_size"),
    Column("batch", "batch_size"),
)

# Descriptions of the measured step, by whether it is a training step.
STEPS = {False: "forward", True: "forward, backward and AdamW"}

# Image size that takes next to no memory.
SMALL = 64

# Objects in a training image of noise; COCO's images have seven on average.
OBJECTS = 7

COUNTED = "2 FLOPs per multiply-add; matrix products and convolutions."

FEW_OBJECTS = (
    "With random weights a detector finds few objects or none, and its mask head has little to do:"
    " name a config and its checkpoint for the time of a detector that finds some."
)

# Metrics of trained detectors: name -> where the results file has them.
METRICS = {
    "box AP": ("bbox", "AP"),
    "box AP50": ("bbox", "AP50"),
    "mask AP": ("segm", "AP"),
    "mask AP50": ("segm", "AP50"),
}


@dataclass(frozen=True, kw_only=True)
class BackboneCase(Case):
    """A forward pass or a training step of a backbone, for one image and batch size.

    Attributes:
        part: a key of :data:`PARTS`. A "detector" is one of detectron2, the others map images
            (N, 3, S, S) to maps.
        image_size: S.
        train: forward, backward and optimizer (AdamW); else forward without gradients.
        compiled: compile the model; of a detector, the backbone.
    """

    part: str
    image_size: int
    train: bool
    compiled: bool = False

    def prepare(self) -> Callable[[], None]:
        torch.manual_seed(0)
        with torch.device(self.device):  # initialized there: a CPU takes seconds for a ViT-L
            model = self.build().to(self.device).train(self.train)
        if self.compiled:
            (model.backbone if self.part == "detector" else model).compile(dynamic=False)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True) if self.train else None

        def forward(inputs: Any) -> dict[str, Tensor]:
            # Detectors log their losses in the storage.
            with EventStorage(), torch.set_grad_enabled(self.train), self.autocast():
                outputs = model(inputs)
            # A scalar per map, or per loss of a detector.
            return {k: v.float().pow(2).mean() for k, v in outputs.items()} if self.train else {}

        def run(inputs: Any) -> None:
            if optimizer is None:
                forward(inputs)
            else:
                training_step(inputs, forward, optimizer)
                optimizer.zero_grad()

        if not self.count_model:
            # The first call also allocates memory for threads and libraries.
            run(replace(self, image_size=SMALL).inputs())
        return partial(run, self.inputs())

    def inputs(self) -> Any:
        """A batch of noise: (N, 3, S, S) floats, or the input of a detector of detectron2."""
        side = self.image_size
        if self.part == "detector":
            return [_detector_input(side, self.train) for _ in range(self.batch_size)]
        return torch.randn(self.batch_size, 3, side, side, device=self.device)

    def settings(self) -> dict[str, Any]:
        """What identifies the case in JSON: the backbone and :data:`SETTINGS`."""
        return {"backbone": self.name} | {key: getattr(self, key) for key in SETTINGS}


def _detector_input(side: int, train: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, side, side), dtype=torch.uint8, generator=generator)
    result: dict[str, Any] = {"image": image, "height": side, "width": side}
    if train:
        corners = torch.rand(OBJECTS, 2, generator=generator) * side / 2
        boxes = torch.cat([corners, corners + side / 4], dim=1)
        masks = torch.zeros(OBJECTS, side, side, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = True
        result["instances"] = Instances(
            (side, side),
            gt_boxes=Boxes(boxes),
            gt_classes=torch.zeros(OBJECTS, dtype=torch.int64),
            gt_masks=BitMasks(masks),
        )
    return result


def check_sizes(image_sizes: Sequence[int], batch_sizes: Sequence[int]) -> None:
    """Check image and batch sizes.

    Raises:
        ValueError: an image size is not a positive multiple of 32, the coarsest stride, or a batch
            is empty.
    """
    for size in image_sizes:
        if size < 32 or size % 32:
            raise ValueError(
                f"the image size {size} is not a multiple of 32, the coarsest stride of most"
                f" backbones: use {max(32, round(size / 32) * 32)}, for example"
            )
    for batch in batch_sizes:
        if batch < 1:
            raise ValueError(f"the batch size must be at least 1, got {batch}")


def count(case: BackboneCase) -> dict[str, Any]:
    """Count a model's parameters and the FLOPs of the forward pass of one image.

    Returns:
        The :data:`COUNTS`.

    Raises:
        ValueError: the model does not accept images of that size.
    """
    # Not built on the meta device: some models read values while they are built.
    model: nn.Module = case.build().eval().to("meta")
    size = case.image_size
    try:
        if case.part == "detector":
            parts = detection_cost(case.name, model, size).flops
        else:
            counts, _ = flops_of(model, torch.empty(1, 3, size, size, device="meta"))
            parts = backbone_parts(model, counts)
    except (RuntimeError, AssertionError) as error:  # from torch, timm and detectron2
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"'{case.name}' does not accept images of {size} x {size} pixels: {reason[0]}"
        ) from error
    parameters = parameter_count(model)[""]
    return {"parameters": parameters, "flops": sum(parts.values()), "flops_by_part": parts}


def compare(groups: Sequence[Sequence[BackboneCase]], repeats: int) -> list[dict[str, Any]]:
    """Measure groups of cases, alternately within a group.

    Args:
        groups: of one image and batch size each; the first case of a group is the baseline of
            the others.
        repeats: rounds that count.

    Returns:
        A record per case, in full precision: its settings, the result of :func:`count`, and
        ``Measurement.record``.

    Raises:
        ValueError: ``repeats`` is not positive, or a model does not accept images of that size.
    """
    counts: dict[tuple[str, int], dict[str, Any]] = {}
    for case in tqdm([case for group in groups for case in group], desc="FLOPs"):
        key = (case.name, case.image_size)
        counts[key] = counts.get(key) or count(case)
    records = []
    for group in groups:
        size = group[0].image_size
        measured = measure(group, repeats, f"{size} x {size}, batch {group[0].batch_size}")
        for each in measured:
            counted = counts[each.case.name, size]
            records.append(each.case.settings() | counted | each.record(measured[0]))
    return records


def comparison_sections(
    records: Sequence[Mapping[str, Any]], earlier: Mapping[str, Any] | None = None
) -> list[Section]:
    """Tables of a comparison: time and memory, FLOPs by part, and against an earlier run.

    Args:
        records: from :func:`compare`.
        earlier: from :func:`crossmae_det.benchmark.read_json`.
    """
    first = records[0]
    repeats = max(len(record.get("seconds", ())) for record in records)
    detectors = first["part"] == "detector"
    costs = Section(
        key="backbones",
        title=f"{PARTS[first['part']]}: {STEPS[first['train']]}, {first['precision']},"
        f" {first['device']}" + ", compiled" * first["compiled"],
        columns=[
            *CASE_COLUMNS,
            Column("M params", "parameters", ".1f", 1e-6),
            Column("GFLOPs", "flops", ".1f", 1e-9),
            Column("median ms", "median_seconds", ".4g", 1e3),
            Column("p90 ms", "p90_seconds", ".4g", 1e3),
            Column("images/s", "images_per_second", ".3g"),
            Column("MiB", "peak_bytes", ".0f", 2**-20),
            Column(f"time x {first['backbone']} (range)", "time_ratio"),
            Column("memory x", "memory_ratio", ".2f"),
        ],
        records=records,
        notes=[
            f"{repeats} interleaved repeats; range: lowest to highest ratio, round by round.",
            f"GFLOPs: of the forward pass of one image, {COUNTED}",
            MEMORY_NOTES[first["device"]],
            *([FEW_OBJECTS] if detectors and not first["train"] else []),
        ],
    )
    # The counts do not depend on the batch size.
    counts = {(record["backbone"], record["image_size"]): record for record in records}
    parts = dict.fromkeys(part for record in records for part in record["flops_by_part"])
    flops = Section(
        key="flops",
        title="GFLOPs of the forward pass of one image, by part",
        columns=[
            *CASE_COLUMNS[:2],
            *(Column(p.replace("_", " "), f"flops_by_part.{p}", ".1f", 1e-9) for p in parts),
            Column("total", "flops", ".1f", 1e-9),
        ],
        records=[
            {key: record[key] for key in ("backbone", "image_size", *COUNTS)}
            for record in counts.values()
        ],
        notes=[COUNTED + " Heads: with as many boxes as the detector allows." * detectors],
    )
    return [costs, flops, *([earlier_section(records, earlier)] if earlier else [])]


def find_earlier(
    settings: Mapping[str, Any], earlier: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """The record of a case with these settings in an earlier run; None if missing or failed."""
    for record in earlier.get("backbones", []):
        same = all(record.get(key) == settings[key] for key in ("backbone", *SETTINGS))
        if same and not record["failure"]:
            return record
    return None


def check_earlier(cases: Iterable[BackboneCase], earlier: Mapping[str, Any]) -> None:
    """Check that a run can be compared with an earlier one, before anything is measured.

    Raises:
        ValueError: the runs have no case in common.
    """
    if not any(find_earlier(case.settings(), earlier) for case in cases):
        raise ValueError(
            "the earlier results have no backbone in common with this run: measure one of them at"
            " the same size, batch, precision, part and device"
        )


def earlier_section(records: Sequence[Mapping[str, Any]], earlier: Mapping[str, Any]) -> Section:
    """Time and memory relative to an earlier run, for the cases that both have measured."""
    rows = []
    for new in records:
        old = find_earlier(new, earlier)
        if old is not None and not new["failure"]:
            settings = {key: new[key] for key in ("backbone", *SETTINGS)}
            time = new["median_seconds"] / old["median_seconds"]
            memory = new["peak_bytes"] / old["peak_bytes"] if old["peak_bytes"] else None
            rows.append(settings | {"time": time, "memory": memory})
    return Section(
        key="earlier",
        title="Against the earlier run",
        columns=[
            *CASE_COLUMNS,
            Column("time x earlier", "time", ".3f"),
            Column("memory x earlier", "memory", ".2f"),
        ],
        records=rows,
        notes=[f"Earlier: {earlier['command']} on {machine(earlier['environment'])}."],
    )


def grow(
    case: BackboneCase,
    builds: Mapping[str, Callable[[], nn.Module]],
    sizes: Sequence[int],
    repeats: int,
) -> Section:
    """Measure how the cost of blocks grows with the image size, alternately at each size.

    Args:
        case: settings of the measurement. Its build and image size are replaced, and its weights
            are not counted: they do not grow.
        builds: kind of block -> picklable callable that builds it.
        sizes: image sizes in pixels, at least two.
        repeats: rounds that count.

    Returns:
        A table; its values hold, for each kind of block, the points and the exponents with which
        time and memory grow with the image size.

    Raises:
        ValueError: ``repeats`` is not positive, or there are fewer than two sizes.
    """
    if len(set(sizes)) < 2:
        raise ValueError("a curve needs at least two image sizes")
    points: dict[str, list[dict[str, Any]]] = {kind: [] for kind in builds}
    for size in sizes:
        blocks = [
            replace(case, name=kind, build=build, image_size=size, count_model=False)
            for kind, build in builds.items()
        ]
        for each in measure(blocks, repeats, f"blocks at {size} x {size}"):
            point = {"block": f"{each.case.name} block", "image_size": size}
            points[each.case.name].append(point | each.record())
    values: dict[str, Any] = {
        kind: {
            "time_exponent": fitted_exponent(curve, "median_seconds"),
            "memory_exponent": fitted_exponent(curve, "peak_bytes"),
            "points": curve,
        }
        for kind, curve in points.items()
    }

    def power(exponent: float | None) -> str:
        return "an unknown number" if exponent is None else f"{exponent:.2f}"

    return Section(
        key="growth",
        title=f"One block of {case.name}: {STEPS[case.train]}, batch of {case.batch_size},"
        f" {case.precision}, {case.device}",
        columns=[
            Column("block", "block"),
            Column("pixels", "image_size"),
            Column("median ms", "median_seconds", ".4g", 1e3),
            Column("MiB", "peak_bytes", ".0f", 2**-20),
        ],
        records=[point for curve in points.values() for point in curve],
        notes=[
            *(
                f"{kind.capitalize()} blocks: time grows as the image size to the power of"
                f" {power(curve['time_exponent'])}, memory {power(curve['memory_exponent'])}."
                for kind, curve in values.items()
            ),
            "2 is proportional to the number of patches, 4 to the number of pairs of patches."
            " MiB: peak, without the weights.",
        ],
        values=values,
    )


def fitted_exponent(points: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The power p of value = a * image_size ** p that fits best, by least squares in logarithms.

    Args:
        points: records with "image_size" and, unless they failed, the value.
        key: of the value; points without a positive one are left out.

    Returns:
        p; None where fewer than two points are left.
    """
    known = [(point["image_size"], point[key]) for point in points if point.get(key)]
    if len(known) < 2:
        return None
    sizes, values = np.log(np.array(known, dtype=float)).T
    return float(np.polyfit(sizes, values, 1)[0])


def read_metrics(path: str | os.PathLike[str]) -> dict[str, float]:
    """The :data:`METRICS` in a results file of an evaluation.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has none of the metrics.
    """
    with open(path, encoding="utf-8") as file:
        results = json.load(file)["results"]
    found = {name: results.get(task, {}).get(key) for name, (task, key) in METRICS.items()}
    metrics = {name: value for name, value in found.items() if value is not None}
    if not metrics:
        raise ValueError(f"{path} has none of {', '.join(METRICS)}")
    return metrics


def summarize(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Mean and spread of every metric, and the lead of each start over the last one.

    Args:
        runs: start (initial weights) -> the metrics of its runs, one per seed, in the same order
            of seeds.

    Returns:
        start -> {metric: mean, "metric std": standard deviation over the seeds (0 for one),
        "metric lead": mean over the seeds of the difference to the last start, "metric lead std"},
        and with two seeds or more "metric lead margin": half the 95 % confidence interval of the
        lead, by Student's t.

    Raises:
        ValueError: the runs do not have the same metrics.
    """
    kinds = {tuple(result) for results in runs.values() for result in results}
    if len(kinds) > 1:
        raise ValueError(f"the runs have different metrics: {' and '.join(map(str, kinds))}")
    *_, reference = runs.values()
    summary: dict[str, dict[str, float]] = {}
    for start, results in runs.items():
        summary[start] = {}
        for metric in results[0]:
            values = [result[metric] for result in results]
            pairs = zip(results, reference, strict=True)
            leads = [result[metric] - other[metric] for result, other in pairs]
            for name, numbers in ((metric, values), (f"{metric} lead", leads)):
                summary[start][name] = statistics.fmean(numbers)
                summary[start][f"{name} std"] = statistics.stdev(numbers) if numbers[1:] else 0.0
            if leads[1:]:
                error = summary[start][f"{metric} lead std"] / math.sqrt(len(leads))
                margin = error * float(stats.t.ppf(0.975, len(leads) - 1))
                summary[start][f"{metric} lead margin"] = margin
    return summary


def comparison_table(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """:func:`summarize` as a table in Markdown: means with their standard deviation, then leads
    with their 95 % interval."""
    summary = summarize(runs)
    metrics = list(next(iter(runs.values()))[0])
    *starts, last = summary

    def mean(start: str, metric: str) -> str:
        return f"{summary[start][metric]:.1f} ± {summary[start][f'{metric} std']:.1f}"

    def lead(start: str, metric: str) -> str:
        value = summary[start][f"{metric} lead"]
        if f"{metric} lead margin" not in summary[start]:  # one seed
            return f"{value:+.1f}"
        margin = summary[start][f"{metric} lead margin"]
        return f"{value:+.1f} ({value - margin:+.1f} to {value + margin:+.1f})"

    rows = [[start, *(mean(start, metric) for metric in metrics)] for start in summary]
    rows += [
        [f"{start} - {last}", *(lead(start, metric) for metric in metrics)] for start in starts
    ]
    return tabulate(rows, headers=["", *metrics], tablefmt="pipe", disable_numparse=True)


def training_time(folder: str | os.PathLike[str]) -> tuple[int, float] | None:
    """Iterations of a run and the seconds that they took, by the metrics in its folder.

    A resumed run counts the iterations that its result is made of, once each.

    Returns:
        None if the metrics have no times: there is no run, or one of less than four iterations.
    """
    path = os.path.join(folder, "metrics.json")
    times = plots.read_metrics(path).get("time") if os.path.exists(path) else None
    if not times:
        return None
    iterations, seconds = 0, 0.0
    for iteration, time in times.items():
        # The median of the iterations since the line before.
        seconds += time * (iteration + 1 - iterations)
        iterations = iteration + 1
    return iterations, seconds
