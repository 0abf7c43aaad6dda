"""Pass tensors to C, and back large ones with huge pages: the only module that takes the address of a tensor.

An address carries no dtype, layout or size. So each is checked here against what the C source expects.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

import torch
from torch import Tensor

MOST_COLUMNS = 2**31 - 2**16  # the C sources count columns in int32, some up to a tile past the last
_LARGE = 4 << 20  # bytes; below, the call for huge pages costs more than it saves


def rows_of(tensor: Tensor) -> Tensor:
    """Return the tensor if its last dimension is dense, else a copy with a dense last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def number_type(tensor: Tensor) -> torch.dtype:
    """Return the dtype of a tensor if the C sources support it. Raises ValueError for any other."""
    if tensor.dtype is torch.float32 or tensor.dtype is torch.bfloat16:
        return tensor.dtype
    raise ValueError(f"the compiled kernels read float32 and bfloat16, not {tensor.dtype}")


def address(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], *, strided: int = 0, written: bool = False
) -> int:
    """Return the address of a tensor's first number.

    Raises ValueError unless dtype, device, shape and strides fit the C kernel.

    strided: number of leading dimensions whose strides are passed to C. The other dimensions must be contiguous.
    written: C writes into the tensor, so no two of its numbers may share memory.
    """
    fits = tensor.dtype is dtype and tensor.shape == shape and tensor.is_cpu and not tensor.is_neg()
    if not fits or not (_dense_behind(tensor, strided, written) if strided else tensor.is_contiguous()):
        held = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {list(tensor.stride())}"
        layout = f"dense behind {strided} dimensions" if strided else "contiguous"
        raise ValueError(f"{name} must be {dtype} {list(shape)} on cpu, {layout}; got {held}")
    place = tensor.data_ptr()
    if not place and tensor.numel():
        raise ValueError(f"{name} {list(shape)} has no memory: its storage was freed")
    return place


def optional(
    name: str,
    tensor: Tensor | None,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    *,
    strided: int = 0,
    written: bool = False,
) -> int | None:
    """Return the address as ``address`` does, or None for None."""
    return None if tensor is None else address(name, tensor, dtype, shape, strided=strided, written=written)


def _dense_behind(tensor: Tensor, strided: int, written: bool) -> bool:
    """Return whether the dimensions after the first ``strided`` are contiguous."""
    if (
        not written and strided == tensor.dim() - 1 and tensor.stride(-1) == 1
    ):  # the common case, checked in every step of every layer
        return True
    expected = 1
    sizes, strides = tensor.shape, tensor.stride()
    for dim in range(tensor.dim() - 1, strided - 1, -1):
        if sizes[dim] != 1 and strides[dim] != expected:
            return False
        expected *= sizes[dim]
    # Where C writes, the leading dimensions must not overlap: a tensor that was expanded has strides of 0.
    if written:
        for dim in range(strided - 1, -1, -1):
            if sizes[dim] != 1 and strides[dim] < expected:
                return False
            expected = max(expected, sizes[dim] * strides[dim])
    return True


def large_pages(tensor: Tensor) -> Tensor:
    """Ask the system to back a newly allocated tensor with huge pages, and return the tensor.

    With 4 KiB pages, first touches and scattered reads cost more than the computation. Does
    nothing for small tensors, for other devices, or where the system has no huge pages.
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
