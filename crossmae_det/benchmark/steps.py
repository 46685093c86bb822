"""How fast a machine multiplies matrices: what the time of a step is held against.

The time of whole training steps, against each other and against the machine's products.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer

from crossmae_det.benchmark.costs import Candidate, step_flops
from crossmae_det.benchmark.measuring import MEMORY_NOTES, PRECISIONS, Outcome, Spread, measure
from crossmae_det.benchmark.report import Section
from crossmae_det.engine import trainer

# Products of each shape at a measurement. All of them count, as all of a step's do: on a shared
# machine the fastest one is luck.
ATTEMPTS = 3

SHAPES_PER_MODEL = 2


class Shape(NamedTuple):
    """A product (rows, inner) x (inner, columns), as of a linear map."""

    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns

    def __str__(self) -> str:
        return f"{self.rows}x{self.inner}x{self.columns}"


def largest_linear_shapes(candidate: Candidate, batch_size: int) -> list[Shape]:
    """The largest linear maps in the forward pass of a batch: of a transformer, its MLP's.

    Returns:
        Different shapes, the one with most FLOPs first; at most ``SHAPES_PER_MODEL``.
    """
    model = candidate.build_on_meta()
    shapes: set[Shape] = set()

    def note(linear: nn.Module, _: tuple[Tensor], output: Tensor) -> None:
        assert isinstance(linear, nn.Linear)
        rows = output.numel() // linear.out_features
        shapes.add(Shape(rows, linear.in_features, linear.out_features))

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(candidate.images(batch_size, "meta"))
    return sorted(shapes, key=lambda shape: (-shape.flops, shape))[:SHAPES_PER_MODEL]


class GemmRate:
    """Measures FLOP/s of products of matrices with weights that lie as those of a linear map.

    Args:
        shapes: those that are tried.
        device: where.
        dtype: of the matrices.
    """

    def __init__(self, shapes: Iterable[Shape], device: torch.device, dtype: torch.dtype):
        self.shapes = list(dict.fromkeys(shapes))
        self._operands = [
            (
                torch.randn(shape.rows, shape.inner, device=device, dtype=dtype),
                torch.randn(shape.columns, shape.inner, device=device, dtype=dtype).t(),
                torch.empty(shape.rows, shape.columns, device=device, dtype=dtype),
            )
            for shape in self.shapes
        ]

    def __call__(self) -> float:
        """FLOPs of all products over their seconds."""
        start = timer()
        for _ in range(ATTEMPTS):
            for x, weight, out in self._operands:
                torch.mm(x, weight, out=out)
        return ATTEMPTS * sum(shape.flops for shape in self.shapes) / (timer() - start)


@dataclass(frozen=True)
class StepWork:
    """Training steps of one candidate: forward and backward pass and the optimizer.

    Attributes:
        build: makes the candidate.
        batch_size: images of a step, uint8.
        precision: a key of ``PRECISIONS``, by autocast.
        device: "cpu" or "cuda".
    """

    build: Callable[[], Candidate]
    batch_size: int
    precision: str
    device: str
    count_model: ClassVar[bool] = True

    def prepare(self) -> Callable[[], None]:
        """The training step, ready to be called."""
        torch.manual_seed(0)
        candidate = self.build()
        model = candidate.build().to(self.device).train()
        images = candidate.images(self.batch_size, "cpu")
        if self.device == "cuda":
            images = images.pin_memory()  # as the loader does
        return partial(training_step, model, candidate.optimizer(model), images, self.precision)


@dataclass(frozen=True)
class Steps:
    """The steps of one candidate.

    Attributes:
        name: of the candidate.
        flops: FLOPs of forward and backward pass of a step.
        outcome: what was measured; its references are FLOP/s of products of matrices.
    """

    name: str
    flops: int
    outcome: Outcome[StepWork]

    @property
    def efficiency(self) -> Spread:
        """Time that products of so many FLOPs would take, over the time of the step."""
        rounds = zip(self.outcome.seconds, self.outcome.references, strict=True)
        return Spread.of([self.flops / rate / seconds for seconds, rate in rounds])


@dataclass(frozen=True)
class StepComparison:
    """Steps of several candidates, measured in turns.

    Attributes:
        batch_size: images of a step.
        precision: a key of ``PRECISIONS``.
        gemm_shapes: of the products that were measured, "rows x inner x columns".
        steps: one for each candidate, in order.
    """

    batch_size: int
    precision: str
    gemm_shapes: list[str]
    steps: list[Steps]

    @property
    def gemm_rate(self) -> Spread | None:
        """FLOP/s of the products, over the whole comparison; None if every step failed."""
        rates = [rate for step in self.steps for rate in step.outcome.references]
        return Spread.of(rates) if rates else None


def time_steps(
    builds: Sequence[Callable[[], Candidate]],
    *,
    batch_size: int,
    precision: str,
    repeats: int,
    device: torch.device,
) -> StepComparison:
    """Time training steps, in turns, each candidate in a process of its own.

    Args:
        builds: at least one; each makes a candidate, here and in its process, and is picklable.
        batch_size: images of a step.
        precision: a key of ``PRECISIONS``: of the products alone and, by autocast, of the models.
        repeats: steps of each candidate that count.
        device: where.

    Raises:
        ValueError: a number out of range.
    """
    candidates = [build() for build in builds]
    flops = [step_flops(candidate, batch_size) for candidate in candidates]
    shapes = [s for candidate in candidates for s in largest_linear_shapes(candidate, batch_size)]
    gemm_rate = GemmRate(shapes, device, PRECISIONS[precision])
    works = [StepWork(build, batch_size, precision, device.type) for build in builds]
    outcomes = measure(works, repeats, "training steps", gemm_rate)
    return StepComparison(
        batch_size=batch_size,
        precision=precision,
        gemm_shapes=[str(shape) for shape in gemm_rate.shapes],
        steps=[
            Steps(candidate.name, count, outcome)
            for candidate, count, outcome in zip(candidates, flops, outcomes, strict=True)
        ],
    )


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, precision: str
) -> None:
    """One step of training; the gradients are gone afterwards, as other models wait their turn."""
    dtype = PRECISIONS[precision]
    device = next(model.parameters()).device

    def forward(images: Tensor) -> dict[str, Tensor]:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(images)

    trainer.training_step(images, forward, optimizer)
    optimizer.zero_grad()


def step_section(comparison: StepComparison) -> Section:
    """The comparison as a table."""
    gemm, first = comparison.gemm_rate, comparison.steps[0].outcome
    notes = [
        f"{max(len(step.outcome.seconds) for step in comparison.steps)} repeats in turns; range:"
        " lowest to highest of them.",
        "Step: forward, backward and optimizer, of uint8 images; its GFLOPs are those of forward"
        " and backward, 2 FLOPs for each multiply-add.",
        MEMORY_NOTES[first.work.device],
    ]
    if gemm:
        notes += [
            f"Products of matrices in {comparison.precision}: {gemm.median / 1e9:.1f} GFLOP/s"
            f" ({gemm.low / 1e9:.1f} to {gemm.high / 1e9:.1f}), measured before and after each"
            f" step: {ATTEMPTS} each of {', '.join(comparison.gemm_shapes)}.",
            "Efficiency: the GFLOPs over that rate, over the time of the step.",
        ]
    values = [_values(step, first, comparison.batch_size) for step in comparison.steps]
    return Section(
        key="step",
        title=f"Training step: {comparison.precision}, batch of {comparison.batch_size}",
        headers=[
            *("config", "GFLOPs", "median s", "p90 s", "images/s", "MiB"),
            *("time x first (range)", "memory x", "efficiency (range)"),
        ],
        rows=[_row(step, row, first) for step, row in zip(comparison.steps, values, strict=True)],
        notes=notes,
        values={
            "batch_size": comparison.batch_size,
            "precision": comparison.precision,
            "gemm_flops_per_second": asdict(gemm) if gemm else None,
            "gemm_shapes": comparison.gemm_shapes,
            "steps": values,
        },
    )


def _row(step: Steps, values: dict[str, Any], first: Outcome[StepWork]) -> list[str]:
    start = [step.name, f"{step.flops / 1e9:.1f}"]
    if step.outcome.failure:
        return [*start, step.outcome.failure, *["-"] * 6]
    time, memory = step.outcome.against(first)
    return [
        *start,
        f"{values['median_seconds']:.4g}",
        f"{values['p90_seconds']:.4g}",
        f"{values['images_per_second']:.4g}",
        f"{step.outcome.bytes / 2**20:.0f}",
        "-" if time is None else str(time),
        "-" if memory is None else f"{memory:.2f}",
        str(step.efficiency),
    ]


def _values(step: Steps, first: Outcome[StepWork], batch_size: int) -> dict[str, Any]:
    outcome = step.outcome
    values = {"name": step.name, "flops": step.flops} | outcome.values(batch_size)
    if outcome.failure:
        return values
    time, memory = outcome.against(first)
    return values | {
        "ratio_to_first": asdict(time) if time else None,
        "memory_ratio": memory,
        "efficiency": asdict(step.efficiency),
        "gemm_rates": outcome.references,
    }
