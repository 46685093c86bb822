"""Augmentations that detectron2 does not have."""

import numpy as np
from detectron2.data import transforms as T
from timm.layers import to_2tuple


class ResizeToFit(T.Augmentation):
    """Resize an image, its shape kept, to the largest size that fits into a box.

    For a square box it is detectron2's ``ResizeShortestEdge`` with both of its sizes equal.

    Args:
        max_size: side of the box in pixels, int or (H, W).
    """

    def __init__(self, max_size: int | tuple[int, int]):
        super().__init__()
        self.max_size = to_2tuple(max_size)

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The transform of an image (H, W, C) of any type."""
        height, width = image.shape[:2]
        box_height, box_width = self.max_size
        # The shorter edge may become as long as that side of the box, if the longer one fits then.
        short, long = (box_height, box_width) if height <= width else (box_width, box_height)
        size = T.ResizeShortestEdge.get_output_shape(height, width, short, long)
        new_height, new_width = (max(1, side) for side in size)
        return T.ResizeTransform(height, width, new_height, new_width)
