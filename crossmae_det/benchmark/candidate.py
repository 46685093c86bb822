"""What is compared: a model by name, made where and when it is needed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn


@dataclass(frozen=True)
class Candidate:
    """A model under comparison.

    Attributes:
        name: for the tables.
        build: makes the model, which maps images to a dictionary of losses, on torch's default
            device.
        optimizer: makes the optimizer of a model.
        image_size: side of its images in pixels, int or (H, W).
    """

    name: str
    build: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    image_size: int | tuple[int, int]

    def build_on_meta(self) -> nn.Module:
        """The model without its numbers: all of its shapes, in no time and no memory."""
        with torch.device("meta"):
            return self.build()

    def images(self, count: int, device: torch.device | str) -> Tensor:
        """A batch of noise, as a loader gives it: (N, 3, H, W) uint8.

        Raises:
            ValueError: ``count`` is not positive.
        """
        if count < 1:
            raise ValueError(f"the batch size must be at least 1, got {count}")
        shape = (count, 3, *to_2tuple(self.image_size))
        return torch.randint(256, shape, dtype=torch.uint8, device=device)


def total_loss(losses: dict[str, Tensor]) -> Tensor:
    """The sum of a model's losses, which training minimises: a scalar."""
    return torch.stack([*losses.values()]).sum()
