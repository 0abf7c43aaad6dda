"""Compute how much attention each stored pair gets from a few queries, per KV head."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.backend import check
from loopserve.kernels.gpu import limits
from loopserve.kernels.line_scores import row_probabilities_reference, row_probabilities_torch
from loopserve.kernels.native import scores

OverRows = Literal["mean", "sum", "max"]
_OVER_ROWS = ("mean", "sum", "max")
_OPERATION = backend.operation(
    "token_scores",
    torch="token_scores",
    cpu="native.scores",
    triton="gpu.scores",
    limits={"cpu": scores.token_limit, "triton": limits.scores},
)
_NUMBERS = 1 << 21  # scores in memory at once: 8 MiB in float32


def token_scores(
    queries: Tensor,
    keys: Tensor,
    columns: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    first_valid: Tensor | None = None,
    over_rows: OverRows | str = "mean",
) -> Tensor:
    """Return the softmax of queries ``[Hq, r, D]`` at ``columns`` over all keys, reduced over rows and averaged over
    the group: float32 ``[Hkv, n]``.

    over_rows: ``mean``, ``sum`` or ``max`` over the rows of each query head. Raises ValueError for an unknown name or
    arguments that do not fit together.
    """
    check("token_scores", queries, keys, columns=columns, first_valid=first_valid)
    if over_rows not in _OVER_ROWS:
        raise ValueError(f"token_scores: over_rows={over_rows!r} is unknown (known: {', '.join(_OVER_ROWS)})")
    found: Tensor = _OPERATION(
        queries, keys, columns, scaling=scaling, softcap=softcap, first_valid=first_valid, over_rows=over_rows
    )
    return found


def token_scores_reference(
    queries: Tensor,
    keys: Tensor,
    columns: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    first_valid: Tensor | None,
    over_rows: str,
) -> Tensor:
    """Define token scores: all softmax rows, reduced over rows, then averaged over the group."""
    rows = row_probabilities_reference(
        queries, keys, columns, scaling=scaling, softcap=softcap, first_valid=first_valid
    )
    joined = {"mean": rows.mean(1), "sum": rows.sum(1), "max": rows.amax(1)}[over_rows]
    return joined.view(keys.shape[0], -1, keys.shape[1]).mean(1)


def token_scores_torch(
    queries: Tensor,
    keys: Tensor,
    columns: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    first_valid: Tensor | None,
    over_rows: str,
) -> Tensor:
    """Compute token scores for one KV head and a few rows at a time, which bounds the memory."""
    heads, total = keys.shape[:2]
    group = queries.shape[0] // heads
    size = max(1, _NUMBERS // (group * total))
    scores = torch.zeros(heads, total, dtype=torch.float32, device=keys.device)
    for head in range(heads):
        joined = torch.zeros(group, total, dtype=torch.float32, device=keys.device)
        mine = queries[head * group : (head + 1) * group]
        for rows, where in zip(torch.split(mine, size, dim=1), torch.split(columns, size), strict=True):
            found = row_probabilities_torch(
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
