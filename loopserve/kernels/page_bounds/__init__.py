"""Per-page bounds of keys, and the best score any key of a page could have for a query (Quest, arXiv 2406.10774)."""

from __future__ import annotations

import torch
from torch import Tensor


def page_bounds(keys: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """(smallest, largest) key coordinate of each page of ``page`` columns: two ``[Hkv, P, D]``; the last page may be partial."""
    if page < 1:
        raise ValueError(f"page_bounds: a page holds at least one key, got {page}")
    whole = keys.shape[1] // page * page
    pages = (
        keys[:, :whole].unflatten(1, (whole // page, page))
        if whole
        else keys.new_empty(keys.shape[0], 0, 1, keys.shape[2])
    )
    low, high = pages.amin(2), pages.amax(2)
    if whole < keys.shape[1]:
        rest = keys[:, whole:]
        low = torch.cat([low, rest.amin(1, keepdim=True)], dim=1)
        high = torch.cat([high, rest.amax(1, keepdim=True)], dim=1)
    return low, high


def page_scores(queries: Tensor, low: Tensor, high: Tensor, *, scaling: float) -> Tensor:
    """Upper bound of the scaled score of any key of a page, for the best of queries ``[Hq, t, D]`` of a group: float32 ``[Hkv, P]``."""
    grouped = queries.float().unflatten(0, (low.shape[0], -1)).flatten(1, 2)
    bound = grouped.clamp(min=0) @ high.float().transpose(1, 2) + grouped.clamp(max=0) @ low.float().transpose(1, 2)
    best: Tensor = (bound * scaling).amax(1)
    return best
