"""What ``crossmae-det benchmark-gpu`` measures: checks, backbones, detectors and pretraining steps.

:data:`FULL` has the sizes of the published models, for a GPU. :data:`SMALL` has tiny ones, to try
the command on a CPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from crossmae_det.benchmark import cases
from crossmae_det.benchmark.checks import ParityCase, ParityMeter, TestRun
from crossmae_det.benchmark.comparison import FEW_OBJECTS, BackboneCase
from crossmae_det.benchmark.groups import Entry, Group, Target
from crossmae_det.benchmark.measuring import PRECISIONS, Case
from crossmae_det.benchmark.pairs import PairMeter
from crossmae_det.benchmark.report import Column
from crossmae_det.benchmark.steps import GemmRate, TrainingStepCase, largest_linear_shapes
from crossmae_det.layers.attention_backends import BACKENDS, DEVICES

# Of a ViT-B or a ViT-L in detectron2, and in our form.
BASELINE = "detectron2-vit-{}"
OURS = "vit-{}"
COMPILED = "compiled"

MAE = "pretraining/mae_vit_{}_800ep.py"
# By the fraction of patches that is predicted, the published one first.
CROSSMAE = {
    "0.25": "pretraining/crossmae_vit_{}_800ep.py",
    "0.75": "pretraining/crossmae_vit_{}_800ep_pred75.py",
}

TIME_COLUMNS = (
    Column("median ms (range)", "milliseconds", ".4g"),
    Column("images/s", "images_per_second", ".4g"),
    Column("MiB", "peak_bytes", ".0f", 2**-20),
    Column("time x baseline (range)", "time_ratio"),
    Column("memory x", "memory_ratio", ".2f"),
    Column("kernels", "kernel_count"),
    Column("busy", "busy", ".2f"),
)

ROUNDS = "Each case and its baseline, the {}, were measured alternately in one process."
COMMON_NOTES = (
    "MiB: peak of CUDA's allocator for this model; not measured on a CPU.",
    "Kernels: of one call, by torch's profiler, and the part of the time that the device is busy"
    " with them; the JSON lists the longest. Not measured on a CPU.",
)


@dataclass(frozen=True)
class Scale:
    """Sizes of what is measured.

    Attributes:
        vits: sizes of the backbones, as in :data:`crossmae_det.modeling.SIZES`.
        image_size: of backbones and detectors, in pixels.
        batch_sizes: of backbones, by size.
        detector_batch_size: of detectors, around the first of ``vits``.
        detector_options: overrides of the detector's config.
        pretraining: size in the names of the configs -> images of a step.
        pretraining_options: overrides of the pretraining configs.
        parity_grids: side of the grid in patches -> number of windows or images.
        seconds: of rounds, for each case.
        targets: whether the targets apply.
        compiled: whether backbones are compiled as well. It takes a CPU minutes.
    """

    vits: tuple[str, ...]
    image_size: int
    batch_sizes: dict[str, int]
    detector_batch_size: int
    pretraining: dict[str, int]
    parity_grids: dict[int, int]
    seconds: float
    targets: bool
    compiled: bool
    detector_options: tuple[str, ...] = ()
    pretraining_options: tuple[str, ...] = ()


FULL = Scale(
    vits=("base", "large"),
    image_size=1024,
    batch_sizes={"base": 4, "large": 2},
    detector_batch_size=2,
    pretraining={"b": 256, "l": 128},
    parity_grids={14: 16, 64: 1},
    seconds=4.0,
    targets=True,
    compiled=True,
)

SMALL = Scale(
    vits=("tiny",),
    image_size=128,
    batch_sizes={"tiny": 1},
    detector_batch_size=1,
    detector_options=(
        "model.proposal_generator.post_nms_topk=[20,20]",
        "model.roi_heads.batch_size_per_image=16",
        "model.roi_heads.mask_head.conv_dims=[16,16]",
        "model.roi_heads.box_head.conv_dims=[16]",
        "model.roi_heads.box_head.fc_dims=[32]",
    ),
    pretraining={"s": 4},
    pretraining_options=(
        "dataloader.image_size=64",
        "model.encoder.embed_dim=48",
        "model.encoder.depth=2",
        "model.encoder.num_heads=3",
        "model.decoder_dim=32",
        "model.decoder_depth=2",
        "model.decoder_num_heads=2",
    ),
    parity_grids={14: 2, 16: 1},
    seconds=0.5,
    targets=False,
    compiled=False,
)

# Smallest memory in GiB for which the batch sizes of FULL are kept; with less, they are divided.
FULL_MEMORY = 70


def full_scale(memory: float) -> Scale:
    """:data:`FULL`, with batches that fit into the memory of a GPU.

    detectron2's ViT needs about 13 GiB for each image of a training step of a ViT-B at 1024 pixels.

    Args:
        memory: in GiB.
    """
    divisor = 1
    while memory * divisor < FULL_MEMORY and divisor < 4:
        divisor *= 2

    def fitting(batch: int) -> int:
        return max(1, batch // divisor)

    return replace(
        FULL,
        batch_sizes={size: fitting(batch) for size, batch in FULL.batch_sizes.items()},
        detector_batch_size=fitting(FULL.detector_batch_size),
        pretraining={size: fitting(batch) for size, batch in FULL.pretraining.items()},
    )


def plan(scale: Scale, device: str) -> list[Group]:
    """The groups of :func:`.groups.run_groups`, in the order in which they run.

    Args:
        scale: sizes.
        device: "cpu" or "cuda".
    """
    first, *others = scale.vits
    letters = list(scale.pretraining)
    groups = [
        parity_group(scale, device),
        backbone_group(scale, first, device, share=0.22),
        detector_group(scale, first, device, share=0.11),
        *(pretraining_group(scale, letter, device, share=0.16) for letter in letters),
        *(backbone_group(scale, size, device, share=0.11) for size in others),
    ]
    if device == "cuda":
        groups.append(test_group())
    return groups


def test_group() -> Group:
    """The tests that need a GPU. They come last: they can be run without the benchmark."""
    return Group(
        key="tests",
        title="Tests that need a GPU",
        entries=[Entry({"tests": "pytest -m cuda"})],
        build=TestRun,
        seconds=float("inf"),
        share=0.16,
        columns=[
            Column("tests", "tests"),
            Column("passed", "passed"),
            Column("failed", "failed"),
            Column("skipped", "skipped"),
            Column("seconds", "seconds", ".0f"),
        ],
        notes=["The JSON has the names of failed tests, as `failures`."],
    )


test_group.__test__ = False  # type: ignore[attr-defined]


def parity_group(scale: Scale, device: str) -> Group:
    """Attention backends in bf16 and fp16 against the definition in float64."""
    backends = [name for name in BACKENDS if name != "auto" and DEVICES.get(name, device) == device]
    parities = [
        ParityCase(backend, precision, count, 2, 64, (side, side))
        for side, count in scale.parity_grids.items()
        for precision in ("bf16", "fp16")
        for backend in backends
    ]
    return Group(
        key="parity",
        title="Attention backends against the definition in float64: relative errors",
        entries=[
            Entry(
                {
                    "backend": parity.backend,
                    "precision": parity.precision,
                    "grid": "x".join(map(str, parity.grid)),
                }
            )
            for parity in parities
        ],
        build=partial(ParityMeter, parities, device),
        seconds=0,
        share=0.1,
        columns=[
            Column("backend", "backend"),
            Column("type", "precision"),
            Column("grid", "grid"),
            Column("output, mean", "output_mean", ".2e"),
            Column("output, max", "output_max", ".2e"),
            Column("gradients, mean", "gradient_mean", ".2e"),
            Column("gradients, max", "gradient_max", ".2e"),
        ],
        notes=[
            "Mean: norm of the error over the norm of the reference; max: largest error over the"
            " largest entry. Gradients: the worst of queries, keys, values and tables. Windows of"
            " ViTDet have a grid of 14x14, global blocks at 1024 pixels one of 64x64."
        ],
    )


def backbone_group(scale: Scale, size: str, device: str, share: float) -> Group:
    """Backbones: detectron2's ViT, and ours with every backend, compiled and not; training steps
    and forward passes."""
    baseline, ours = BASELINE.format(size), OURS.format(size)
    backends = [name for name in ("flex", "sdpa", "eager") if DEVICES.get(name, device) == device]
    variants = [f"{ours}@{name}" for name in backends]
    # The targets first. A compiled case takes many times as long as another.
    order = [
        (train, [(ours, False), (ours, True)], (2.5, 0.4) if train and scale.targets else None)
        for train in (True, False)
    ]
    order += [(train, [(name, False) for name in variants], None) for train in (True, False)]
    compiled = [(name, True) for name in (*variants[:1], baseline, *variants[1:])]
    order += [(train, compiled, None) for train in (True, False)]

    pairs = _Pairs()
    for train, names, limits in order:

        def case(name: str, train: bool = train, compiled: bool = False) -> BackboneCase:
            return BackboneCase(
                name=name,
                build=partial(cases.build, name, "alone", scale.image_size),
                batch_size=scale.batch_sizes[size],
                precision="bf16",
                device=device,
                part="alone",
                image_size=scale.image_size,
                train=train,
                compiled=compiled,
            )

        mode = MODES[train]
        first = pairs.baseline({"case": baseline, "mode": mode}, case(baseline))
        targets: tuple[Target, ...] = ()
        if limits:
            targets = (
                Target("speed x detectron2", "speed_ratio", limits[0]),
                Target("memory x detectron2", "memory_ratio", limits[1], at_least=False),
            )
        for name, is_compiled in names:
            if is_compiled and not scale.compiled:
                continue
            labels = {"case": _label(name, is_compiled), "mode": mode}
            pairs.add(labels, case(name, compiled=is_compiled), first, targets)
    title = f"Backbones: ViT-{size}, {scale.image_size} pixels, batch of {scale.batch_sizes[size]}"
    return Group(
        key=f"backbones-{size}",
        title=f"{title}, bf16",
        columns=[Column("backbone", "case"), Column("measured", "mode"), *TIME_COLUMNS],
        notes=[
            f"Step: forward, backward and fused AdamW. {ROUNDS.format('ViT of detectron2')}",
            *COMMON_NOTES,
        ],
        sort_by="mode",
        **pairs.options(scale.seconds, share),
    )


# By whether it is a training step.
MODES = {True: "step", False: "forward"}


def detector_group(scale: Scale, size: str, device: str, share: float) -> Group:
    """Mask R-CNN with ViTDet's heads around detectron2's backbone and around ours."""
    pairs = _Pairs()
    for train in (True, False):

        def case(name: str, compiled: bool = False, train: bool = train) -> BackboneCase:
            options = scale.detector_options
            return BackboneCase(
                name=name,
                build=partial(cases.build, name, "detector", scale.image_size, options),
                batch_size=scale.detector_batch_size,
                precision="bf16",
                device=device,
                part="detector",
                image_size=scale.image_size,
                train=train,
                compiled=compiled,
            )

        baseline, ours, mode = BASELINE.format(size), OURS.format(size), MODES[train]
        first = pairs.baseline({"case": baseline, "mode": mode}, case(baseline))
        targets: tuple[Target, ...] = ()
        if train and scale.targets:
            targets = (Target("speed x detectron2", "speed_ratio", 1.6),)
        pairs.add({"case": ours, "mode": mode}, case(ours), first, targets)
        if scale.compiled:
            labels = {"case": _label(ours, True), "mode": mode}
            pairs.add(labels, case(ours, compiled=True), first, targets)
    title = f"Mask R-CNN: ViT-{size}, {scale.image_size} pixels"
    return Group(
        key="detector",
        title=f"{title}, batch of {scale.detector_batch_size}, bf16",
        columns=[Column("backbone", "case"), Column("measured", "mode"), *TIME_COLUMNS],
        notes=[
            "The whole detector, in a training step (forward, backward and fused AdamW) and in a"
            " forward pass, with random weights on noise; compiled: the backbone with its pyramid."
            f" {ROUNDS.format('detector around the ViT of detectron2')}",
            *COMMON_NOTES,
            FEW_OBJECTS,
        ],
        sort_by="mode",
        **pairs.options(scale.seconds, share),
    )


# Largest time of a step of CrossMAE that predicts a quarter of the patches, over that of MAE.
STEP_TARGETS = {"b": 0.68, "l": 0.88}
EFFICIENCY_TARGET = 0.5


def pretraining_group(scale: Scale, size: str, device: str, share: float) -> Group:
    """Training steps of MAE and CrossMAE, compiled and not."""
    batch = scale.pretraining[size]
    options = [f"dataloader.train.total_batch_size={batch}", *scale.pretraining_options]
    configs = {"MAE": MAE} | {f"CrossMAE {ratio}": name for ratio, name in CROSSMAE.items()}
    builds = {
        name: partial(cases.pretraining_spec, device, config.format(size), options)
        for name, config in configs.items()
    }
    pairs = _Pairs()
    for compiled in (False, True):
        efficient = Target("rate x bf16 GEMMs", "efficiency", EFFICIENCY_TARGET)
        first = None
        for name, build in builds.items():
            case = TrainingStepCase(
                name=name,
                build=build,
                batch_size=batch,
                precision="bf16",
                device=device,
                compiled=compiled,
            )
            targets: tuple[Target, ...] = (efficient,) if compiled and scale.targets else ()
            if scale.targets and name == "CrossMAE 0.25":
                limit = STEP_TARGETS[size]
                targets = (Target("time x MAE", "time_ratio", limit, at_least=False), *targets)
            labels = {"case": _label(name, compiled)}
            if first is None:
                first = pairs.baseline(labels, case, targets)
            else:
                pairs.add(labels, case, first, targets)
    return Group(
        key=f"pretraining-{size}",
        title=f"Pretraining step: ViT-{size.upper()}, batch of {batch}, bf16",
        columns=[
            Column("method", "case"),
            Column("GFLOPs", "flops", ".4g", 1e-9),
            *TIME_COLUMNS,
            Column("rate x GEMMs (range)", "efficiency"),
        ],
        notes=[
            "Step: forward, backward and optimizer, of uint8 images; the number after CrossMAE is"
            " the fraction of patches that it predicts."
            f" {ROUNDS.format('MAE, compiled for compiled ones')}",
            "Rate: FLOP/s of the step over those of bf16 matrix products with the shapes of the"
            " largest linear layers, measured before and after.",
            *COMMON_NOTES,
        ],
        **pairs.options(
            scale.seconds,
            share,
            partial(gemm_rate, list(builds.values()), batch, "bf16", device),
        ),
    )


def gemm_rate(builds: Sequence[Callable], batch: int, precision: str, device: str) -> GemmRate:
    """Measures GEMMs with the shapes of the largest linear layers of some models.

    Args:
        builds: each returns a :class:`ModelSpec`.
        batch: images of a step.
        precision: a key of ``PRECISIONS``.
        device: "cpu" or "cuda".
    """
    shapes = [shape for build in builds for shape in largest_linear_shapes(build(), batch)]
    return GemmRate(shapes, torch.device(device), PRECISIONS[precision])


def _label(name: str, compiled: bool) -> str:
    return f"{name} {COMPILED}" if compiled else name


class _Pairs:
    """Cases and their entries, as they are added."""

    def __init__(self) -> None:
        self.cases: list[Case] = []
        self.entries: list[Entry] = []

    def add(
        self,
        labels: dict[str, str],
        case: Case,
        baseline: int | None,
        targets: tuple[Target, ...] = (),
    ) -> None:
        self.cases.append(case)
        self.entries.append(Entry(labels, baseline, targets))

    def baseline(self, labels: dict[str, str], case: Case, targets: tuple[Target, ...] = ()) -> int:
        """The index of a case that others are compared with; it is added once."""
        for index, entry in enumerate(self.entries):
            if entry.labels == labels:
                return index
        self.add(labels, case, None, targets)
        return len(self.entries) - 1

    def options(
        self, seconds: float, share: float, reference: Callable[[], GemmRate] | None = None
    ) -> dict[str, Any]:
        """Arguments of the :class:`Group`."""
        on_gpu = self.cases[0].device == "cuda"
        return {
            "entries": self.entries,
            "build": partial(PairMeter, self.cases, reference, profiled=on_gpu),
            "seconds": seconds,
            "share": share,
            "preload": (__name__,),
        }
