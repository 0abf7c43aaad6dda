"""Back large tensors with huge pages: with 4 KiB pages, first touches and scattered reads cost more than the
computation.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

from torch import Tensor

_LARGE = 4 << 20  # bytes; below, the call costs more than it saves


def large_pages(tensor: Tensor) -> Tensor:
    """Ask the system to back a newly allocated tensor with huge pages, and return the tensor.

    Does nothing for small tensors, for other devices, or where the system has no huge pages.
    """
    size = tensor.untyped_storage().nbytes()
    if size >= _LARGE and tensor.device.type == "cpu":
        advise = _advise()
        if advise is not None:
            start = -(-tensor.untyped_storage().data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            advise(start, size - 2 * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    return tensor


@cache
def _advise() -> Any:
    """Return ``madvise`` of the C library, or None where there are no huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        found = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found
