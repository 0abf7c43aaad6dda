"""Select the lines of each head that cover a share of its attention at the lowest cost, greedily by uncovered mass per
cost.
"""

from __future__ import annotations

import math

from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.gpu import limits
from loopserve.kernels.select_lines.options import MOST_TILE, TILE, Cost, LineSelection, finish, prepare
from loopserve.kernels.shapes import check_columns

__all__ = ["MOST_TILE", "TILE", "LineSelection", "select_lines"]

_OPERATION = backend.operation(
    "select_lines", "torch", "cpu", "triton", any_device=True, limits={"triton": limits.selection}
)


def select_lines(
    probabilities: Tensor,
    columns: Tensor,
    new_tokens: int,
    *,
    alpha: float,
    cost: Cost = "length",
    row_weights: Tensor | None = None,
    row_floor: float | None = None,
    forced_verticals: Tensor | None = None,
    forced_slashes: Tensor | None = None,
    tile: int = TILE,
    most_cost: float = math.inf,
) -> LineSelection:
    """Return lines whose union covers at least ``alpha`` of the weighted mass of the sampled rows, per head.

    probabilities float32 ``[Hq, r, n]``: softmax rows of queries at ``columns`` int64 ``[r]``. The block is the last
    ``new_tokens`` of n columns. Probabilities that are not finite count as 0.

    cost ``length``: the cells of the block that a line adds to the union. cost ``tile``: the additional keys that a
    kernel with tiles of ``tile`` rows computes. A vertical costs 1, an isolated slash ``tile``, a slash next to a
    chosen one 1, and less where a line crosses only part of the block.

    row_weights ``[r]`` or ``[Hq, r]``: weight of each row's mass. row_floor: share that every sampled row must reach in
    addition. forced_verticals, forced_slashes ``[n]`` or ``[Hq, n]``: lines taken first. most_cost: a head stops below
    its target as soon as the rate of its best line shows that the target would cost more. On a GPU stopping saves no
    time, since all heads run the same rounds. Raises ValueError for arguments out of range or that do not fit together.
    """
    if probabilities.dim() != 3 or 0 in probabilities.shape:
        raise ValueError(f"select_lines: probabilities {list(probabilities.shape)} must be non-empty [Hq, r, n]")
    heads, rows, total = probabilities.shape
    check_columns("select_lines", columns, rows, total, probabilities.device)
    options = prepare(
        "select_lines",
        columns,
        heads,
        total,
        new_tokens,
        alpha=alpha,
        cost=cost,
        row_weights=row_weights,
        row_floor=row_floor,
        forced=(forced_verticals, forced_slashes),
        tile=tile,
        most_cost=most_cost,
    )
    chosen, covered, mass, spent = _OPERATION(probabilities, columns, new_tokens, **options)
    return finish(chosen, covered, mass, spent, options["row_weights"])
