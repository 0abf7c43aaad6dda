"""Compute the attention of sampled rows over all keys, and its mass on each vertical and slash line."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.backend import check
from loopserve.kernels.gpu import limits
from loopserve.kernels.masked import masked_softmax, per_query_head, scaled_scores, visible
from loopserve.kernels.native import scores


class LineScores(NamedTuple):
    """Hold the attention of sampled rows, float32.

    probabilities ``[Hq, r, n]``: softmax rows, zero where a row sees no key. vertical ``[Hq, n]``: mass per key column.
    slash ``[Hq, n]``: mass per offset (query column minus key column).
    """

    probabilities: Tensor
    vertical: Tensor
    slash: Tensor


_OPERATION = backend.operation(
    "line_scores",
    torch="line_scores",
    cpu="native.scores",
    triton="gpu.scores",
    limits={"cpu": scores.limit, "triton": limits.scores},
)


def line_scores(
    queries: Tensor,
    keys: Tensor,
    columns: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    first_valid: Tensor | None = None,
) -> LineScores:
    """Return the softmax rows of queries ``[Hq, r, D]`` at ``columns`` int64 ``[r]`` over keys ``[Hkv, n, D]``, with
    their line masses.

    first_valid ``[Hkv]``: columns before it are filler. Raises ValueError for arguments that do not fit together.
    """
    check("line_scores", queries, keys, columns=columns, first_valid=first_valid)
    found = _OPERATION(queries, keys, columns, scaling=scaling, softcap=softcap, first_valid=first_valid)
    return LineScores(*found)


def row_probabilities_reference(
    queries: Tensor, keys: Tensor, columns: Tensor, *, scaling: float, softcap: float | None, first_valid: Tensor | None
) -> Tensor:
    """Return the softmax over the visible keys, float32 ``[Hq, r, n]``."""
    mask = per_query_head(visible(columns, keys.shape[1], first_valid=first_valid), queries.shape[0])
    return masked_softmax(scaled_scores(queries, keys, scaling=scaling, softcap=softcap), mask)[0].float()


def line_scores_reference(
    queries: Tensor, keys: Tensor, columns: Tensor, *, scaling: float, softcap: float | None, first_valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Define line masses: softmax rows, summed over columns and along diagonals."""
    rows = row_probabilities_reference(
        queries, keys, columns, scaling=scaling, softcap=softcap, first_valid=first_valid
    )
    slash = torch.zeros_like(rows[:, 0])
    for row, column in zip(rows.unbind(1), columns.tolist(), strict=True):
        slash[:, : column + 1] += row[:, : column + 1].flip(-1)
    return rows, rows.sum(1), slash


def row_probabilities_torch(
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


def line_scores_torch(
    queries: Tensor, keys: Tensor, columns: Tensor, *, scaling: float, softcap: float | None, first_valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute line masses without a mask tensor: each row ends at its own column, and diagonals are summed without
    reversing rows.
    """
    rows = row_probabilities_torch(queries, keys, columns, scaling=scaling, softcap=softcap, first_valid=first_valid)
    return rows, rows.sum(1), diagonal_sums(rows, columns)


def diagonal_sums(rows: Tensor, columns: Tensor) -> Tensor:
    """Sum rows ``[H, r, n]`` at ``columns`` along each offset: ``[H, n]``."""
    total = rows.shape[2]
    backwards = torch.zeros_like(rows[:, 0])  # entry n - 1 - d holds offset d, so that a row is added in memory order
    for row, column in enumerate(columns.tolist()):
        backwards[:, total - 1 - column :] += rows[:, row, : column + 1]
    return backwards.flip(-1)
