"""Select columns on a GPU: scores become integers of the same order, with forced columns above and filler below all
others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.gpu.best import FORCED, LEFT_OUT, best_columns, ordered
from loopserve.kernels.gpu.launch import launch, readable

_BLOCK = 1024


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
    """See the package."""
    scores = readable(scores)
    heads, total = scores.shape
    # The order among forced columns matters only where the budget is smaller than their number.
    wide = budget < min(sink_tokens, total) + min(recent_window, total)
    numbers = torch.empty(heads, total, dtype=torch.int64 if wide else torch.int32, device=scores.device)
    if budget:
        launch(
            rank_columns_kernel,
            (-(-total // _BLOCK), heads),
            scores,
            numbers if first_valid is None else first_valid.contiguous(),
            numbers,
            scores.stride(0),
            total,
            min(sink_tokens, total),
            min(recent_window, total),
            BLOCK=_BLOCK,
            HAS_FILLER=first_valid is not None,
            FORCED=FORCED,
            LEFT_OUT=LEFT_OUT,
            WIDE=wide,
            num_warps=4,
        )
    return best_columns(numbers, budget)
