"""Compute bounds of keys per page, and an upper bound of the score of any key of a page for a query.

Paper: Quest, https://arxiv.org/abs/2406.10774. Both functions have one implementation for every device. The second
takes the result of the first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def page_bounds(keys: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of each key channel per page of ``page`` columns, two ``[Hkv, P, D]``;
    the last page may be partial.
    """
    if page < 1 or keys.dim() != 3 or keys.shape[1] == 0:
        raise ValueError(
            f"page_bounds: needs keys [Hkv, n, D] with n > 0 and a page > 0, got {list(keys.shape)} and {page}"
        )
    whole = keys.shape[1] // page * page
    pages = keys[:, :whole].reshape(keys.shape[0], -1, page, keys.shape[2])
    low, high = pages.amin(2), pages.amax(2)
    if whole < keys.shape[1]:
        rest = keys[:, whole:]
        low = torch.cat([low, rest.amin(1, keepdim=True)], dim=1)
        high = torch.cat([high, rest.amax(1, keepdim=True)], dim=1)
    return low, high


def page_scores(queries: Tensor, low: Tensor, high: Tensor, *, scaling: float) -> Tensor:
    """Return an upper bound of the scaled score of any key of a page: float32 ``[Hkv, P]``.

    Per query and channel the larger of query * low and query * high is taken and summed over channels. The result is
    the maximum over the queries ``[Hq, t, D]`` and over the query heads of a group, so that a page is kept if one of
    them needs it.
    """
    if low.dim() != 3 or low.shape != high.shape or queries.dim() != 3 or queries.shape[0] % low.shape[0]:
        raise ValueError(
            f"page_scores: queries {list(queries.shape)}, low {list(low.shape)}, high {list(high.shape)} do not fit"
        )
    rows = queries.float().reshape(low.shape[0], -1, queries.shape[2])
    # A positive query channel has its largest product with the largest key, a negative one with the smallest.
    bound = rows.clamp(min=0) @ high.float().transpose(1, 2) + rows.clamp(max=0) @ low.float().transpose(1, 2)
    return bound.amax(1) * scaling
