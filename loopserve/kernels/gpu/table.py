"""Numbers of the host that a kernel reads from memory: places of tensors, strides and lengths of sessions that differ."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNED = 16  # bytes that are read at once


def place(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> int:
    """Give the address of a tensor's first number, for a kernel that is told its strides by a table.

    Raise ValueError unless the kernel would read such numbers there, those of the last dimension side by side.
    """
    if tensor.dtype is not dtype or tensor.device != device or tensor.stride(-1) != 1 or tensor.is_neg():
        held = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {list(tensor.stride())}"
        raise ValueError(f"{name} must be {dtype} on {device}, dense in the last dimension; got {held}")
    return tensor.data_ptr()


def uploaded(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Bring int64 numbers to a device without waiting for it."""
    found = torch.frombuffer(array("q", numbers), dtype=torch.int64)
    return found if device.type == "cpu" else found.pin_memory().to(device, non_blocking=True)


def aligned(table: Sequence[Sequence[int]], places: slice, strides: slice, element_size: int) -> int:
    """By how many numbers all strides in the rows of a table divide, if rows begin where the device reads 16 bytes at once; else 0.

    Of a place that a kernel loads by itself the compiler knows nothing, unless it is told.
    """
    step = _ALIGNED // element_size
    good = all(
        not any(each % _ALIGNED for each in row[places]) and not any(each % step for each in row[strides])
        for row in table
    )
    return step if good else 0
