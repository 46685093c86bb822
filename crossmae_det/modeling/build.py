"""The trunk of a size."""

from dataclasses import asdict
from typing import Any

from crossmae_det.modeling.sizes import SIZES
from crossmae_det.modeling.vit import ViT


def size_arguments(size: str, **overrides: Any) -> dict[str, Any]:
    """Arguments of a trunk of the size table.

    Args:
        size: a name in :data:`crossmae_det.modeling.SIZES`.
        **overrides: further arguments, or others than the table's; None leaves the table's value or
            the default.

    Raises:
        ValueError: an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"unknown backbone size '{size}'; sizes are {', '.join(SIZES)}")
    given = {name: value for name, value in overrides.items() if value is not None}
    return asdict(SIZES[size]) | given


def build_vit(size: str = "base", **overrides: Any) -> ViT:
    """A trunk of the size table: :class:`ViT` with :func:`size_arguments`."""
    return ViT(**size_arguments(size, **overrides))
