"""The columns of the best numbers of each row, exactly and in order: PyTorch finds the smallest number that is still in,
two kernels share out the room among equals and write the columns. Nothing waits and nothing is sorted.

Numbers are compared as integers: ``ordered`` turns floats into such, which leaves room above and below for what is
forced in or out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.gpu.launch import launch

_BLOCK = 2048
_BLOCKS = 128  # whose counts are read in one go
FORCED = 2**31 - 1  # above every float
LEFT_OUT = -(2**31)  # below


@triton.jit
def ordered(x: tl.tensor) -> tl.tensor:
    """float32 as int32 of the same order: both zeros are equal, NaN is as low as -inf.

    By integers only, so that no compiler's idea of a float gets between.
    """
    number = x.to(tl.int32, bitcast=True)
    size = number & 0x7FFFFFFF
    number = tl.where(size > 0x7F800000, -2139095041, tl.where(number < 0, number ^ 0x7FFFFFFF, number))
    return tl.where(size == 0, 0, number)


@triton.jit(do_not_specialize=["total", "blocks"])
def count_best_kernel(
    numbers: tl.tensor, least: tl.tensor, counts: tl.tensor, total: tl.tensor, blocks: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Per block and row, how many numbers lie above the row's ``least`` and how many equal it: counts ``[2, H,
    blocks]``. Grid: blocks, rows.
    """
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < total
    bound = tl.load(least + row)
    number = tl.load(numbers + row * total + column, mask=inside, other=bound)
    place = counts + row * blocks + tl.program_id(0)
    tl.store(place, tl.sum((number > bound).to(tl.int32), 0))
    equal = inside & (number == bound)
    tl.store(place + tl.num_programs(1).to(tl.int64) * blocks, tl.sum(equal.to(tl.int32), 0))


@triton.jit(do_not_specialize=["total", "blocks", "wanted"])
def write_best_kernel(
    numbers: tl.tensor,
    least: tl.tensor,
    counts: tl.tensor,
    places: tl.tensor,
    total: tl.tensor,
    blocks: tl.tensor,
    wanted: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """The columns of the ``wanted`` best numbers, ascending; of those that equal ``least`` the first. Grid: blocks, rows."""
    row = tl.program_id(1).to(tl.int64)
    this = tl.program_id(0)
    above_counts = counts + row * blocks
    equal_counts = above_counts + tl.num_programs(1).to(tl.int64) * blocks
    all_above, above, equals = 0, 0, 0
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        found = tl.load(above_counts + block, mask=block < blocks, other=0)
        all_above += tl.sum(found, 0)
        above += tl.sum(tl.where(block < this, found, 0), 0)
        equals += tl.sum(tl.load(equal_counts + block, mask=block < this, other=0), 0)
    room = wanted - all_above  # for those that equal the least
    column = this * BLOCK + tl.arange(0, BLOCK)
    inside = column < total
    bound = tl.load(least + row)
    number = tl.load(numbers + row * total + column, mask=inside, other=bound)
    is_above = (number > bound).to(tl.int32)
    is_equal = (inside & (number == bound)).to(tl.int32)
    equal_before = equals + tl.cumsum(is_equal, 0) - is_equal
    above_before = above + tl.cumsum(is_above, 0) - is_above
    taken = (is_above > 0) | ((is_equal > 0) & (equal_before < room))
    place = above_before + tl.minimum(equal_before, room)
    tl.store(places + row * wanted + place, column.to(tl.int64), mask=taken)


def best_columns(numbers: Tensor, wanted: int) -> Tensor:
    """Columns of the ``wanted`` largest integers of each row ``[H, n]`` (dense), sorted: int64 ``[H, wanted]``. The
    lowest columns of equals.
    """
    rows, total = numbers.shape
    columns = torch.empty(rows, wanted, dtype=torch.long, device=numbers.device)
    if wanted == 0:
        return columns
    least = numbers.topk(wanted, dim=1, sorted=False).values.amin(1)
    blocks = -(-total // _BLOCK)
    counts = torch.empty(2, rows, blocks, dtype=torch.int32, device=numbers.device)
    grid = blocks, rows
    launch(count_best_kernel, grid, numbers, least, counts, total, blocks, BLOCK=_BLOCK, num_warps=4)
    launch(
        write_best_kernel,
        grid,
        numbers,
        least,
        counts,
        columns,
        total,
        blocks,
        wanted,
        BLOCK=_BLOCK,
        BLOCKS=_BLOCKS,
        num_warps=4,
    )
    return columns
