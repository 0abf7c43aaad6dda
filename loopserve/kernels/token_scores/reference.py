"""Define token scores: all softmax rows, reduced over rows, then averaged over the group."""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels.line_scores.reference import row_probabilities


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
    rows = row_probabilities(queries, keys, columns, scaling=scaling, softcap=softcap, first_valid=first_valid)
    joined = {"mean": rows.mean(1), "sum": rows.sum(1), "max": rows.amax(1)}[over_rows]
    return joined.view(keys.shape[0], -1, keys.shape[1]).mean(1)
