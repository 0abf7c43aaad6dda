"""Compute token scores on a GPU in two passes over the keys, without storing the scores of query heads."""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels.gpu.rows import row_masses


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
    group = queries.shape[0] // keys.shape[0]
    return row_masses(
        queries,
        keys,
        columns,
        scaling=scaling,
        softcap=softcap,
        first_valid=first_valid,
        writes=False,
        largest=over_rows == "max",
        factor=1.0 / (group * queries.shape[1] if over_rows == "mean" else group),
    )[1]
