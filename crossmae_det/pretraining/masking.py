"""Random masking: which patches the encoder sees, and which ones the decoder predicts.

Legend: N images, L patches.
"""

from typing import NamedTuple

from torch import Tensor


class Masking(NamedTuple):
    """Patch indices (N, L_...) int64, ascending; each patch of an image is in exactly one."""

    visible: Tensor
    predicted: Tensor
    unseen: Tensor


def check_ratios(mask_ratio: float, prediction_ratio: float) -> None:
    """Refuse ratios that make no sense for any number of patches.

    Raises:
        ValueError: not 0 < prediction_ratio <= mask_ratio < 1.
    """
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio must lie between 0 and 1, both excluded; got {mask_ratio}")
    if not 0 < prediction_ratio <= mask_ratio:
        raise ValueError(
            f"prediction_ratio is a fraction of all patches, above 0 and at most the mask_ratio"
            f" {mask_ratio}; got {prediction_ratio}"
        )


def count_patches(length: int, mask_ratio: float, prediction_ratio: float) -> tuple[int, int, int]:
    """Numbers of visible, predicted and unseen patches.

    They are rounded as in the published implementation, in floats: ``int(L * (1 - mask_ratio))``
    visible, ``int(L * (mask_ratio - prediction_ratio))`` unseen, and the rest predicted, so that
    the three add up to L whatever the rounding did. A product that a float holds just below a
    whole number is one patch less, there and here: 20 * (1 - 0.9) is 1 visible patch, not 2.

    Args:
        length: number of patches L of an image.
        mask_ratio: fraction of all patches that the encoder does not see.
        prediction_ratio: fraction of all patches that the decoder predicts.

    Returns:
        (visible, predicted, unseen).

    Raises:
        ValueError: a ratio is out of range, or no patch is left visible or predicted.
    """
    check_ratios(mask_ratio, prediction_ratio)
    visible = int(length * (1 - mask_ratio))
    unseen = int(length * (mask_ratio - prediction_ratio))
    predicted = length - visible - unseen
    if not visible:
        raise ValueError(
            f"mask_ratio {mask_ratio} leaves none of {length} patches visible;"
            " lower it, or take larger images"
        )
    if not predicted:
        raise ValueError(
            f"prediction_ratio {prediction_ratio} leaves none of {length} patches predicted;"
            " raise it, or take larger images"
        )
    return visible, predicted, unseen


def mask_patches(noise: Tensor, mask_ratio: float, prediction_ratio: float) -> Masking:
    """Divide the patches of each image by the order of their noise.

    The lowest noise is visible, the highest predicted, what lies between is neither.

    Args:
        noise: (N, L), uniform in [0, 1) for a random masking.
        mask_ratio: fraction of all patches that the encoder does not see, in (0, 1).
        prediction_ratio: fraction of all patches that the decoder predicts, in (0, mask_ratio].

    Returns:
        The indices, ascending; how their numbers are rounded is in :func:`count_patches`.

    Raises:
        ValueError: a ratio is out of range, or no patch is left visible or predicted.
    """
    visible, predicted, unseen = count_patches(noise.shape[1], mask_ratio, prediction_ratio)
    order = noise.argsort(dim=1, stable=True)
    first, middle, last = (
        part.sort(dim=1).values for part in order.split([visible, unseen, predicted], dim=1)
    )
    return Masking(visible=first, predicted=last, unseen=middle)
