"""Large tensors in large pages: with pages of 4 KiB, the first touch of each and every scattered read cost more than the work."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

from torch import Tensor

_LARGE = 4 << 20  # bytes from which it pays


def large_pages(tensor: Tensor) -> Tensor:
    """The tensor, fresh from its allocation, after asking the system to back it by large pages. Where that is not possible, nothing
    happens.
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
    """``madvise`` of the C library, or None where there are no large pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        found = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found
