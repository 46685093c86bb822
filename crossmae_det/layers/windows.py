"""Partition of a token map into square windows, and back.

Legend: N images, H x W tokens, C channels, S window side, K = ceil(H / S) * ceil(W / S) windows of
an image.
"""

import torch.nn.functional as F
from torch import Tensor


def window_partition(x: Tensor, size: int) -> Tensor:
    """Cut a token map into windows that do not overlap.

    A map that the window does not divide is padded with zeros at the bottom and on the right. The
    padding takes part in the attention, as in ViTDet: weights trained there expect it.

    Args:
        x: (N, H, W, C).
        size: window side S in tokens.

    Returns:
        (N * K, S * S, C), the windows of one image in row-major order.
    """
    n, height, width, channels = x.shape
    pad_h, pad_w = -height % size, -width % size
    if pad_h or pad_w:
        x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
    rows, columns = (height + pad_h) // size, (width + pad_w) // size
    x = x.view(n, rows, size, columns, size, channels).transpose(2, 3)
    return x.reshape(n * rows * columns, size * size, channels)


def window_unpartition(windows: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
    """Put the windows of :func:`window_partition` together again and drop the padding.

    Args:
        windows: (N * K, S * S, C).
        size: window side S in tokens.
        grid: (H, W) of the map before it was partitioned.

    Returns:
        (N, H, W, C).
    """
    height, width = grid
    rows, columns = -(-height // size), -(-width // size)
    x = windows.view(-1, rows, columns, size, size, windows.shape[-1]).transpose(2, 3)
    x = x.reshape(-1, rows * size, columns * size, windows.shape[-1])
    return x[:, :height, :width]
