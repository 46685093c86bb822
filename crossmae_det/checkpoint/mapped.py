"""Memory of tensors that lie in a mapped file."""

import ctypes
import mmap
import sys

from torch import Tensor

# <linux/mman.h>, since Linux 5.4. It moves memory out and never changes what is read.
MADV_PAGEOUT = 21


def release(tensor: Tensor) -> None:
    """Give back the memory that holds what has been read of a tensor in a mapped file.

    It would count as this process's for as long as the file is mapped: at the end of a load, the
    whole file beside the model. Read again, it comes from the file again. An advice: where the
    system does not know it, nothing happens.
    """
    if not sys.platform.startswith("linux") or not tensor.is_contiguous():
        return
    begin, page = tensor.data_ptr(), mmap.PAGESIZE
    first, last = -(-begin // page) * page, (begin + tensor.nbytes) // page * page  # whole pages
    if first < last:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_PAGEOUT
        )
