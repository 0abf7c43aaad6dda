"""Convert flags to indices on the device, without reading how many are set."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.gpu.launch import launch

_BLOCK = 2048


@triton.jit(do_not_specialize=["length", "stride"])
def compact_kernel(
    flags: tl.tensor, starts: tl.tensor, indices: tl.tensor, length: tl.tensor, stride: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Write the indices of the set flags of one row, from ``starts`` on. Grid: rows."""
    row = tl.program_id(0)
    place = tl.load(starts + row)
    for begin in range(0, length, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        flag = tl.load(flags + row.to(tl.int64) * stride + index, mask=index < length, other=0).to(tl.int32)
        upto = tl.cumsum(flag, 0)
        tl.store(indices + place + upto - flag, index, mask=flag != 0)
        place += tl.sum(flag, 0)


def compacted(flags: Tensor, starts: Tensor, indices: Tensor) -> Tensor:
    """Fill ``indices`` int32 with the ascending indices of the set flags bool ``[R, n]``, row r from ``starts[r]``
    (int64) on.
    """
    block = min(_BLOCK, max(16, 1 << (flags.shape[1] - 1).bit_length()))
    launch(
        compact_kernel,
        (flags.shape[0],),
        flags.view(torch.uint8),
        starts,
        indices,
        flags.shape[1],
        flags.stride(0),
        BLOCK=block,
        num_warps=4,
    )
    return indices


def compacted_rows(flags: Tensor, capacity: int, filler: int) -> Tensor:
    """Return the indices of the set flags as a table int32 ``[R, capacity]``, padded with ``filler``.

    No row may have more than ``capacity`` set flags.
    """
    indices = torch.full((flags.shape[0], capacity), filler, dtype=torch.int32, device=flags.device)
    starts = torch.arange(flags.shape[0], device=flags.device) * capacity
    return compacted(flags, starts, indices)
