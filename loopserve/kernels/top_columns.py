"""Select the columns with the best scores of each head."""

from __future__ import annotations

import torch
from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.backend import check_first_valid
from loopserve.kernels.native import columns

_OPERATION = backend.operation(
    "top_columns", cpu="native.columns", triton="gpu.top_columns", limits={"cpu": columns.limit}
)


def top_columns(
    scores: Tensor, budget: int, *, sink_tokens: int = 0, recent_window: int = 0, first_valid: Tensor | None = None
) -> Tensor:
    """Return the columns of the ``budget`` best scores per head, sorted: int64 ``[H, min(budget, n)]``.

    scores ``[H, n]``: any float dtype; NaN counts as lowest. The first ``sink_tokens`` and the last ``recent_window``
    columns are always selected; recent ones win where the budget is smaller than both. Of equal scores the lowest
    column wins. first_valid ``[H]``: columns before it are filler; every head must have at least ``budget`` others.
    Raises ValueError for arguments that do not fit together.
    """
    if scores.dim() != 2:
        raise ValueError(f"top_columns: scores {list(scores.shape)} must be [H, n]")
    if min(budget, sink_tokens, recent_window) < 0:
        raise ValueError(
            f"top_columns: budget={budget}, sink_tokens={sink_tokens}, recent_window={recent_window}: none negative"
        )
    if first_valid is not None:
        check_first_valid("top_columns", first_valid, scores)
    total = scores.shape[1]
    found: Tensor = _OPERATION(
        scores,
        min(budget, total),
        sink_tokens=min(sink_tokens, total),  # keeps the sizes within an int64 of the C kernel
        recent_window=min(recent_window, total),
        first_valid=first_valid,
    )
    return found


def top_columns_reference(
    scores: Tensor, budget: int, *, sink_tokens: int, recent_window: int, first_valid: Tensor | None
) -> Tensor:
    """Define the selection of columns: sort by score, then move forced columns up and filler down."""
    heads, total = scores.shape
    ranked = scores.float().nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    columns = torch.arange(total, device=scores.device).expand(heads, total)
    start = 0 if first_valid is None else first_valid[:, None]
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    # Ranks instead of scores are changed, so that infinite scores cannot displace sinks.
    rank = torch.empty_like(order).scatter_(1, order, columns)
    recent = columns >= total - recent_window
    rank = torch.where((columns < start + sink_tokens) & ~recent, rank - 2 * total, rank)
    rank = torch.where(recent, rank - 4 * total, rank)
    rank = torch.where(columns < start, rank + 8 * total, rank)
    best = rank.argsort(dim=-1, stable=True)[:, :budget]
    return best.sort(dim=-1).values
