"""Define the selection of columns: sort by score, then move forced columns up and filler down."""

from __future__ import annotations

import torch
from torch import Tensor


def top_columns(
    scores: Tensor, budget: int, *, sink_tokens: int, recent_window: int, first_valid: Tensor | None
) -> Tensor:
    """See the package."""
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
