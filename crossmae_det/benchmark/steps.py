"""Training steps of pretraining models: their time, and how close it is to the speed of GEMMs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer

from crossmae_det.benchmark.costs import ModelSpec, step_flops
from crossmae_det.benchmark.measuring import (
    MEMORY_NOTES,
    PRECISIONS,
    Case,
    Measurement,
    Spread,
    measure,
)
from crossmae_det.benchmark.report import Column, Section
from crossmae_det.engine.trainer import training_step

# GEMMs of each shape in a measurement. All of them count, as all GEMMs of a step do: on a shared
# machine, the time of the fastest one is luck.
ATTEMPTS = 3
# On a GPU they take a fraction of a millisecond.
CUDA_ATTEMPTS = 50

SHAPES_PER_MODEL = 2


class Shape(NamedTuple):
    """A GEMM (rows, inner) x (inner, columns), as in a linear layer."""

    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns

    def __str__(self) -> str:
        return f"{self.rows}x{self.inner}x{self.columns}"


def largest_linear_shapes(spec: ModelSpec, batch_size: int) -> list[Shape]:
    """The largest linear layers in the forward pass of a batch, in a transformer the MLP's.

    Returns:
        Different shapes, most FLOPs first; at most ``SHAPES_PER_MODEL``.
    """
    model = spec.build_on_meta()
    shapes: set[Shape] = set()

    def note(linear: nn.Linear, _: tuple[Tensor], output: Tensor) -> None:
        rows = output.numel() // linear.out_features
        shapes.add(Shape(rows, linear.in_features, linear.out_features))

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(spec.images(batch_size, "meta"))
    return sorted(shapes, key=lambda shape: (-shape.flops, shape))[:SHAPES_PER_MODEL]


class GemmRate:
    """Measures the FLOP/s of GEMMs whose weights are laid out like those of a linear layer.

    Args:
        shapes: of the GEMMs.
        device: of the matrices.
        dtype: of the matrices.
    """

    def __init__(self, shapes: Iterable[Shape], device: torch.device, dtype: torch.dtype):
        self.shapes = list(dict.fromkeys(shapes))
        self.attempts = CUDA_ATTEMPTS if device.type == "cuda" else ATTEMPTS
        self._operands = [
            (
                torch.randn(shape.rows, shape.inner, device=device, dtype=dtype),
                torch.randn(shape.columns, shape.inner, device=device, dtype=dtype).t(),
                torch.empty(shape.rows, shape.columns, device=device, dtype=dtype),
            )
            for shape in self.shapes
        ]

    def __call__(self) -> float:
        """FLOPs of all GEMMs over their seconds."""
        start = timer()
        for _ in range(self.attempts):
            for x, weight, out in self._operands:
                torch.mm(x, weight, out=out)
        return self.attempts * sum(shape.flops for shape in self.shapes) / (timer() - start)


@dataclass(frozen=True, kw_only=True)
class TrainingStepCase(Case):
    """Forward and backward pass of a batch of uint8 images, and the optimizer step.

    Attributes:
        build: returns the :class:`ModelSpec`.
        flops: FLOPs of forward and backward pass; 0 counts them where they are needed.
        compiled: compile the model.
    """

    build: Callable[[], ModelSpec]
    flops: int = 0
    compiled: bool = False

    def prepare(self) -> Callable[[], None]:
        torch.manual_seed(0)
        spec = self.build()
        with torch.device(self.device):  # initialized there: a CPU takes seconds for a ViT-L
            model = spec.build().to(self.device).train()
        if self.compiled:
            # Static: models that are compiled in one process differ in their ratios.
            model.compile(dynamic=False)
        images = spec.images(self.batch_size, "cpu")
        if self.device == "cuda":
            images = images.pin_memory()  # as the loader does
        return partial(self.step, model, spec.optimizer(model), images)

    def count_flops(self) -> int:
        return self.flops or step_flops(self.build(), self.batch_size)

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
        """One training step. The gradients are freed at the end, while other models run."""

        def forward(images: Tensor) -> dict[str, Tensor]:
            with self.autocast():
                return model(images)

        training_step(images, forward, optimizer)
        optimizer.zero_grad()


def time_steps(
    builds: Sequence[Callable[[], ModelSpec]],
    *,
    batch_size: int,
    precision: str,
    repeats: int,
    device: torch.device,
) -> Section:
    """Time training steps alternately, each model in a process of its own.

    Args:
        builds: at least one; each returns the spec of a model, is called here and in the process
            of the model, and is picklable.
        batch_size: images of a step.
        precision: a key of ``PRECISIONS``: of the GEMMs and, by autocast, of the models.
        repeats: steps of each model that count.
        device: device of the models and the GEMMs.

    Returns:
        The table of :func:`step_section`.

    Raises:
        ValueError: a number out of range.
    """
    specs = [build() for build in builds]
    cases = [
        TrainingStepCase(
            name=spec.name,
            build=build,
            batch_size=batch_size,
            precision=precision,
            device=device.type,
            flops=step_flops(spec, batch_size),
        )
        for spec, build in zip(specs, builds, strict=True)
    ]
    shapes = [shape for spec in specs for shape in largest_linear_shapes(spec, batch_size)]
    gemm_rate = GemmRate(shapes, device, PRECISIONS[precision])
    return step_section(measure(cases, repeats, "training steps", gemm_rate), gemm_rate)


def step_section(
    measurements: Sequence[Measurement[TrainingStepCase]], gemm_rate: GemmRate
) -> Section:
    """Training steps as a table.

    Args:
        measurements: their references are FLOP/s of GEMMs; the first one is the baseline.
        gemm_rate: what measured them.
    """
    first = measurements[0]
    case = first.case
    records = []
    for measurement in measurements:
        record = {"name": measurement.case.name, "flops": measurement.case.flops}
        record |= measurement.record(first)
        if not measurement.failure:
            rounds = zip(measurement.seconds, measurement.references, strict=True)
            record["gemm_rates"] = measurement.references
            record["efficiency"] = Spread.of(
                [measurement.case.flops / rate / seconds for seconds, rate in rounds]
            )
        records.append(record)
    repeats = max(len(measurement.seconds) for measurement in measurements)
    notes = [
        f"{repeats} interleaved repeats; range: lowest to highest.",
        "Step: forward, backward and optimizer, of uint8 images; its GFLOPs are those of forward"
        " and backward, 2 FLOPs per multiply-add.",
        MEMORY_NOTES[case.device],
    ]
    rates = [rate for measurement in measurements for rate in measurement.references]
    names = [str(shape) for shape in gemm_rate.shapes]
    if rates:
        notes += [
            f"GEMMs in {case.precision}: {Spread.of([rate / 1e9 for rate in rates]):.1f} GFLOP/s,"
            f" measured before and after each step: {gemm_rate.attempts} each of"
            f" {', '.join(names)}.",
            "Efficiency: time of the step's GFLOPs at that rate, over the time of the step.",
        ]
    return Section(
        key="step",
        title=f"Training step: {case.precision}, batch of {case.batch_size}",
        columns=[
            Column("config", "name"),
            Column("GFLOPs", "flops", ".1f", 1e-9),
            Column("median s", "median_seconds", ".4g"),
            Column("p90 s", "p90_seconds", ".4g"),
            Column("images/s", "images_per_second", ".4g"),
            Column("MiB", "peak_bytes", ".0f", 2**-20),
            Column("time x first (range)", "time_ratio"),
            Column("memory x", "memory_ratio", ".2f"),
            Column("efficiency (range)", "efficiency"),
        ],
        records=records,
        notes=notes,
        values={
            "batch_size": case.batch_size,
            "precision": case.precision,
            "gemm_flops_per_second": Spread.of(rates) if rates else None,
            "gemm_shapes": names,
            "steps": records,
        },
    )
