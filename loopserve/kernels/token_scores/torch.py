"""Compute token scores for one KV head and a few rows at a time, which bounds the memory."""

from __future__ import annotations

import torch
from torch import Tensor

from loopserve.kernels.line_scores.torch import row_probabilities

_NUMBERS = 1 << 21  # scores in memory at once: 8 MiB in float32


def token_scores(
    queries: Tensor,
    keys: Tensor,
    columns: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    first_valid: Tensor | None,
    over_rows: str,
) -> Tensor:
    """See the package."""
    heads, total = keys.shape[:2]
    group = queries.shape[0] // heads
    size = max(1, _NUMBERS // (group * total))
    scores = torch.zeros(heads, total, dtype=torch.float32, device=keys.device)
    for head in range(heads):
        joined = torch.zeros(group, total, dtype=torch.float32, device=keys.device)
        mine = queries[head * group : (head + 1) * group]
        for rows, where in zip(torch.split(mine, size, dim=1), torch.split(columns, size), strict=True):
            found = row_probabilities(
                rows,
                keys[head : head + 1],
                where,
                scaling=scaling,
                softcap=softcap,
                first_valid=None if first_valid is None else first_valid[head : head + 1],
            )
            if over_rows == "max":
                torch.maximum(joined, found.amax(1), out=joined)
            else:
                joined += found.sum(1)
        scores[head] = joined.mean(0)
    return scores / queries.shape[1] if over_rows == "mean" else scores
