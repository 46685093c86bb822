"""The memory of a process that computes on the CPU."""

import ctypes
import logging

import torch

logger = logging.getLogger(__name__)

# Of glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory(device: torch.device) -> bool:
    """On the CPU, let this process keep the memory that tensors free, for those that come after.

    glibc gives large blocks back to the kernel, and the next step's activations then cost a page
    fault and a page of zeros for every 4 KiB: a quarter of the time of a step of ViT-B on 32
    images. The price is that the process never becomes smaller than it was at its largest. On GPUs
    torch keeps memory by itself.

    Args:
        device: where the process computes.

    Returns:
        False where nothing has changed: on a GPU, and where the C library is not glibc.
    """
    if device.type != "cpu":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1)):
        logger.info("This C library cannot be told to keep freed memory: steps take longer")
        return False
    return True
