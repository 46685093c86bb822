"""The time of whole training steps, against each other and against the machine's products."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer

from crossmae_det.benchmark.candidate import Candidate, total_loss
from crossmae_det.benchmark.flops import step_flops
from crossmae_det.benchmark.gemm import ATTEMPTS, GemmRate, largest_linear_shapes
from crossmae_det.benchmark.report import Section
from crossmae_det.benchmark.timing import Spread, interleaved, ratios
from crossmae_det.benchmark.work import PRECISIONS


class Timing(NamedTuple):
    """Seconds of a step, and FLOP/s of the products measured right before and after it (mean)."""

    seconds: float
    gemm_rate: float


@dataclass(frozen=True)
class StepTimes:
    """The steps of one candidate.

    Attributes:
        name: of the candidate.
        flops: FLOPs of forward and backward pass of a step.
        timings: of each round.
    """

    name: str
    flops: int
    timings: list[Timing]

    @property
    def seconds(self) -> list[float]:
        return [timing.seconds for timing in self.timings]

    @property
    def median_seconds(self) -> float:
        return float(np.median(self.seconds))

    @property
    def p90_seconds(self) -> float:
        return float(np.percentile(self.seconds, 90))

    @property
    def efficiency(self) -> Spread:
        """Time that products of so many FLOPs would take, over the time of the step."""
        return Spread.of([self.flops / t.gemm_rate / t.seconds for t in self.timings])


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
    steps: list[StepTimes]

    @property
    def gemm_rate(self) -> Spread:
        """FLOP/s of the products, over the whole comparison."""
        return Spread.of([timing.gemm_rate for step in self.steps for timing in step.timings])


def time_steps(
    candidates: Sequence[Candidate],
    *,
    batch_size: int,
    precision: str,
    repeats: int,
    device: torch.device,
) -> StepComparison:
    """Time training steps, in turns: forward and backward pass and the optimizer, on uint8 images.

    All models and the states of their optimizers are in memory together.

    Args:
        candidates: at least one.
        batch_size: images of a step.
        precision: a key of ``PRECISIONS``: of the products alone and, by autocast, of the models.
        repeats: steps of each candidate that count.
        device: where.

    Raises:
        ValueError: a number out of range.
    """
    flops = [step_flops(candidate, batch_size) for candidate in candidates]
    shapes = [s for candidate in candidates for s in largest_linear_shapes(candidate, batch_size)]
    gemm_rate = GemmRate(shapes, device, PRECISIONS[precision])

    def measure(step: Callable[[], None]) -> Timing:
        before = gemm_rate()
        start = timer()
        step()
        seconds = timer() - start
        return Timing(seconds, (before + gemm_rate()) / 2)

    steps = [_prepare(candidate, batch_size, precision, device) for candidate in candidates]
    measured = interleaved([partial(measure, step) for step in steps], repeats, "training steps")
    return StepComparison(
        batch_size=batch_size,
        precision=precision,
        gemm_shapes=[str(shape) for shape in gemm_rate.shapes],
        steps=[
            StepTimes(candidate.name, count, timings)
            for candidate, count, timings in zip(candidates, flops, measured, strict=True)
        ],
    )


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, precision: str
) -> None:
    """One step of training; the gradients are gone afterwards, as other models wait their turn."""
    dtype = PRECISIONS[precision]
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = total_loss(model(images))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _prepare(
    candidate: Candidate, batch_size: int, precision: str, device: torch.device
) -> Callable[[], None]:
    """The training step of a candidate, ready to be called."""
    model = candidate.build().to(device).train()
    images = candidate.images(batch_size, "cpu")
    if device.type == "cuda":
        images = images.pin_memory()  # as the loader does
    return partial(training_step, model, candidate.optimizer(model), images, precision)


def step_section(comparison: StepComparison) -> Section:
    """The comparison as a table."""
    gemm, first = comparison.gemm_rate, comparison.steps[0]
    return Section(
        key="step",
        title=f"Training step: {comparison.precision}, batch of {comparison.batch_size}",
        headers=[
            *("config", "GFLOPs", "median s", "p90 s", "images/s"),
            *("time x first (range)", "efficiency (range)"),
        ],
        rows=[_row(step, first, comparison.batch_size) for step in comparison.steps],
        notes=[
            f"{len(first.timings)} repeats in turns; range: lowest to highest of them.",
            "Step: forward, backward and optimizer, of uint8 images; its GFLOPs are those of"
            " forward and backward, 2 FLOPs for each multiply-add.",
            f"Products of matrices in {comparison.precision}: {gemm.median / 1e9:.1f} GFLOP/s"
            f" ({gemm.low / 1e9:.1f} to {gemm.high / 1e9:.1f}), measured before and after each"
            f" step: {ATTEMPTS} each of {', '.join(comparison.gemm_shapes)}.",
            "Efficiency: the GFLOPs over that rate, over the time of the step.",
        ],
        values={
            "batch_size": comparison.batch_size,
            "precision": comparison.precision,
            "gemm_flops_per_second": asdict(gemm),
            "gemm_shapes": comparison.gemm_shapes,
            "steps": [_values(step, first, comparison.batch_size) for step in comparison.steps],
        },
    )


def _row(step: StepTimes, first: StepTimes, batch_size: int) -> list[str]:
    return [
        step.name,
        f"{step.flops / 1e9:.1f}",
        f"{step.median_seconds:.4g}",
        f"{step.p90_seconds:.4g}",
        f"{batch_size / step.median_seconds:.4g}",
        str(ratios(step.seconds, first.seconds)),
        str(step.efficiency),
    ]


def _values(step: StepTimes, first: StepTimes, batch_size: int) -> dict[str, Any]:
    return {
        "name": step.name,
        "flops": step.flops,
        "median_seconds": step.median_seconds,
        "p90_seconds": step.p90_seconds,
        "images_per_second": batch_size / step.median_seconds,
        "ratio_to_first": asdict(ratios(step.seconds, first.seconds)),
        "efficiency": asdict(step.efficiency),
        "timings": [timing._asdict() for timing in step.timings],
    }
