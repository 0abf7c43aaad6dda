"""Compute line masses without a mask tensor: each row ends at its own column, and diagonals are summed without
reversing rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loopserve.kernels.masked import scaled_scores


def row_probabilities(
    queries: Tensor, keys: Tensor, columns: Tensor, *, scaling: float, softcap: float | None, first_valid: Tensor | None
) -> Tensor:
    """Return the softmax over the visible keys, float32 ``[Hq, r, n]``."""
    scores = scaled_scores(queries, keys, scaling=scaling, softcap=softcap)
    for row, column in enumerate(columns.tolist()):
        scores[:, row, column + 1 :] = float("-inf")
    if first_valid is None:
        return torch.softmax(scores, dim=-1)
    group = queries.shape[0] // keys.shape[0]
    for head, start in enumerate(first_valid.tolist()):
        scores[head * group : (head + 1) * group, :, :start] = float("-inf")
    return torch.softmax(scores, dim=-1).nan_to_num_(0.0)  # a row in the filler sees no key


def line_scores(
    queries: Tensor, keys: Tensor, columns: Tensor, *, scaling: float, softcap: float | None, first_valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See the package."""
    rows = row_probabilities(queries, keys, columns, scaling=scaling, softcap=softcap, first_valid=first_valid)
    return rows, rows.sum(1), diagonal_sums(rows, columns)


def diagonal_sums(rows: Tensor, columns: Tensor) -> Tensor:
    """Sum rows ``[H, r, n]`` at ``columns`` along each offset: ``[H, n]``."""
    total = rows.shape[2]
    backwards = torch.zeros_like(rows[:, 0])  # entry n - 1 - d holds offset d, so that a row is added in memory order
    for row, column in enumerate(columns.tolist()):
        backwards[:, total - 1 - column :] += rows[:, row, : column + 1]
    return backwards.flip(-1)
