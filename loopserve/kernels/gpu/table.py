"""Write tables that kernels load: addresses, strides and lengths of sessions that differ."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNED = 16  # bytes that are read at once


def place(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> int:
    """Return the address of a tensor's first number, for a kernel that loads the strides from a table.

    Raises ValueError unless dtype and device fit and the last dimension is dense.
    """
    if tensor.dtype is not dtype or tensor.device != device or tensor.stride(-1) != 1 or tensor.is_neg():
        held = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {list(tensor.stride())}"
        raise ValueError(f"{name} must be {dtype} on {device}, dense in the last dimension; got {held}")
    return tensor.data_ptr()


def uploaded(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Copy int64 numbers to a device without synchronising."""
    found = torch.frombuffer(array("q", numbers), dtype=torch.int64)
    return found if device.type == "cpu" else found.pin_memory().to(device, non_blocking=True)


def aligned(table: Sequence[Sequence[int]], places: slice, strides: slice, element_size: int) -> int:
    """Return by how many numbers all strides in the rows of a table divide, if addresses are multiples of 16 bytes;
    else 0.

    The compiler cannot derive the alignment of an address that a kernel loads, so it is passed as a constant.
    """
    step = _ALIGNED // element_size
    good = all(
        not any(each % _ALIGNED for each in row[places]) and not any(each % step for each in row[strides])
        for row in table
    )
    return step if good else 0


def by_session(whole: Tensor, heads: int, rows: list[int]) -> Sequence[Tensor]:
    """Return the rows ``[Hq, t, ...]`` of each session from ``[sessions * Hkv, group * most t, ...]``, as views where t
    is the same for all.
    """
    rest = whole.shape[2:]
    if rows.count(rows[0]) == len(rows):
        return whole.view(len(rows), heads, rows[0], *rest).unbind()
    parts = whole.view(len(rows), -1, *whole.shape[1:]).unbind()
    group = [heads // len(parts[0]) * count for count in rows]
    return [part[:, :own].reshape(heads, count, *rest) for part, own, count in zip(parts, group, rows, strict=True)]
