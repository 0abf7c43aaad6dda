"""Define line masses: softmax rows, summed over columns and along diagonals."""

from __future__ import annotations

import torch
from torch import Tensor

from loopserve.kernels.masked import masked_softmax, per_query_head, scaled_scores, visible


def row_probabilities(
    queries: Tensor, keys: Tensor, columns: Tensor, *, scaling: float, softcap: float | None, first_valid: Tensor | None
) -> Tensor:
    """Return the softmax over the visible keys, float32 ``[Hq, r, n]``."""
    mask = per_query_head(visible(columns, keys.shape[1], first_valid=first_valid), queries.shape[0])
    return masked_softmax(scaled_scores(queries, keys, scaling=scaling, softcap=softcap), mask)[0].float()


def line_scores(
    queries: Tensor, keys: Tensor, columns: Tensor, *, scaling: float, softcap: float | None, first_valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See the package."""
    rows = row_probabilities(queries, keys, columns, scaling=scaling, softcap=softcap, first_valid=first_valid)
    slash = torch.zeros_like(rows[:, 0])
    for row, column in zip(rows.unbind(1), columns.tolist(), strict=True):
        slash[:, : column + 1] += row[:, : column + 1].flip(-1)
    return rows, rows.sum(1), slash
