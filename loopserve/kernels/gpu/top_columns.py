"""Select the columns of the best numbers of each row, exactly and in order, without sorting and without synchronising.

PyTorch finds the smallest number that is selected. Two kernels then count the numbers per block and write the columns.

Numbers are compared as int32: ``ordered`` maps floats to integers and leaves the extreme values for columns that are
forced in or left out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.gpu.launch import launch, readable

_BLOCK = 2048
_RANKED = 1024  # columns per program of ``rank_columns_kernel``
_BLOCKS = 128  # blocks whose counts are read at once
FORCED = 2**31 - 1  # above every float
LEFT_OUT = -(2**31)  # below


@triton.jit
def ordered(x: tl.tensor) -> tl.tensor:
    """Map float32 to int32 of the same order: both zeros are equal, NaN equals -inf.

    Only integer operations are used, since a compiler may simplify float comparisons.
    """
    number = x.to(tl.int32, bitcast=True)
    size = number & 0x7FFFFFFF
    number = tl.where(size > 0x7F800000, -2139095041, tl.where(number < 0, number ^ 0x7FFFFFFF, number))
    return tl.where(size == 0, 0, number)


@triton.jit(do_not_specialize=["total", "blocks"])
def count_best_kernel(
    numbers: tl.tensor, least: tl.tensor, counts: tl.tensor, total: tl.tensor, blocks: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Count per block and row the numbers above ``least`` and those equal to it: counts ``[2, H, blocks]``.

    Grid: blocks, rows.
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
    """Write the columns of the ``wanted`` best numbers, ascending; of those equal to ``least`` the first.

    Grid: blocks, rows.
    """
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
    ties = wanted - all_above  # how many of those equal to the least are selected
    column = this * BLOCK + tl.arange(0, BLOCK)
    inside = column < total
    bound = tl.load(least + row)
    number = tl.load(numbers + row * total + column, mask=inside, other=bound)
    is_above = (number > bound).to(tl.int32)
    is_equal = (inside & (number == bound)).to(tl.int32)
    equal_before = equals + tl.cumsum(is_equal, 0) - is_equal
    above_before = above + tl.cumsum(is_above, 0) - is_above
    taken = (is_above > 0) | ((is_equal > 0) & (equal_before < ties))
    place = above_before + tl.minimum(equal_before, ties)
    tl.store(places + row * wanted + place, column.to(tl.int64), mask=taken)


def best_columns(numbers: Tensor, wanted: int) -> Tensor:
    """Return the columns of the ``wanted`` largest integers of each dense row ``[H, n]``, sorted: int64 ``[H,
    wanted]``.

    Of equal numbers the lowest columns win.
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


@triton.jit(do_not_specialize=["total", "sink_tokens", "recent_window"])
def rank_columns_kernel(
    scores: tl.tensor,
    first_valid: tl.tensor,
    numbers: tl.tensor,
    score_head: tl.tensor,
    total: tl.tensor,
    sink_tokens: tl.tensor,
    recent_window: tl.tensor,
    BLOCK: tl.constexpr,
    HAS_FILLER: tl.constexpr,
    FORCED: tl.constexpr,
    LEFT_OUT: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Rank columns.

    Grid: blocks of columns, heads. WIDE: numbers are int64, and forced columns keep their order among themselves.
    """
    head = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < total
    number = ordered(tl.load(scores + head * score_head + column, mask=inside, other=0.0).to(tl.float32))
    start = 0
    if HAS_FILLER:
        start = tl.load(first_valid + head).to(tl.int32)
    recent = column >= total - recent_window
    sink = column < start + sink_tokens
    if WIDE:
        rank = tl.where(recent, 2, tl.where(sink, 1, 0))
        rank = tl.where(column < start, -1, rank)
        tl.store(numbers + head * total + column, (rank.to(tl.int64) << 33) + number.to(tl.int64), mask=inside)
    else:
        number = tl.where(recent | sink, FORCED, number)
        tl.store(numbers + head * total + column, tl.where(column < start, LEFT_OUT, number), mask=inside)


def top_columns(
    scores: Tensor, budget: int, *, sink_tokens: int, recent_window: int, first_valid: Tensor | None
) -> Tensor:
    """Select columns on a GPU: scores become integers of the same order, with forced columns above and filler below all
    others.
    """
    scores = readable(scores)
    heads, total = scores.shape
    # The order among forced columns matters only where the budget is smaller than their number.
    wide = budget < min(sink_tokens, total) + min(recent_window, total)
    numbers = torch.empty(heads, total, dtype=torch.int64 if wide else torch.int32, device=scores.device)
    if budget:
        launch(
            rank_columns_kernel,
            (-(-total // _RANKED), heads),
            scores,
            numbers if first_valid is None else first_valid.contiguous(),
            numbers,
            scores.stride(0),
            total,
            min(sink_tokens, total),
            min(recent_window, total),
            BLOCK=_RANKED,
            HAS_FILLER=first_valid is not None,
            FORCED=FORCED,
            LEFT_OUT=LEFT_OUT,
            WIDE=wide,
            num_warps=4,
        )
    return best_columns(numbers, budget)
