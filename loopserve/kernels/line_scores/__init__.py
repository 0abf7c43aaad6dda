"""Compute the attention of sampled rows over all keys, and its mass on each vertical and slash line."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.gpu import limits
from loopserve.kernels.line_scores import cpu
from loopserve.kernels.shapes import check


class LineScores(NamedTuple):
    """Hold the attention of sampled rows, float32.

    probabilities ``[Hq, r, n]``: softmax rows, zero where a row sees no key. vertical ``[Hq, n]``: mass per key column.
    slash ``[Hq, n]``: mass per offset (query column minus key column).
    """

    probabilities: Tensor
    vertical: Tensor
    slash: Tensor


_OPERATION = backend.operation(
    "line_scores", "torch", "cpu", "triton", limits={"cpu": cpu.limit, "triton": limits.scores}
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
