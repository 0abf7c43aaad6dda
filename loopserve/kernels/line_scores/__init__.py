"""Attention of some rows over all keys, and what it puts on each vertical and slash line."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.line_scores import reference
from loopserve.kernels.shapes import check


@dataclass(frozen=True, eq=False)
class LineScores:
    """Softmax rows ``[Hq, r, n]`` standing at ``columns`` ``[r]``. The masses of the lines are summed when first asked for."""

    probabilities: Tensor
    columns: Tensor

    @cached_property
    def vertical(self) -> Tensor:
        """Mass of each vertical line, by key column: ``[Hq, n]``."""
        return self.probabilities.sum(1)

    @cached_property
    def slash(self) -> Tensor:
        """Mass of each slash line, by offset (query column minus key column): ``[Hq, n]``."""
        return reference.slash_mass(self.probabilities, self.columns)


_OPERATION = backend.operation("line_scores", reference=reference.probabilities)


def line_scores(
    queries: Tensor,
    keys: Tensor,
    columns: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    first_valid: Tensor | None = None,
) -> LineScores:
    """Row-softmax of queries ``[Hq, r, D]`` standing at ``columns`` over keys ``[Hkv, n, D]``, float32."""
    check("line_scores", queries, keys, columns=columns)
    rows = _OPERATION.pick(queries)(queries, keys, columns, scaling=scaling, softcap=softcap, first_valid=first_valid)
    return LineScores(rows, columns)
