"""Token scores by definition."""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels.line_scores.reference import probabilities


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
    rows = probabilities(queries, keys, columns, scaling=scaling, softcap=softcap, first_valid=first_valid)
    joined = {"mean": lambda: rows.mean(1), "sum": lambda: rows.sum(1), "max": lambda: rows.amax(1)}[over_rows]()
    grouped: Tensor = joined.unflatten(0, (keys.shape[0], -1))
    return grouped.mean(1)
