"""Attention of some rows over all keys, and what it puts on each vertical and slash line."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.line_scores import reference
from loopserve.kernels.shapes import check


class LineScores(NamedTuple):
    """probabilities ``[Hq, r, n]``; masses of the vertical lines (key columns) and slash lines (query minus key column) ``[Hq, n]``."""

    probabilities: Tensor
    vertical: Tensor
    slash: Tensor


_OPERATION = backend.operation("line_scores", reference=reference.line_scores)


def line_scores(
    queries: Tensor,
    keys: Tensor,
    columns: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    first_valid: Tensor | None = None,
) -> LineScores:
    """Row-softmax of queries ``[Hq, r, D]`` standing at ``columns`` over keys ``[Hkv, n, D]``, float32, with its line masses."""
    check("line_scores", queries, keys, columns=columns)
    return LineScores(
        *_OPERATION.pick(queries)(queries, keys, columns, scaling=scaling, softcap=softcap, first_valid=first_valid)
    )
