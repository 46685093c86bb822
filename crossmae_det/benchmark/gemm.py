"""How fast a machine multiplies matrices: what the time of a step is held against."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer

from crossmae_det.benchmark.candidate import Candidate

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
